"""Weighted sum of vectors in one pass: what a round of gossip does to a machine's weights and its neighbours'."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from thinwire.kernels.triton_kernel import triton_is_installed, triton_kernel

if TYPE_CHECKING:
    import triton.language as tl

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK = 2048  # elements per program: one 16-byte load per lane and 16-bit vector
FUSED = 5  # vectors in one pass: a machine and its neighbours on a ring, a torus, a hypercube of 16
_CPU_TILE = 1 << 15  # stays in the cache, and on the calling thread: as in cast_reduce


def weighted_sum(vectors: Sequence[Tensor], weights: Sequence[float], *, out: Tensor | None = None) -> Tensor:
    """out = ((w[0] v[0] + w[1] v[1]) + w[2] v[2]) + ..., the same bits on every device; returns `out`.

    Every vector is widened to fp32 first; every product and every sum is rounded to fp32 by itself. So machines that
    average the same vectors with the same weights in the same order get the same bits. fp64 vectors are summed in fp64.

    On a GPU this is a Triton kernel (without Triton: PyTorch, with a warning) that takes up to five vectors in a pass;
    elsewhere PyTorch in tiles that stay in the cache. Not differentiable.

    Args:
        vectors: one or more, (m,), contiguous, on one device; each fp32, bf16 or fp16, or all fp64.
        weights: as many finite numbers.
        out: (m,), fp32 (fp64 for fp64 vectors), contiguous, on the same device; it may be vectors[0] itself, and shares
            no memory with the others. Default: a new one.

    Raises:
        ValueError: a dtype, shape, device, count or weight other than these.
    """
    out = _check(vectors, weights, out)
    if out.numel() == 0:
        return out
    with torch.no_grad():
        if out.is_cuda and out.dtype == torch.float32 and triton_is_installed():
            launch(vectors, weights, out)
        else:
            if out.is_cuda and out.dtype == torch.float32:
                warnings.warn(
                    "weighted_sum: Triton is not installed, so PyTorch mixes GPU tensors: same result, several times "
                    "slower; pip install 'thinwire[triton]' brings it",
                    RuntimeWarning,
                    stacklevel=2,
                )
            _sum_in_tiles(vectors, weights, out, out.numel() if out.is_cuda else _CPU_TILE)
    return out


def weighted_sum_reference(vectors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The definition of `weighted_sum`."""
    wide = torch.float64 if vectors[0].dtype == torch.float64 else torch.float32
    total = vectors[0].to(wide) * weights[0]
    for vector, weight in zip(vectors[1:], weights[1:], strict=True):
        total = total + vector.to(wide) * weight
    return total


@triton_kernel(warps=8, varying=("m",))
def kernel(
    v0: tl.tensor,
    v1: tl.tensor,
    v2: tl.tensor,
    v3: tl.tensor,
    v4: tl.tensor,
    out: tl.tensor,
    w0: tl.float32,
    w1: tl.float32,
    w2: tl.float32,
    w3: tl.float32,
    w4: tl.float32,
    m: tl.int64,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = start + tl.arange(0, BLOCK)
    inside = lane < m
    # Two copies: without a mask the compiler can load 16 bytes at a time whatever m is.
    if start + BLOCK <= m:
        total = tl.load(v0 + lane, eviction_policy="evict_first").to(tl.float32) * w0
        if N > 1:
            total += tl.load(v1 + lane, eviction_policy="evict_first").to(tl.float32) * w1
        if N > 2:
            total += tl.load(v2 + lane, eviction_policy="evict_first").to(tl.float32) * w2
        if N > 3:
            total += tl.load(v3 + lane, eviction_policy="evict_first").to(tl.float32) * w3
        if N > 4:
            total += tl.load(v4 + lane, eviction_policy="evict_first").to(tl.float32) * w4
        tl.store(out + lane, total)
    else:
        total = tl.load(v0 + lane, mask=inside).to(tl.float32) * w0
        if N > 1:
            total += tl.load(v1 + lane, mask=inside).to(tl.float32) * w1
        if N > 2:
            total += tl.load(v2 + lane, mask=inside).to(tl.float32) * w2
        if N > 3:
            total += tl.load(v3 + lane, mask=inside).to(tl.float32) * w3
        if N > 4:
            total += tl.load(v4 + lane, mask=inside).to(tl.float32) * w4
        tl.store(out + lane, total, mask=inside)


def launch(vectors: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> None:
    """Run the Triton kernel on checked, non-empty arguments: once, and once more for every four vectors past five."""
    terms = list(zip(vectors, weights, strict=True))
    now, later = terms[:FUSED], terms[FUSED:]
    while now:
        padded = [*now, *[now[0]] * (FUSED - len(now))]
        kernel.launch(
            -(-out.numel() // BLOCK),
            out.device,
            *(vector for vector, _ in padded),
            out,
            *(weight for _, weight in padded),
            out.numel(),
            N=len(now),
            BLOCK=BLOCK,
        )
        # The sum so far enters the next pass with weight 1, which changes no bit of it.
        now, later = ([(out, 1.0), *later[: FUSED - 1]] if later else []), later[FUSED - 1 :]


def _sum_in_tiles(vectors: Sequence[Tensor], weights: Sequence[float], out: Tensor, tile: int) -> None:
    m = out.numel()
    scratch = torch.empty(min(m, tile), dtype=out.dtype, device=out.device)
    for start in range(0, m, tile):
        stop = min(start + tile, m)
        total, product = out[start:stop], scratch[: stop - start]
        torch.mul(vectors[0][start:stop].to(out.dtype), weights[0], out=total)
        for vector, weight in zip(vectors[1:], weights[1:], strict=True):
            total.add_(torch.mul(vector[start:stop].to(out.dtype), weight, out=product))


def _check(vectors: Sequence[Tensor], weights: Sequence[float], out: Tensor | None) -> Tensor:
    if not vectors or len(vectors) != len(weights):
        raise ValueError(f"weighted_sum: {len(vectors)} vectors and {len(weights)} weights; give as many, at least one")
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"weighted_sum: weights are {list(weights)}; all must be finite")
    first = vectors[0]
    double = first.dtype == torch.float64
    allowed = (torch.float64,) if double else DTYPES
    for name, tensor in [
        *((f"vectors[{i}]", v) for i, v in enumerate(vectors)),
        *([("out", out)] if out is not None else []),
    ]:
        if tensor.dtype not in (allowed if name != "out" else (torch.float64 if double else torch.float32,)):
            raise ValueError(
                f"weighted_sum: {name} has dtype {tensor.dtype}; vectors are fp32, bf16 or fp16 and out is fp32, or "
                "all are fp64"
            )
        if tensor.shape != first.shape or tensor.dim() != 1:
            raise ValueError(f"weighted_sum: {name} has shape {tuple(tensor.shape)}; all must have one shape (m,)")
        if tensor.device != first.device:
            raise ValueError(
                f"weighted_sum: {name} is on {tensor.device}, vectors[0] on {first.device}; use one device"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"weighted_sum: {name} is not contiguous; call .contiguous() first")
    if out is None:
        return torch.empty_like(first, dtype=torch.float64 if double else torch.float32)
    for i, vector in enumerate(vectors):
        itself = i == 0 and vector.data_ptr() == out.data_ptr() and vector.dtype == out.dtype
        if not itself and _share_memory(vector, out):
            raise ValueError(f"weighted_sum: out shares memory with vectors[{i}]; give it memory of its own")
    return out


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() < b.data_ptr() + b.nbytes and b.data_ptr() < a.data_ptr() + a.nbytes
