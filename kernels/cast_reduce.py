"""Sum of n payloads in fp32, in rank order, scaled and rounded to the output dtype, in one pass."""

from __future__ import annotations

import ctypes
import math
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from thinwire.kernels.triton_kernel import triton_is_installed, triton_kernel

if TYPE_CHECKING:
    import triton.language as tl

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK = 2048  # elements of the output per program: one 16-byte load per lane and 16-bit payload
# PyTorch keeps element-wise operations of up to this size on the calling thread. Larger tiles are twice as fast on two
# idle cores but several times slower where other threads compute, and this runs beside the backward pass.
_CPU_TILE = 1 << 15
_GPU_TILE = 1 << 24  # only without Triton: few enough launches


def cast_reduce(payloads: Tensor, *, scale: float = 1.0, out: Tensor) -> Tensor:
    """Write the scaled sum of the payloads into `out`, the same bits on every device, and return `out`.

    out = round((((p[0] + p[1]) + p[2]) + ... + p[n-1]) * scale); every + and * is rounded to fp32 and the
    result to the dtype of out, to nearest even. Where the result is NaN, which NaN it is is not defined.

    On a GPU this is the Triton kernel (without Triton: PyTorch, with a warning), elsewhere PyTorch in tiles
    that stay in the cache. Addresses and row strides that are multiples of 16 elements let a GPU load 16 bytes
    at a time. Not differentiable.

    Args:
        payloads: (n, m), n >= 1, fp32, bf16 or fp16; each row contiguous, rows at least m elements apart.
        scale: multiplies the sum once, as fp32; 1/n makes a mean.
        out: (m,), fp32, bf16 or fp16, contiguous, on the same device, sharing no memory with the payloads.

    Raises:
        ValueError: a dtype, shape, stride, device or scale other than these.
    """
    scale = _checked_scale(scale)
    _check(payloads, out)
    if out.numel() == 0:
        return out
    if out.device.type == "cuda" and triton_is_installed():
        launch(payloads, scale, out)
        return out
    if out.device.type == "cuda":
        warnings.warn(
            "cast_reduce: Triton is not installed, so PyTorch reduces GPU tensors: same result, several times "
            "slower; pip install 'thinwire[triton]' brings it",
            RuntimeWarning,
            stacklevel=2,
        )
    _reduce_in_tiles(payloads, scale, out, _CPU_TILE if out.device.type == "cpu" else _GPU_TILE)
    return out


def cast_reduce_reference(payloads: Tensor, *, scale: float = 1.0, dtype: torch.dtype) -> Tensor:
    """The definition of `cast_reduce`: (n, m) payloads to a new (m,) tensor of the given dtype."""
    total = payloads[0].to(torch.float32)
    for payload in payloads[1:]:
        total = total + payload.to(torch.float32)
    return (total * _checked_scale(scale)).to(dtype)


@triton_kernel(warps=8, varying=("m",))
def kernel(
    payloads: tl.tensor,
    out: tl.tensor,
    scale: tl.float32,
    m: tl.int64,
    row_stride: tl.int64,
    N: tl.constexpr,
    UNROLLED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    row = payloads + start
    out += start
    # Two copies of one loop: without a mask the compiler can load 16 bytes at a time whatever m is.
    if start + BLOCK <= m:
        total = tl.load(row + lane, eviction_policy="evict_first").to(tl.float32)
        for _ in tl.static_range(1, UNROLLED):
            row += row_stride
            total += tl.load(row + lane, eviction_policy="evict_first").to(tl.float32)
        for _ in range(UNROLLED, N):
            row += row_stride
            total += tl.load(row + lane, eviction_policy="evict_first").to(tl.float32)
        tl.store(out + lane, (total * scale).to(out.dtype.element_ty))
    else:
        inside = lane < m - start
        total = tl.load(row + lane, mask=inside).to(tl.float32)
        for _ in range(1, N):
            row += row_stride
            total += tl.load(row + lane, mask=inside).to(tl.float32)
        tl.store(out + lane, (total * scale).to(out.dtype.element_ty), mask=inside)


def compile_time(n: int) -> dict[str, int]:
    """The kernel's constants for n payloads: up to 16 loads are laid out one by one, more take turns in a loop."""
    return {"N": n, "UNROLLED": min(n, 16), "BLOCK": BLOCK}


def launch(payloads: Tensor, scale: float, out: Tensor) -> None:
    """Run the Triton kernel on checked, non-empty arguments; compiles once per n, dtypes and alignment."""
    n, m = payloads.shape
    programs = -(-m // BLOCK)
    kernel.launch(programs, out.device, payloads, out, scale, m, payloads.stride(0), **compile_time(n))


@torch.no_grad()
def _reduce_in_tiles(payloads: Tensor, scale: float, out: Tensor, tile: int) -> None:
    m = out.numel()
    in_place = out.dtype == torch.float32  # then the output itself is the accumulator
    scratch = out if in_place else torch.empty(min(m, tile), dtype=torch.float32, device=out.device)
    for start in range(0, m, tile):
        stop = min(start + tile, m)
        total = out[start:stop] if in_place else scratch[: stop - start]
        first, *others = payloads[:, start:stop]
        if others and first.dtype == torch.float32:
            torch.add(first, others.pop(0), out=total)
        else:
            total.copy_(first)
        for payload in others:
            total.add_(payload)
        if scale != 1.0:
            total.mul_(scale)
        if not in_place:
            out[start:stop].copy_(total)


def _checked_scale(scale: float) -> float:
    rounded = ctypes.c_float(scale).value
    if not math.isfinite(rounded):
        raise ValueError(f"cast_reduce: scale is {scale}; it must be a finite fp32 number")
    return rounded


def _check(payloads: Tensor, out: Tensor) -> None:
    for name, tensor in (("payloads", payloads), ("out", out)):
        if tensor.dtype not in DTYPES:
            raise ValueError(f"cast_reduce: {name} has dtype {tensor.dtype}; it must be fp32, bf16 or fp16")
    if payloads.dim() != 2 or payloads.shape[0] == 0:
        raise ValueError(f"cast_reduce: payloads has shape {tuple(payloads.shape)}; it must be (n, m) with n >= 1")
    n, m = payloads.shape
    if out.shape != (m,):
        raise ValueError(
            f"cast_reduce: out has shape {tuple(out.shape)}; for payloads of shape {(n, m)} it must be ({m},)"
        )
    if payloads.device != out.device:
        raise ValueError(f"cast_reduce: payloads is on {payloads.device} but out is on {out.device}; use one device")
    if m > 1 and payloads.stride(1) != 1:
        raise ValueError(
            f"cast_reduce: payloads has stride {payloads.stride(1)} within a row; it must be 1: "
            "call .contiguous() first"
        )
    if n > 1 and payloads.stride(0) < m:
        raise ValueError(
            f"cast_reduce: payloads has rows of {m} elements with stride {payloads.stride(0)}, so they overlap; "
            "call .contiguous() first"
        )
    if m > 1 and out.stride(0) != 1:
        raise ValueError(f"cast_reduce: out has stride {out.stride(0)}; it must be contiguous")
    if m > 0 and _overlaps(payloads, out):
        raise ValueError("cast_reduce: out shares memory with payloads; give it memory of its own")


def _overlaps(payloads: Tensor, out: Tensor) -> bool:
    n, m = payloads.shape
    row_bytes = m * payloads.element_size()
    pitch_bytes = max(payloads.stride(0), m) * payloads.element_size()
    offset = out.data_ptr() - payloads.data_ptr()
    first_row_ending_after = max(0, (offset - row_bytes) // pitch_bytes + 1)
    starts_before = first_row_ending_after * pitch_bytes < offset + m * out.element_size()
    return first_row_ending_after < n and starts_before
