"""Triton kernels that sum payloads of block codes: into memory, onto weights, or quantised again into other runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from thinwire.kernels.block_payload import TILE_COLUMNS, BlockFormat, Runs
from thinwire.kernels.counter_random import signed, stir
from thinwire.kernels.encode_runs_on_gpu import triton_store_run
from thinwire.kernels.hadamard import triton_hadamard
from thinwire.kernels.quantize_on_gpu import triton_sum
from thinwire.kernels.triton_kernel import triton_kernel, triton_part

if TYPE_CHECKING:
    import triton.language as tl


def sum_constants(form: BlockFormat, n: int, *, add: bool = False) -> dict[str, int]:
    """The compile-time arguments of sum_kernel."""
    tile = 4096 if form.bits == 8 and not form.smooth else 2048
    return {
        "N": n,
        "UNROLLED": min(n, 4),
        "BITS": form.bits,
        "GROUP": form.block,
        "TILE": max(tile, form.block),
        "SMOOTH": int(form.smooth),
        "ADD": int(add),
    }


def recode_constants(
    form: BlockFormat, into: BlockFormat, n: int, *, stochastic: bool = False, feedback: bool = False
) -> dict[str, int]:
    """The compile-time arguments of recode_kernel."""
    return {
        "N": n,
        "UNROLLED": min(n, 4),
        "COLUMNS": TILE_COLUMNS,
        "BITS": form.bits,
        "GROUP": form.block,
        "SMOOTH": int(form.smooth),
        "INTO_BITS": into.bits,
        "INTO_GROUP": into.block,
        "INTO_SMOOTH": int(into.smooth),
        "TILE": max(2048, form.block, into.block),
        "FEEDBACK": int(feedback),
        "STOCHASTIC": int(stochastic),
    }


@triton_kernel(warps=8, varying=("numel",))
def sum_kernel(
    codes: tl.tensor,
    scales: tl.tensor,
    out: tl.tensor,
    factor: tl.float32,
    numel: tl.int64,
    codes_stride: tl.int64,
    scales_stride: tl.int64,
    N: tl.constexpr,
    UNROLLED: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    SMOOTH: tl.constexpr,
    ADD: tl.constexpr,
) -> None:
    start = tl.program_id(0).to(tl.int64) * TILE
    left = numel - start
    lane = tl.arange(0, TILE // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    codes += start // 8 * BITS
    scales += start // GROUP
    out += start
    if left >= TILE:
        total = triton_sum(codes, scales, left, codes_stride, scales_stride, N, UNROLLED, BITS, GROUP, TILE, True)
    else:
        coded = (left + 31) // 32 * 32 if SMOOTH else left
        total = triton_sum(codes, scales, coded, codes_stride, scales_stride, N, UNROLLED, BITS, GROUP, TILE, False)
    total *= factor
    if SMOOTH:
        total = tl.reshape(triton_hadamard(tl.reshape(total, (TILE,)), TILE), (TILE // GROUP, GROUP)) * 0.03125
    if left >= TILE:
        if ADD:
            total += tl.load(out + lane).to(tl.float32)
        tl.store(out + lane, total.to(out.dtype.element_ty))
    else:
        if ADD:
            total += tl.load(out + lane, mask=lane < left, other=0).to(tl.float32)
        tl.store(out + lane, total.to(out.dtype.element_ty), mask=lane < left)


@triton_part
def triton_gathered(
    codes: tl.tensor,
    scales: tl.tensor,
    place: tl.tensor,
    inside: tl.tensor,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
) -> tl.tensor:
    """What the planes say about values anywhere in them."""
    raw = tl.load(codes + place * BITS // 8, mask=inside, other=0)
    scale = tl.load(scales + place // GROUP, mask=inside, other=0)
    if BITS == 8:
        code = raw.to(tl.int8, bitcast=True).to(tl.int32)
    else:
        field = (raw.to(tl.int32) >> (place % (8 // BITS) * BITS).to(tl.int32)) & ((1 << BITS) - 1)
        code = (field ^ (1 << (BITS - 1))) - (1 << (BITS - 1))
    return code.to(tl.float32) * scale


@triton_kernel(warps=8, varying=("stirred",))
def recode_kernel(
    codes: tl.tensor,
    scales: tl.tensor,
    memory: tl.tensor,
    payload: tl.tensor,
    payload_scales: tl.tensor,
    tiles: tl.tensor,
    factor: tl.float32,
    codes_stride: tl.int64,
    scales_stride: tl.int64,
    stirred: tl.int64,
    N: tl.constexpr,
    UNROLLED: tl.constexpr,
    COLUMNS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SMOOTH: tl.constexpr,
    INTO_BITS: tl.constexpr,
    INTO_GROUP: tl.constexpr,
    INTO_SMOOTH: tl.constexpr,
    TILE: tl.constexpr,
    FEEDBACK: tl.constexpr,
    STOCHASTIC: tl.constexpr,
) -> None:
    tile = tiles + tl.program_id(0).to(tl.int64) * COLUMNS
    place, left = tl.load(tile), tl.load(tile + 1)
    flat = tl.arange(0, TILE)
    is_direct = (left >= TILE) & (place % GROUP == 0)
    # Two copies of what touches the memory: in the first the compiler knows that it can move 16 bytes at a time.
    if is_direct:
        at = tl.multiple_of(place, 32)
        first, of_it = codes + at // 8 * BITS, scales + at // GROUP
        total = triton_sum(first, of_it, left, codes_stride, scales_stride, N, UNROLLED, BITS, GROUP, TILE, True)
        x = tl.reshape(total, (TILE,)) * factor
        if FEEDBACK:
            left_out = tl.load(memory + at + flat, eviction_policy="evict_first")
    else:
        # Where the payloads are smooth, every run begins at a multiple of 32.
        inside = flat < ((left + 31) // 32 * 32 if SMOOTH else left)
        x = triton_gathered(codes, scales, place + flat, inside, BITS, GROUP)
        for _ in range(1, N):
            codes += codes_stride
            scales += scales_stride
            x += triton_gathered(codes, scales, place + flat, inside, BITS, GROUP)
        x *= factor
        if FEEDBACK:
            left_out = tl.load(memory + place + flat, mask=flat < left, other=0)
    if SMOOTH:
        x = tl.where(flat < left, triton_hadamard(x, TILE) * 0.03125, 0.0)
    if FEEDBACK:
        x += left_out
    x = tl.reshape(x, (TILE // INTO_GROUP, INTO_GROUP))
    decoded = triton_store_run(
        x,
        payload,
        payload_scales,
        place,
        left,
        tl.load(tile + 2),
        tl.load(tile + 3),
        stirred,
        INTO_BITS,
        INTO_GROUP,
        TILE,
        INTO_SMOOTH,
        STOCHASTIC,
    )
    if FEEDBACK:
        error = tl.reshape(x - decoded, (TILE,))
        if is_direct:
            tl.store(memory + tl.multiple_of(place, 32) + flat, error)
        else:
            tl.store(memory + place + flat, error, mask=flat < left)


def launch_sum(payloads: Tensor, form: BlockFormat, out: Tensor, *, factor: float, add: bool = False) -> None:
    """out = factor * sum of checked, non-empty payloads (n, ...), or weights `out` += what one payload says."""
    codes, scales = form.planes(payloads, out.numel())
    constants = sum_constants(form, len(payloads), add=add)
    sum_kernel.launch(
        -(-out.numel() // constants["TILE"]),
        out.device,
        codes,
        scales,
        out,
        factor,
        out.numel(),
        codes.stride(0),
        scales.stride(0),
        **constants,
    )


def launch_recode(
    payloads: Tensor,
    form: BlockFormat,
    runs: Runs,
    into: BlockFormat,
    payload: Tensor,
    *,
    factor: float,
    memory: Tensor | None = None,
    stochastic: bool = False,
    key: int = 0,
) -> None:
    """Sum checked, non-empty payloads (n, ...) and encode the sum, plus a memory that gets the error, as runs."""
    codes, scales = form.planes(payloads, runs.numel)
    constants = recode_constants(form, into, len(payloads), stochastic=stochastic, feedback=memory is not None)
    tiles, _ = runs.tables(into, constants["TILE"], payload.device)
    recode_kernel.launch(
        len(tiles),
        payload.device,
        codes,
        scales,
        payload if memory is None else memory,
        payload,
        payload.view(torch.float32),
        tiles,
        factor,
        codes.stride(0),
        scales.stride(0),
        signed(stir(key)),
        **constants,
    )
