"""Gradient in router logits on a GPU: one Triton kernel, one read of the logits and one write."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from thinwire.kernels.route_on_gpu import log_sum_exp, rows_per_program, sigmoid
from thinwire.kernels.triton_kernel import triton_kernel

if TYPE_CHECKING:
    import triton.language as tl

    from thinwire.kernels.router_gradient import Gates

__all__ = ["compile_time", "kernel", "launch", "log_sum_exp", "sigmoid"]


@triton_kernel(warps=4, varying=("tokens",))
def kernel(
    logits: tl.tensor,
    pull: tl.tensor,
    z_scale: tl.tensor,
    valid: tl.tensor,
    normaliser: tl.tensor,
    selected: tl.tensor,
    weights: tl.tensor,
    gate_gradient: tl.tensor,
    out: tl.tensor,
    tokens: tl.int64,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALISED: tl.constexpr,
    HAS_PULL: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_NORMALISER: tl.constexpr,
    HAS_GATES: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.arange(0, BLOCK_E)
    present = row < tokens
    exists = (expert < E)[None, :]
    inside = present[:, None] & exists
    z = tl.load(logits + row[:, None] * E + expert[None, :], mask=inside, other=0.0).to(tl.float32)
    dz = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)

    if SIGMOID:
        s = tl.where(exists, sigmoid(z), 0.0)
        slope = 1.0 - s
        if HAS_PULL:
            norm = tl.load(normaliser + row, mask=present, other=1.0) if HAS_NORMALISER else tl.sum(s, 1)
            norm = tl.maximum(norm, 1.1754943508222875e-38)
            p = tl.div_rn(s, norm[:, None] + tl.zeros_like(s))
        if HAS_Z:
            lse = log_sum_exp(z, exists)
            soft = tl.where(exists, tl.exp(z - lse[:, None]), 0.0)
    else:
        lse = tl.load(normaliser + row, mask=present, other=0.0) if HAS_NORMALISER else log_sum_exp(z, exists)
        p = tl.where(exists, tl.exp(z - lse[:, None]), 0.0)
        soft = p

    if HAS_PULL:
        w = tl.load(pull + expert, mask=expert < E, other=0.0).to(tl.float32)[None, :]
        dz = p * (w - tl.sum(p * w, 1)[:, None])
        if SIGMOID:
            dz *= slope
    if HAS_Z:
        dz += soft * (2.0 * tl.load(z_scale).to(tl.float32) * lse)[:, None]
    if HAS_VALID:
        keep = tl.load(valid + row, mask=present, other=0) != 0
        dz = tl.where(keep[:, None], dz, 0.0)  # what is not a token may hold anything, NaN too

    if HAS_GATES:
        through = tl.zeros((BLOCK_T,), tl.float32)
        for j in range(K):
            q = tl.load(weights + row * K + j, mask=present, other=0.0)
            through += q * tl.load(gate_gradient + row * K + j, mask=present, other=0.0)
        of_gate = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
        for j in range(K):
            chosen = tl.load(selected + row * K + j, mask=present, other=-1)
            q = tl.load(weights + row * K + j, mask=present, other=0.0)
            g = tl.load(gate_gradient + row * K + j, mask=present, other=0.0)
            if RENORMALISED:
                g -= through
            of_gate = tl.where(expert[None, :] == chosen[:, None], (q * g)[:, None], of_gate)
        if SIGMOID:
            of_gate *= slope
        elif not RENORMALISED:
            of_gate -= p * through[:, None]
        dz += of_gate
    tl.store(out + row[:, None] * E + expert[None, :], dz.to(out.dtype.element_ty), mask=inside)


def compile_time(
    experts: int,
    top_k: int,
    *,
    sigmoid: bool = False,
    renormalised: bool = False,
    pull: bool = True,
    z: bool = True,
    valid: bool = False,
    normaliser: bool = True,
    gates: bool = True,
) -> dict[str, int]:
    """The kernel's constants."""
    rows, block = rows_per_program(experts)
    return {
        "E": experts,
        "BLOCK_E": block,
        "K": top_k,
        "BLOCK_T": rows,
        "SIGMOID": sigmoid,
        "RENORMALISED": renormalised,
        "HAS_PULL": pull,
        "HAS_Z": z,
        "HAS_VALID": valid,
        "HAS_NORMALISER": normaliser,
        "HAS_GATES": gates,
    }


def launch(
    logits: Tensor,
    pull: Tensor | None,
    z_scale: Tensor | None,
    valid: Tensor | None,
    normaliser: Tensor | None,
    gates: Gates | None,
    out: Tensor,
    *,
    sigmoid: bool,
) -> None:
    """Run the Triton kernel on contiguous tensors with at least one element."""
    tokens, experts = logits.shape
    constants = compile_time(
        experts,
        gates.selected.shape[1] if gates else 1,
        sigmoid=sigmoid,
        renormalised=gates is not None and gates.renormalised,
        pull=pull is not None,
        z=z_scale is not None,
        valid=valid is not None,
        normaliser=normaliser is not None,
        gates=gates is not None,
    )
    unused = logits
    kernel.launch(
        -(-tokens // constants["BLOCK_T"]),
        logits.device,
        logits,
        unused if pull is None else pull.contiguous(),
        unused if z_scale is None else z_scale,
        unused if valid is None else valid.contiguous().view(torch.uint8),
        unused if normaliser is None else normaliser,
        unused if gates is None else gates.selected,
        unused if gates is None else gates.weights,
        unused if gates is None else gates.gradient,
        out,
        tokens,
        **constants,
    )
