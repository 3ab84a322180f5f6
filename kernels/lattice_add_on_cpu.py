"""Add random directions to weights in CPU memory: compiled by numba, one pass over the weights, on several threads.

What numba has compiled, which takes it some seconds, it keeps beside this file or in the user's cache.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, TypeVar

import torch
from numpy import float32, int32, int64, uint8, uint16, uint32, uint64
from numpy.typing import NDArray
from torch import Tensor

from thinwire.kernels.philox import MULTIPLIERS, ROUNDS, WEYL, Distribution

carray: Any = None  # numba's, as soon as there is something to compile

TILE = 4096  # elements: their sums and their weights stay in the first level of the cache
SEEDS = 4  # directions that are added to a sum while it is in a register
_PART = 1 << 20  # elements times (directions + 4) that are worth a thread: a tenth of a millisecond
_FP16_TILE = 1 << 15  # PyTorch rounds so many on the calling thread

_M0, _M1 = (uint64(multiplier) for multiplier in MULTIPLIERS)
_W0, _W1 = (uint32(weyl) for weyl in WEYL)

Function = TypeVar("Function", bound=Callable[..., Any])
_loops: list[Callable[..., Any]] = []
_compiling = threading.Lock()


def _loop(function: Function) -> Function:
    """Mark a function that _compiled() makes numba's, for the others; LLVM turns its loops into vector instructions."""
    _loops.append(function)
    return function


@_loop
def _words(
    words: NDArray[uint32], count: int, block: int, tensor: int, place: NDArray[int64], k0: uint32, k1: uint32
) -> None:
    """words[r, i] = word r of block + i: `philox` for many blocks side by side."""
    low32, half = uint64(0xFFFFFFFF), uint64(32)
    c2, c3 = uint64(place[0]), uint64(place[1])
    for i in range(count):
        # Variables of 64 bits whose upper halves are left dirty: the vector multiplication ignores them.
        a, b, c, d = uint64(block + i), uint64(tensor), c2, c3
        x, y = k0, k1
        for _ in range(ROUNDS):
            low, high = (a & low32) * _M0, (c & low32) * _M1
            a, b = (high >> half) ^ b ^ uint64(x), high
            c, d = (low >> half) ^ d ^ uint64(y), low
            x, y = uint32(x + _W0), uint32(y + _W1)
        words[0, i], words[1, i], words[2, i], words[3, i] = uint32(a), uint32(b), uint32(c), uint32(d)


@_loop
def _set_signs(sums: NDArray[int32], words: NDArray[uint32], unset: int32, is_set: int32, blocks: int) -> None:
    """Make each sum `is_set` or `unset`, as its bit in the words is."""
    one = uint32(1)
    for b in range(blocks):
        w0, w1, w2, w3 = words[0, b], words[1, b], words[2, b], words[3, b]
        start = 128 * b
        for j in range(32):  # four words at once: a shorter loop LLVM lays out bit by bit
            bit = one << uint32(j)
            sums[start + j] = is_set if w0 & bit else unset
            sums[start + 32 + j] = is_set if w1 & bit else unset
            sums[start + 64 + j] = is_set if w2 & bit else unset
            sums[start + 96 + j] = is_set if w3 & bit else unset


@_loop
def _add_signs(
    sums: NDArray[int32], words: NDArray[uint32], q0: int32, q1: int32, q2: int32, q3: int32, blocks: int
) -> None:
    """Add q0 to each sum whose bit in words[0] is set, and so on for four directions at once; sums wrap around."""
    zero, one = int32(0), uint32(1)
    for b in range(blocks):
        for r in range(4):
            w0, w1, w2, w3 = words[0, r, b], words[1, r, b], words[2, r, b], words[3, r, b]
            start = 128 * b + 32 * r
            # LLVM makes a word of bits a mask of lanes, so this is one masked addition per direction and vector.
            for j in range(32):
                bit = one << uint32(j)
                total = sums[start + j]
                total += q0 if w0 & bit else zero
                total += q1 if w1 & bit else zero
                total += q2 if w2 & bit else zero
                total += q3 if w3 & bit else zero
                sums[start + j] = total


@_loop
def _centred_ones(word: uint32) -> int32:
    word = uint32(word - (word >> uint32(1) & uint32(0x55555555)))
    word = uint32((word & uint32(0x33333333)) + (word >> uint32(2) & uint32(0x33333333)))
    word = uint32(word + (word >> uint32(4)) & uint32(0x0F0F0F0F))
    return int32(uint32(word * uint32(0x01010101)) >> uint32(24)) - int32(16)


@_loop
def _add_ones(sums: NDArray[int32], words: NDArray[uint32], coefficient: int, blocks: int) -> None:
    for b in range(blocks):
        start = 4 * b
        sums[start] += int32(coefficient * _centred_ones(words[0, b]))
        sums[start + 1] += int32(coefficient * _centred_ones(words[1, b]))
        sums[start + 2] += int32(coefficient * _centred_ones(words[2, b]))
        sums[start + 3] += int32(coefficient * _centred_ones(words[3, b]))


@_loop
def _keep(sums: NDArray[int32], mask: NDArray[uint8], count: int) -> None:
    """Zero the sums of the elements that do not move."""
    for byte in range((count + 7) >> 3):
        bits = int32(mask[byte])
        for j in range(8):
            sums[8 * byte + j] &= -(bits >> int32(j) & int32(1))


@_loop
def _add_weights(sums: NDArray[int32], weights: NDArray[float32], scale: float) -> int64:
    peak = uint32(0)
    for i in range(weights.size):
        total = int32(int32(weights[i] * scale) + sums[i])
        peak = max(peak, uint32(total if total >= 0 else -total))
        sums[i] = total
    return int64(peak)


@_loop
def _write(out: NDArray[float32], sums: NDArray[int32], unit: float) -> None:
    for i in range(out.size):
        out[i] = float32(sums[i]) * unit


@_loop
def _round(out: NDArray[uint16], bits: NDArray[uint32]) -> None:
    """bf16 numbers next to the fp32 numbers with these bits, ties to even; they are finite."""
    for i in range(out.size):
        odd = bits[i] >> uint32(16) & uint32(1)
        out[i] = uint16(uint32(bits[i] + uint32(0x7FFF) + odd) >> uint32(16))


@_loop
def _sum_of_signs(
    sums: NDArray[int32],
    words: NDArray[uint32],
    coefficients: NDArray[int32],
    places: NDArray[int64],
    tensor: int,
    k0: uint32,
    k1: uint32,
    block: int,
    blocks: int,
) -> None:
    # A sign is 2 bit - 1, so what is added is twice the coefficient where the bit is set, and its opposite everywhere.
    directions, base = coefficients.size, int32(0)
    for s in range(directions):
        base -= coefficients[s]
    alone = directions % SEEDS == 1  # what perturbs has one direction, and nothing to add it to
    if alone:
        _words(words[0], blocks, block, tensor, places[0], k0, k1)
        _set_signs(sums, words[0], int32(base), int32(base + (coefficients[0] << 1)), blocks)
    else:
        for i in range(128 * blocks):
            sums[i] = base
    for start in range(alone, directions, SEEDS):
        q0, q1, q2, q3 = int32(0), int32(0), int32(0), int32(0)
        these = min(SEEDS, directions - start)
        for s in range(these):
            _words(words[SEEDS - these + s], blocks, block, tensor, places[start + s], k0, k1)
            q0, q1, q2, q3 = q1, q2, q3, int32(coefficients[start + s] << 1)
        _add_signs(sums, words, q0, q1, q2, q3, blocks)


@_loop
def _sum_of_ones(
    sums: NDArray[int32],
    words: NDArray[uint32],
    coefficients: NDArray[int32],
    places: NDArray[int64],
    tensor: int,
    k0: uint32,
    k1: uint32,
    block: int,
    blocks: int,
) -> None:
    for i in range(4 * blocks):
        sums[i] = 0
    for s in range(coefficients.size):
        _words(words, blocks, block, tensor, places[s], k0, k1)
        _add_ones(sums, words, coefficients[s], blocks)


def _run(
    weights_at: Any,
    out_at: Any,
    mask_at: Any,
    coefficients_at: Any,
    places_at: Any,
    scratch_at: Any,
    d: int,
    first: int,
    directions: int,
    tensor: int,
    k0: uint32,
    k1: uint32,
    scale: float,
    unit: float,
    gaussian: bool,
    masked: bool,
    rounded: bool,
) -> int64:
    """One thread's share. All arguments are addresses and numbers, so that one variant is compiled."""
    weights = carray(weights_at, d, float32)
    out, out16 = carray(out_at, d, float32), carray(out_at, d, uint16)
    mask = carray(mask_at, (first + d + 7) >> 3, uint8)
    coefficients = carray(coefficients_at, directions, int32)
    places = carray(places_at, (directions, 2), int64)
    scratch = carray(scratch_at, (3, TILE), uint32)
    sums, real = scratch[0].view(int32), scratch[1].view(float32)
    words = scratch[2].reshape(4, TILE // 4)
    words_of_signs = scratch[2][: SEEDS * TILE // 32].reshape(SEEDS, 4, TILE // 128)
    peak = int64(0)
    done = 0
    while done < d:
        start = (first + done) & ~127  # the first tile starts where the block of its first element does
        before = first + done - start
        n = min(TILE - before, d - done)
        if gaussian:
            _sum_of_ones(sums, words, coefficients, places, tensor, k0, k1, start >> 2, (before + n + 3) >> 2)
        else:
            blocks = (before + n + 127) >> 7
            _sum_of_signs(sums, words_of_signs, coefficients, places, tensor, k0, k1, start >> 7, blocks)
        if masked:
            _keep(sums, mask[start >> 3 :], before + n)
        these = sums[before : before + n]
        peak = max(peak, _add_weights(these, weights[done : done + n], scale))
        # A second loop, because the compiler must suppose that a loop over both the weights and the output, which may
        # be one, cannot be done in vectors.
        if rounded:
            _write(real[:n], these, unit)
            _round(out16[done : done + n], scratch[1])
        else:
            _write(out[done : done + n], these, unit)
        done += n
    return peak


def _compiled() -> Callable[..., int]:
    """The machine code of _run, called through ctypes: a few microseconds, and other Python threads run meanwhile."""
    with _compiling:
        return _compile()[0]


@functools.cache
def _compile() -> tuple[Callable[..., int], Any]:
    """The function, and what must not be thrown away as long as it may be called."""
    import numba
    from numba import types

    globals()["carray"] = vars(numba)["carray"]
    for function in _loops:
        globals()[function.__name__] = numba.njit(nogil=True, error_model="numpy")(function)
    address, count, word, real, flag = types.voidptr, types.int64, types.uint32, types.float32, types.boolean
    arguments = [*[address] * 6, *[count] * 4, word, word, real, real, *[flag] * 3]
    try:
        compiled = numba.cfunc(types.int64(*arguments), cache=True)(_run)
    except RuntimeError:  # no folder that may be written to: compiled in each process
        compiled = numba.cfunc(types.int64(*arguments))(_run)
    return compiled.ctypes, compiled


def add_on_cpu(
    weights: Tensor,
    coefficients: Tensor,
    places: Tensor,
    *,
    key: int,
    tensor: int,
    exponent: int,
    first: int,
    distribution: Distribution,
    mask: Tensor | None,
    out: Tensor,
) -> int:
    """`lattice_add` of checked arguments, with at least one weight."""
    run, d, directions = _compiled(), weights.numel(), coefficients.numel()
    out = out.detach()  # the other threads record gradients, whatever this one does

    def add(start: int, stop: int, target: Tensor) -> int:
        scratch = torch.empty(3 * TILE, dtype=torch.int32)
        return run(
            weights.data_ptr() + 4 * start,
            target.data_ptr(),
            0 if mask is None else mask.data_ptr(),
            coefficients.data_ptr(),
            places.data_ptr(),
            scratch.data_ptr(),
            stop - start,
            first + start,
            directions,
            tensor,
            key & 0xFFFFFFFF,
            key >> 32,
            2.0**exponent,
            2.0**-exponent,
            distribution == "gaussian",
            mask is not None,
            out.dtype == torch.bfloat16,
        )

    def part(start: int, stop: int) -> int:
        if out.dtype != torch.float16:
            return add(start, stop, out[start:stop])
        peak, real = 0, torch.empty(min(_FP16_TILE, stop - start))
        for begin in range(start, stop, _FP16_TILE):
            end = min(begin + _FP16_TILE, stop)
            peak = max(peak, add(begin, end, real))
            out[begin:end].copy_(real[: end - begin])
        return peak

    parts = min(torch.get_num_threads(), 1 + d * (directions + 4) // _PART)
    if parts == 1:
        return part(0, d)
    edges = _edges(d, first, parts)
    others = [_threads(os.getpid()).submit(part, *pair) for pair in pairwise(edges[1:])]
    return max([part(edges[0], edges[1]), *(other.result() for other in others)])


def _edges(d: int, first: int, parts: int) -> list[int]:
    """Where to cut d elements into so many parts or fewer: between tiles of the whole tensor."""
    between = {(first + d * i // parts) // TILE * TILE - first for i in range(1, parts)}
    return [0, *sorted(edge for edge in between if edge > 0), d]


@functools.cache
def _threads(process: int) -> ThreadPoolExecutor:
    """The threads of a process: those of the process that it was forked from are not there."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="lattice_add")
