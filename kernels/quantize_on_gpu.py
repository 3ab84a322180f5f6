"""Triton kernels that quantise blocks, and that sum what was quantised: one pass, every operation rounded by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from thinwire.kernels.counter_random import signed, stir, triton_dither
from thinwire.kernels.triton_kernel import triton_kernel, triton_part

if TYPE_CHECKING:
    import triton.language as tl


def quantize_constants(bits: int, block: int, *, stochastic: bool = False, feedback: bool = False) -> dict[str, int]:
    """The compile-time arguments of quantize_kernel."""
    return {**_shared(bits, block, 2048, stochastic), "FEEDBACK": int(feedback)}


def reduce_constants(
    bits: int, block: int, n: int, *, stochastic: bool = False, requantize: bool = False
) -> dict[str, int]:
    """The compile-time arguments of reduce_kernel: the first 4 payloads are laid out one by one, more in a loop."""
    # Of smaller codes a tile of 4096 takes so many registers that few programs run at once.
    constants = _shared(bits, block, 4096 if bits == 8 else 2048, stochastic)
    return {**constants, "N": n, "UNROLLED": min(n, 4), "REQUANTIZE": int(requantize)}


def _shared(bits: int, block: int, tile: int, stochastic: bool) -> dict[str, int]:
    """Elements per scale and per program, the depth of the tree that sums a block, and the way of rounding."""
    return {
        "BITS": bits,
        "GROUP": block,
        "TILE": max(tile, block),
        "TREE": block.bit_length() - 1,
        "STOCHASTIC": int(stochastic),
    }


@triton_part
def triton_packed(codes: tl.tensor, BITS: tl.constexpr, TILE: tl.constexpr) -> tl.tensor:
    """Codes in blocks, int32, as bytes (TILE BITS / 8,): two's complement, the first in the low bits."""
    PER_BYTE: tl.constexpr = 8 // BITS
    fields = tl.reshape(codes, (TILE // PER_BYTE, PER_BYTE)) & ((1 << BITS) - 1)
    return tl.sum(fields << (tl.arange(0, PER_BYTE) * BITS)[None, :], axis=1).to(tl.uint8)


@triton_part
def triton_decoded(
    codes: tl.tensor,
    scales: tl.tensor,
    left: tl.tensor,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    WHOLE: tl.constexpr,
) -> tl.tensor:
    """What the planes that begin at these addresses say about `left` elements, of which WHOLE tiles have enough."""
    PER_BYTE: tl.constexpr = 8 // BITS
    ROWS: tl.constexpr = TILE // GROUP
    byte, row = tl.arange(0, TILE // PER_BYTE), tl.arange(0, ROWS)
    if WHOLE:
        raw = tl.load(codes + byte, eviction_policy="evict_first")
        scale = tl.load(scales + row)
    else:
        raw = tl.load(codes + byte, mask=byte * PER_BYTE < left, other=0)
        scale = tl.load(scales + row, mask=row * GROUP < left, other=0)
    if BITS == 8:
        code = raw.to(tl.int8, bitcast=True).to(tl.int32)
    else:
        field = (raw.to(tl.int32)[:, None] >> (tl.arange(0, PER_BYTE) * BITS)[None, :]) & ((1 << BITS) - 1)
        code = 2 * field - 1 if BITS == 1 else (field ^ (1 << (BITS - 1))) - (1 << (BITS - 1))
    return tl.reshape(code, (ROWS, GROUP)).to(tl.float32) * scale[:, None]


@triton_part
def triton_sum(
    codes: tl.tensor,
    scales: tl.tensor,
    left: tl.tensor,
    codes_stride: tl.tensor,
    scales_stride: tl.tensor,
    N: tl.constexpr,
    UNROLLED: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    WHOLE: tl.constexpr,
) -> tl.tensor:
    total = triton_decoded(codes, scales, left, BITS, GROUP, TILE, WHOLE)
    for _ in tl.static_range(1, UNROLLED):
        codes += codes_stride
        scales += scales_stride
        total += triton_decoded(codes, scales, left, BITS, GROUP, TILE, WHOLE)
    for _ in range(UNROLLED, N):
        codes += codes_stride
        scales += scales_stride
        total += triton_decoded(codes, scales, left, BITS, GROUP, TILE, WHOLE)
    return total


@triton_part
def triton_rounded(
    x: tl.tensor,
    lane: tl.tensor,
    stirred: tl.tensor,
    place: tl.tensor,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Codes, int32, scales and what they decode to, of blocks of x."""
    LEVELS: tl.constexpr = (1 << (BITS - 1)) - 1
    # The order of the bits of magnitudes is that of the magnitudes, with NaN, which a maximum of floats drops, on top.
    largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1).to(tl.float32, bitcast=True)
    zero = largest < 7.888609052210118e-31  # 2^-100
    levels = tl.full((TILE // GROUP,), LEVELS, tl.float32)
    inverse = tl.where(zero, 0.0, tl.div_rn(levels, tl.where(zero, 1.0, largest)))
    scale = tl.where(zero, 0.0, largest * (1.0 / LEVELS))
    values = x * inverse[:, None]
    if STOCHASTIC:
        values += triton_dither(stirred, place, lane)
    values += 12582912.0  # 1.5 2^23: fp32 numbers around it are whole, and their low bits are the codes
    if STOCHASTIC:
        values = tl.minimum(tl.maximum(values, 12582912.0 - LEVELS), 12582912.0 + LEVELS)
    return values.to(tl.int32, bitcast=True), scale, (values - 12582912.0) * scale[:, None]


@triton_part
def _signs(
    x: tl.tensor, lane: tl.tensor, left: tl.tensor, GROUP: tl.constexpr, LEVELS: tl.constexpr, TILE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Bits, int32, mean magnitudes and what they decode to, of blocks of x; GROUP is 2^LEVELS."""
    ROWS: tl.constexpr = TILE // GROUP
    total = tl.abs(x)
    for level in tl.static_range(LEVELS):
        total = tl.sum(tl.reshape(total, (ROWS, 2, GROUP >> (level + 1))), axis=1)
    count = tl.minimum(tl.maximum(tl.minimum(left, TILE).to(tl.int32) - tl.arange(0, ROWS) * GROUP, 1), GROUP)
    scale = tl.div_rn(tl.reshape(total, (ROWS,)), count.to(tl.float32))
    positive = x >= 0
    return (positive & (lane < left)).to(tl.int32), scale, tl.where(positive, scale[:, None], -scale[:, None])


@triton_kernel(warps=8, varying=("numel", "stirred", "offset"))
def quantize_kernel(
    x: tl.tensor,
    memory: tl.tensor,
    next_memory: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    numel: tl.int64,
    stirred: tl.int64,
    offset: tl.int64,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    TREE: tl.constexpr,
    FEEDBACK: tl.constexpr,
    STOCHASTIC: tl.constexpr,
) -> None:
    start = tl.program_id(0).to(tl.int64) * TILE
    left = numel - start
    row, byte = tl.arange(0, TILE // GROUP), tl.arange(0, TILE * BITS // 8)
    lane = row[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x += start
    codes += start // 8 * BITS
    scales += start // GROUP
    # Two copies of what touches the memory: without a mask the compiler can move 16 bytes at a time whatever numel is.
    if left >= TILE:
        total = tl.load(x + lane, eviction_policy="evict_first")
        if FEEDBACK:
            total += tl.load(memory + start + lane, eviction_policy="evict_first")
    else:
        total = tl.load(x + lane, mask=lane < left, other=0)
        if FEEDBACK:
            total += tl.load(memory + start + lane, mask=lane < left, other=0)
    if BITS == 1:
        code, scale, decoded = _signs(total, lane, left, GROUP, TREE, TILE)
    else:
        code, scale, decoded = triton_rounded(total, lane, stirred, offset + start, BITS, GROUP, TILE, STOCHASTIC)
    packed = triton_packed(code, BITS, TILE)
    if left >= TILE:
        tl.store(codes + byte, packed)
        tl.store(scales + row, scale)
        if FEEDBACK:
            tl.store(next_memory + start + lane, total - decoded)
    else:
        tl.store(codes + byte, packed, mask=byte * (8 // BITS) < left)
        tl.store(scales + row, scale, mask=row * GROUP < left)
        if FEEDBACK:
            tl.store(next_memory + start + lane, total - decoded, mask=lane < left)


@triton_kernel(warps=8, varying=("numel", "stirred", "offset"))
def reduce_kernel(
    codes: tl.tensor,
    scales: tl.tensor,
    out: tl.tensor,
    out_scales: tl.tensor,
    factor: tl.float32,
    numel: tl.int64,
    codes_stride: tl.int64,
    scales_stride: tl.int64,
    stirred: tl.int64,
    offset: tl.int64,
    N: tl.constexpr,
    UNROLLED: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    TREE: tl.constexpr,
    REQUANTIZE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
) -> None:
    start = tl.program_id(0).to(tl.int64) * TILE
    left = numel - start
    row, byte = tl.arange(0, TILE // GROUP), tl.arange(0, TILE * BITS // 8)
    lane = row[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    codes += start // 8 * BITS
    scales += start // GROUP
    if left >= TILE:
        total = triton_sum(codes, scales, left, codes_stride, scales_stride, N, UNROLLED, BITS, GROUP, TILE, True)
    else:
        total = triton_sum(codes, scales, left, codes_stride, scales_stride, N, UNROLLED, BITS, GROUP, TILE, False)
    total *= factor
    if REQUANTIZE:
        out += start // 8 * BITS
        out_scales += start // GROUP
        if BITS == 1:
            # Behind the last element a sum of signs is not zero.
            code, scale, _ = _signs(tl.where(lane < left, total, 0.0), lane, left, GROUP, TREE, TILE)
        else:
            code, scale, _ = triton_rounded(total, lane, stirred, offset + start, BITS, GROUP, TILE, STOCHASTIC)
        packed = triton_packed(code, BITS, TILE)
        if left >= TILE:
            tl.store(out + byte, packed)
            tl.store(out_scales + row, scale)
        else:
            tl.store(out + byte, packed, mask=byte * (8 // BITS) < left)
            tl.store(out_scales + row, scale, mask=row * GROUP < left)
    elif left >= TILE:
        tl.store(out + start + lane, total)
    else:
        tl.store(out + start + lane, total, mask=lane < left)


def launch_quantize(
    x: Tensor,
    feedback: tuple[Tensor, Tensor] | None,
    codes: Tensor,
    scales: Tensor,
    *,
    bits: int,
    block: int,
    stochastic: bool = False,
    key: int = 0,
    offset: int = 0,
) -> None:
    """Quantise checked, non-empty x, or x and the first of `feedback`, leaving the error in the second."""
    constants = quantize_constants(bits, block, stochastic=stochastic, feedback=feedback is not None)
    memory, next_memory = feedback or (x, x)
    quantize_kernel.launch(
        -(-x.numel() // constants["TILE"]),
        x.device,
        x,
        memory,
        next_memory,
        codes,
        scales,
        x.numel(),
        signed(stir(key)),
        offset,
        **constants,
    )


def launch_reduce(
    codes: Tensor,
    scales: Tensor,
    out: Tensor,
    out_scales: Tensor | None,
    *,
    numel: int,
    factor: float,
    bits: int,
    block: int,
    stochastic: bool = False,
    key: int = 0,
    offset: int = 0,
) -> None:
    """Sum checked, non-empty planes of (n, ...) into fp32 `out`, or, given out_scales, quantised into both planes."""
    constants = reduce_constants(bits, block, len(codes), stochastic=stochastic, requantize=out_scales is not None)
    reduce_kernel.launch(
        -(-numel // constants["TILE"]),
        out.device,
        codes,
        scales,
        out,
        out if out_scales is None else out_scales,
        factor,
        numel,
        codes.stride(0),
        scales.stride(0),
        signed(stir(key)),
        offset,
        **constants,
    )
