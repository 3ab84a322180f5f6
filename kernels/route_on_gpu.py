"""The forward pass of a router on a GPU: one Triton kernel that keeps a few tokens' logits in registers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from thinwire.kernels.triton_kernel import triton_kernel, triton_part

if TYPE_CHECKING:
    import triton.language as tl

TILE = 1024  # logits per program and round: 8 per lane, so that nothing spills
PROGRAMS = 1024  # at most; each leaves a row of sums behind


@triton_part
def order_key(x):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """int32 that orders as the fp32 numbers do; -0 equals 0, and NaN is the largest."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)  # noqa: PLR0124


@triton_part
def sigmoid(z):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    return tl.div_rn(tl.full(z.shape, 1.0, tl.float32), 1.0 + tl.exp(-z))


@triton_part
def log_sum_exp(z, inside):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Of each row."""
    largest = tl.max(tl.where(inside, z, float("-inf")), 1)
    return largest + tl.log(tl.sum(tl.where(inside, tl.exp(z - largest[:, None]), 0.0), 1))


@triton_kernel(warps=4, varying=("tokens", "rounds"))
def kernel(
    logits: tl.tensor,
    valid: tl.tensor,
    bias: tl.tensor,
    selected: tl.tensor,
    weights: tl.tensor,
    normaliser: tl.tensor,
    tallies: tl.tensor,
    sums: tl.tensor,
    tokens: tl.int64,
    rounds: tl.int32,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALISE: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SUMS: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    expert = tl.arange(0, BLOCK_E)
    slot = tl.arange(0, BLOCK_K)
    exists = expert < E
    counts = tl.zeros((BLOCK_E,), tl.int32)
    total = tl.zeros((BLOCK_E,), tl.float32)
    counted = tl.zeros((BLOCK_T,), tl.int32)
    bad = tl.zeros((BLOCK_T,), tl.int32)
    for turn in range(rounds):
        row = (turn * tl.num_programs(0) + program).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        present = row < tokens
        inside = present[:, None] & exists[None, :]
        z = tl.load(logits + row[:, None] * E + expert[None, :], mask=inside, other=0.0).to(tl.float32)
        keep = present
        if HAS_VALID:
            keep = keep & (tl.load(valid + row, mask=present, other=0) != 0)
        counted += keep.to(tl.int32)
        bad += keep & (tl.max((inside & ~(tl.abs(z) < float("inf"))).to(tl.int32), 1) > 0)

        if SIGMOID:
            score = tl.where(exists[None, :], sigmoid(z), 0.0)
            norm = tl.sum(score, 1)
            if HAS_SUMS:
                p = tl.div_rn(score, tl.maximum(norm, 1.1754943508222875e-38)[:, None])
                total += tl.sum(tl.where(keep[:, None], p, 0.0), 0)
        else:
            norm = log_sum_exp(z, exists[None, :])
            score = tl.where(exists[None, :], tl.exp(z - norm[:, None]), 0.0)
            if HAS_SUMS:
                total += tl.sum(tl.where(keep[:, None], score, 0.0), 0)
        tl.store(normaliser + row, norm, mask=present)

        # Keys differ, so that a maximum names one expert: the score's order above, the expert's from the end below.
        if HAS_BIAS:
            score += tl.load(bias + expert, mask=exists, other=0.0)[None, :]
            key = order_key(score)
        else:
            key = order_key(z)
        key = (tl.where(exists[None, :], key, -0x80000000).to(tl.int64) << 32) | (BLOCK_E - 1 - expert)[None, :]
        lowest = -0x7FFFFFFFFFFFFFFF - 1
        number = tl.zeros((BLOCK_T, BLOCK_K), tl.int64)
        gate = tl.full((BLOCK_T, BLOCK_K), float("-inf"), tl.float32)
        for j in range(K):
            best = tl.max(key, 1)
            taken = key == best[:, None]
            number = tl.where((slot == j)[None, :], (BLOCK_E - 1 - (best & 0xFFFFFFFF))[:, None], number)
            gate = tl.where((slot == j)[None, :], tl.sum(tl.where(taken, z, 0.0), 1)[:, None], gate)
            key = tl.where(taken, lowest, key)
        counts += tl.sum(((key == lowest) & exists[None, :] & keep[:, None]).to(tl.int32), 0)

        used = (slot < K)[None, :]
        if SIGMOID:
            w = tl.where(used, sigmoid(gate), 0.0)
            if RENORMALISE:
                w = tl.div_rn(w, tl.maximum(tl.sum(w, 1), 1.1754943508222875e-38)[:, None])
        elif RENORMALISE:
            w = tl.exp(gate - tl.max(gate, 1)[:, None])
            w = tl.div_rn(w, tl.sum(w, 1)[:, None])
        else:
            w = tl.exp(gate - norm[:, None])
        place = row[:, None] * K + slot[None, :]
        tl.store(selected + place, number, mask=present[:, None] & used)
        tl.store(weights + place, w, mask=present[:, None] & used)

    tallies += program * (E + 3)
    tl.store(tallies + expert, counts, mask=exists)
    tl.store(tallies + E, tl.sum(counted, 0))
    tl.store(tallies + E + 1, 0)
    tl.store(tallies + E + 2, tl.sum(bad, 0))
    if HAS_SUMS:
        tl.store(sums + program * E + expert, total, mask=exists)


def rows_per_program(experts: int) -> tuple[int, int]:
    """(tokens, experts rounded up to a power of two) of a program's tile."""
    block = 1 << max(experts - 1, 0).bit_length()
    return max(1, min(256, TILE // block)), block


def compile_time(
    experts: int,
    top_k: int,
    *,
    sigmoid: bool = False,
    renormalise: bool = False,
    valid: bool = False,
    bias: bool = False,
    sums: bool = False,
) -> dict[str, int]:
    """The kernel's constants."""
    rows, block = rows_per_program(experts)
    return {
        "E": experts,
        "BLOCK_E": block,
        "K": top_k,
        "BLOCK_K": 1 << max(top_k - 1, 0).bit_length(),
        "BLOCK_T": rows,
        "SIGMOID": sigmoid,
        "RENORMALISE": renormalise,
        "HAS_VALID": valid,
        "HAS_BIAS": bias,
        "HAS_SUMS": sums,
    }


def launch(
    logits: Tensor,
    top_k: int,
    valid: Tensor | None,
    bias: Tensor | None,
    sigmoid: bool,
    renormalise: bool,
    sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Run the Triton kernel, and add up what its programs counted; arguments as of route_on_cpu()."""
    tokens, experts = logits.shape
    constants = compile_time(
        experts,
        top_k,
        sigmoid=sigmoid,
        renormalise=renormalise,
        valid=valid is not None,
        bias=bias is not None,
        sums=sums,
    )
    tiles = -(-tokens // constants["BLOCK_T"])
    programs = min(tiles, PROGRAMS)
    device = logits.device
    selected = torch.empty(tokens, top_k, dtype=torch.int64, device=device)
    weights = torch.empty(tokens, top_k, device=device)
    normaliser = torch.empty(tokens, device=device)
    tallies = torch.empty(programs, experts + 3, dtype=torch.int32, device=device)
    totals = torch.empty(programs, experts, device=device) if sums else normaliser
    kernel.launch(
        programs,
        device,
        logits,
        logits if valid is None else valid.view(torch.uint8),
        normaliser if bias is None else bias,
        selected,
        weights,
        normaliser,
        tallies,
        totals,
        tokens,
        -(-tiles // programs),
        **constants,
    )
    tally = tallies[0] if programs == 1 else tallies.sum(0, dtype=torch.int32)
    return selected, weights, normaliser, tally, totals.sum(0) if sums else None
