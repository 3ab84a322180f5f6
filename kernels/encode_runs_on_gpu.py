"""The Triton kernel that quantises runs of values, gathered from where they are, straight into payloads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from thinwire.kernels.block_payload import TILE_COLUMNS, BlockFormat, Runs
from thinwire.kernels.counter_random import signed, stir
from thinwire.kernels.hadamard import triton_hadamard
from thinwire.kernels.quantize_on_gpu import triton_packed, triton_rounded
from thinwire.kernels.triton_kernel import triton_kernel, triton_part

if TYPE_CHECKING:
    import triton.language as tl


def encode_constants(
    form: BlockFormat, *, stochastic: bool = False, feedback: bool = False, difference: bool = False
) -> dict[str, int]:
    """The compile-time arguments of encode_kernel."""
    return {
        "COLUMNS": TILE_COLUMNS,
        "BITS": form.bits,
        "GROUP": form.block,
        "TILE": max(2048, form.block),
        "SMOOTH": int(form.smooth),
        "FEEDBACK": int(feedback),
        "DIFFERENCE": int(difference),
        "STOCHASTIC": int(stochastic),
    }


@triton_part
def triton_store_run(
    x: tl.tensor,
    payload: tl.tensor,
    scales: tl.tensor,
    place: tl.tensor,
    left: tl.tensor,
    codes_at: tl.tensor,
    scales_at: tl.tensor,
    stirred: tl.tensor,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    SMOOTH: tl.constexpr,
    STOCHASTIC: tl.constexpr,
) -> tl.tensor:
    """Write a tile of a run, zero behind its `left` values, with the padding of the planes; returns what it says."""
    ROWS: tl.constexpr = TILE // GROUP
    UNIT: tl.constexpr = 32 if SMOOTH else 128 // BITS  # as many codes are made together, or fill 16 bytes
    row, byte = tl.arange(0, ROWS), tl.arange(0, TILE * BITS // 8)
    lane = row[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    if SMOOTH:
        x = tl.reshape(triton_hadamard(tl.reshape(x, (TILE,)), TILE), (ROWS, GROUP))
    code, scale, decoded = triton_rounded(x, lane, stirred, place, BITS, GROUP, TILE, STOCHASTIC)
    packed = triton_packed(code, BITS, TILE)
    codes = payload + tl.multiple_of(codes_at, 16) + byte
    if left >= TILE:
        tl.store(codes, packed)
        tl.store(scales + scales_at + row, scale)
    else:
        tl.store(codes, packed, mask=byte * (8 // BITS) < (left + UNIT - 1) // UNIT * UNIT)
        tl.store(scales + scales_at + row, scale, mask=row * GROUP < left)
    if left <= TILE:
        end = scales_at + (left + GROUP - 1) // GROUP
        pad = tl.arange(0, 4)
        tl.store(scales + end + pad, tl.zeros((4,), tl.float32), mask=(end % 4 != 0) & (end % 4 + pad < 4))
    if SMOOTH:
        decoded = tl.reshape(triton_hadamard(tl.reshape(decoded, (TILE,)), TILE), (ROWS, GROUP)) * 0.03125
    return decoded


@triton_kernel(warps=8, varying=("stirred",))
def encode_kernel(
    source: tl.tensor,
    other: tl.tensor,
    payload: tl.tensor,
    scales: tl.tensor,
    tiles: tl.tensor,
    segments: tl.tensor,
    stirred: tl.int64,
    COLUMNS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    SMOOTH: tl.constexpr,
    FEEDBACK: tl.constexpr,
    DIFFERENCE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
) -> None:
    tile = tiles + tl.program_id(0).to(tl.int64) * COLUMNS
    place, left, direct = tl.load(tile), tl.load(tile + 1), tl.load(tile + 4)
    lane = tl.arange(0, TILE // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    # Two copies of what touches the memory: in the first the compiler knows that it can move 16 bytes at a time.
    if direct >= 0:
        x = tl.load(source + tl.multiple_of(direct, 16) + lane, eviction_policy="evict_first").to(tl.float32)
        if FEEDBACK:
            x += tl.load(other + tl.multiple_of(place, 16) + lane, eviction_policy="evict_first")
        if DIFFERENCE:
            x -= tl.load(other + tl.multiple_of(place, 16) + lane).to(tl.float32)
    else:
        x = tl.zeros((TILE // GROUP, GROUP), tl.float32)
        for segment in range(tl.load(tile + 5), tl.load(tile + 6)):
            begin, end = tl.load(segments + 2 * segment) - place, tl.load(segments + 2 * segment + 2) - place
            inside = (lane >= begin) & (lane < end) & (lane < left)
            read = tl.load(source + (tl.load(segments + 2 * segment + 1) - begin) + lane, mask=inside, other=0)
            x = tl.where(inside, read.to(tl.float32), x)
        if FEEDBACK:
            x += tl.load(other + place + lane, mask=lane < left, other=0)
        if DIFFERENCE:
            x -= tl.load(other + place + lane, mask=lane < left, other=0).to(tl.float32)
    decoded = triton_store_run(
        x,
        payload,
        scales,
        place,
        left,
        tl.load(tile + 2),
        tl.load(tile + 3),
        stirred,
        BITS,
        GROUP,
        TILE,
        SMOOTH,
        STOCHASTIC,
    )
    if FEEDBACK:
        if direct >= 0:
            tl.store(other + tl.multiple_of(place, 16) + lane, x - decoded)
        else:
            tl.store(other + place + lane, x - decoded, mask=lane < left)


def launch_encode(
    source: Tensor,
    runs: Runs,
    form: BlockFormat,
    payload: Tensor,
    *,
    memory: Tensor | None = None,
    old: Tensor | None = None,
    stochastic: bool = False,
    key: int = 0,
) -> None:
    """Encode checked, non-empty runs of a source, plus a memory that gets the error, or minus old values."""
    assert memory is None or old is None
    constants = encode_constants(form, stochastic=stochastic, feedback=memory is not None, difference=old is not None)
    tiles, segments = runs.tables(form, constants["TILE"], source.device)
    other = source if memory is None and old is None else memory if old is None else old
    assert other is not None
    encode_kernel.launch(
        len(tiles),
        source.device,
        source,
        other,
        payload,
        payload.view(torch.float32),
        tiles,
        segments,
        signed(stir(key)),
        **constants,
    )
