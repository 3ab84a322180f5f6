"""Add random directions to weights in GPU memory: one read and one write of the weights, however many directions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from thinwire.kernels.counter_random import signed
from thinwire.kernels.philox import Distribution, triton_philox
from thinwire.kernels.triton_kernel import triton_kernel

if TYPE_CHECKING:
    import triton.language as tl

BLOCK = 2048  # elements per program
# Directions at a time: with the 16 blocks of a program they make one counter for each of its 128 lanes, which hand
# their words on through shared memory. So an element and direction take 3.7 instructions of sm_90; they would take 18
# if all lanes that need a word made it.
SEEDS = 8


@triton_kernel(warps=4, varying=("d", "first_block", "directions", "tensor", "key"))
def kernel(
    weights: tl.tensor,
    out: tl.tensor,
    coefficients: tl.tensor,
    places: tl.tensor,
    mask: tl.tensor,
    peak: tl.tensor,
    key: tl.int64,
    tensor: tl.int32,
    directions: tl.int32,
    first_block: tl.int64,
    head: tl.int32,
    d: tl.int64,
    scale: tl.float32,
    unit: tl.float32,
    SEEDS: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    tile = tl.program_id(0).to(tl.int64)
    k0 = key.to(tl.uint32)
    k1 = (key >> 32).to(tl.uint32)
    c1 = tensor.to(tl.uint32)
    lane = tl.arange(0, BLOCK)
    # Sums wrap around, which is exact as long as the result, not each part of it, is within int32.
    if GAUSSIAN:
        total = tl.zeros((BLOCK,), tl.int32)
        block = (first_block * 32 + tile * (BLOCK // 4)).to(tl.uint32) + tl.arange(0, BLOCK // 4).to(tl.uint32)
        for s in range(directions):
            c2 = tl.load(places + 2 * s).to(tl.uint32)
            c3 = tl.load(places + 2 * s + 1).to(tl.uint32)
            w0, w1, w2, w3 = triton_philox(block, c1, c2, c3, k0, k1)
            word = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(BLOCK)
            word -= (word >> 1) & 0x55555555
            word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
            word = (word + (word >> 4)) & 0x0F0F0F0F
            ones = ((word * 0x01010101) >> 24).to(tl.int32)
            total += tl.load(coefficients + s) * (ones - 16)
    else:
        # A sign is 2 bit - 1, so twice the sum of the coefficients whose bits are set, less the sum of all.
        chosen = tl.zeros((BLOCK // 32, 32), tl.int32)
        every = tl.zeros((SEEDS,), tl.int32)
        block = (first_block + tile * (BLOCK // 128)).to(tl.uint32) + tl.arange(0, BLOCK // 128).to(tl.uint32)
        bit = (1 << tl.arange(0, 32).to(tl.uint32))[None, None, :]
        for start in range(0, directions, SEEDS):
            s = start + tl.arange(0, SEEDS)
            there = s < directions
            coefficient = tl.load(coefficients + s, mask=there, other=0)
            c2 = tl.load(places + 2 * s, mask=there, other=0).to(tl.uint32)[:, None]
            c3 = tl.load(places + 2 * s + 1, mask=there, other=0).to(tl.uint32)[:, None]
            w0, w1, w2, w3 = triton_philox(block[None, :], c1, c2, c3, k0, k1)
            word = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(SEEDS, BLOCK // 32, 1)
            chosen += tl.sum(tl.where((word & bit) != 0, coefficient[:, None, None], 0), axis=0)
            every += coefficient
        total = 2 * chosen.reshape(BLOCK) - tl.sum(every, axis=0)
    if MASKED:
        byte = mask + first_block * 16 + tile * (BLOCK // 8) + (lane >> 3)
        needed = (head + d + 7 - tile * BLOCK) >> 3
        total *= (tl.load(byte, mask=(lane >> 3) < needed, other=0).to(tl.int32) >> (lane & 7)) & 1
    offset = tile * BLOCK - head
    weights += offset
    out += offset
    # Two copies: without a mask the compiler can load 16 bytes at a time.
    if (offset >= 0) & (offset + BLOCK <= d):
        total += (tl.load(weights + lane) * scale).to(tl.int32)
        tl.store(out + lane, (total.to(tl.float32) * unit).to(out.dtype.element_ty))
        highest = tl.max(tl.abs(total).to(tl.uint32, bitcast=True), axis=0).to(tl.int64)
    else:
        inside = (offset + lane >= 0) & (offset + lane < d)
        total += (tl.load(weights + lane, mask=inside, other=0.0) * scale).to(tl.int32)
        tl.store(out + lane, (total.to(tl.float32) * unit).to(out.dtype.element_ty), mask=inside)
        total = tl.where(inside, total, 0)
        highest = tl.max(tl.abs(total).to(tl.uint32, bitcast=True), axis=0).to(tl.int64)
    # The largest is the same in any order. What is read may be old, which costs an atomic operation and no more.
    if highest > tl.load(peak):
        tl.atomic_max(peak, highest)


def compile_time(directions: int, distribution: Distribution, *, masked: bool) -> dict[str, int]:
    """The kernel's constants."""
    gaussian = distribution == "gaussian"
    return {
        "SEEDS": 1 if directions == 1 or gaussian else SEEDS,
        "GAUSSIAN": int(gaussian),
        "MASKED": int(masked),
        "BLOCK": BLOCK,
    }


def launch(
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
    """`lattice_add` of checked arguments, with at least one weight; waits for the GPU to know the peak.

    Compiles once per distribution, dtype of `out`, mask or none, one direction or more, and alignment; 16 bytes are
    loaded at a time where the addresses and `first` are multiples of 16.
    """
    d, head = weights.numel(), first % 128
    peak = torch.zeros(1, dtype=torch.int64, device=weights.device)
    kernel.launch(
        -(-(head + d) // BLOCK),
        weights.device,
        weights,
        out,
        coefficients,
        places,
        peak if mask is None else mask,
        peak,
        signed(key),
        tensor,
        len(coefficients),
        first // 128,
        head,
        d,
        2.0**exponent,
        2.0**-exponent,
        **compile_time(len(coefficients), distribution, masked=mask is not None),
    )
    return int(peak.item())
