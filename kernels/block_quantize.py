"""Quantise to whole numbers of 8, 4 or 2 bits with one scale for each block, plainly or with error feedback."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from thinwire.kernels.code_planes import (
    check_block,
    check_plane,
    codes_bytes,
    decode_reference,
    needs_reference,
    pack,
    pack_reference,
    plane_parts,
    planes_for,
    tile_elements,
    tiles,
)
from thinwire.kernels.counter_random import WordMaker, check_place, dither_reference
from thinwire.kernels.decode_planes import decode_planes
from thinwire.kernels.quantize_on_gpu import launch_quantize

BITS = (8, 4, 2)
ZERO_BELOW = 2.0**-100  # a block whose largest magnitude is smaller counts as zero: its inverse could overflow
_ROUND = 1.5 * 2.0**23  # fp32 numbers around it are whole, so that adding it rounds to nearest even

Rounding = Literal["nearest", "stochastic"]


def quantize(
    x: Tensor,
    *,
    bits: int,
    block: int = 256,
    rounding: Rounding = "nearest",
    key: int = 0,
    offset: int = 0,
    codes: Tensor | None = None,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Write x as codes and scales, the same bits on every device.

    With L = 2^(bits-1) - 1 and a = max |x_j| over the block of i: scale = a (1/L), code_i = round(x_i (L/a)) in two's
    complement, from -L to L. Every operation is rounded to fp32 by itself. If a < 2^-100, scale and codes are 0.
    "nearest" rounds to even; "stochastic" adds the dither of (key, offset + i) of counter_random first, so that
    E code_i scale = x_i to 2^-17 of a scale. Bits behind the last code are 0. Decoding is code times scale.

    A block with an element that is not finite gets a scale that is not finite, and so does no other block: looking at
    the scales finds out whether x was finite. The codes of such a block are not defined.

    On a GPU this is the Triton kernel, if the block is a power of two from 16 to 4096 (else PyTorch, with a warning);
    on a CPU PyTorch and NumPy in tiles that stay in the cache. Not differentiable.

    Args:
        x: (numel,), fp32, contiguous. A CPU reads it from memory once, as does a GPU.
        bits: of a code: 8, 4 (two to a byte, the first in the low bits) or 2 (the codes are -1, 0 and 1).
        block: elements that share a scale, a multiple of 8.
        key: of the random numbers, from 0 to 2^64 - 1.
        offset: the place of x[0] in what it is a part of, so that cutting a tensor changes no random number.
        codes: where to write the codes, uint8 (ceil(numel bits / 8),); otherwise new memory.
        scales: where to write the scales, fp32 (ceil(numel / block),); otherwise new memory.

    Raises:
        ValueError: arguments other than these.
    """
    check_block("quantize", bits, block, BITS)
    check_rounding("quantize", rounding, key, offset)
    check_plane("quantize", "x", x, (x.numel(),), x.device, torch.float32)
    codes, scales = planes_for("quantize", x.numel(), x.device, bits, block, codes, scales)
    if needs_reference("quantize", x.device, block):
        made = quantize_reference(x, bits=bits, block=block, rounding=rounding, key=key, offset=offset)
        codes.copy_(made[0])
        scales.copy_(made[1])
    elif x.device.type == "cuda" and x.numel():
        stochastic = rounding == "stochastic"
        launch_quantize(x, None, codes, scales, bits=bits, block=block, stochastic=stochastic, key=key, offset=offset)
    elif x.numel():
        step = tile_elements(x.numel(), block)
        tile = BlockTile(step, bits, block, rounding, key)
        for start, stop in tiles(x.numel(), block, step):
            tile.write(x[start:stop], offset + start, *plane_parts(codes, scales, bits, block, start, stop))
    return codes, scales


def quantize_with_feedback(
    gradient: Tensor,
    memory: Tensor,
    next_memory: Tensor,
    *,
    bits: int,
    block: int = 256,
    rounding: Rounding = "nearest",
    key: int = 0,
    offset: int = 0,
    codes: Tensor | None = None,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantise c = gradient + memory and write next_memory <- c - decoded(c), in one pass.

    Seide, Fu, Droppo, Li, Yu (2014). Rounded as `quantize`, adding and taking away included. Where a block of c is not
    finite, neither is that block of next_memory: look at the scales before using it.

    Args:
        gradient: (numel,), fp32, contiguous.
        memory: likewise: what was left behind before.
        next_memory: likewise: what is left behind now. May be `memory` itself, but share no other memory.
        bits, block, rounding, key, offset, codes, scales: as of `quantize`.

    Raises:
        ValueError: arguments other than these.
    """
    name = "quantize_with_feedback"
    check_block(name, bits, block, BITS)
    check_rounding(name, rounding, key, offset)
    codes, scales = planes_for(name, gradient.numel(), gradient.device, bits, block, codes, scales)
    for what, tensor in (("gradient", gradient), ("memory", memory), ("next_memory", next_memory)):
        check_plane(name, what, tensor, (gradient.numel(),), gradient.device, torch.float32)
    if needs_reference(name, gradient.device, block):
        torch.add(gradient, memory, out=next_memory)
        made = quantize_reference(next_memory, bits=bits, block=block, rounding=rounding, key=key, offset=offset)
        codes.copy_(made[0])
        scales.copy_(made[1])
        next_memory.sub_(decode_reference(codes, scales, bits=bits, block=block, numel=gradient.numel()))
    elif gradient.device.type == "cuda" and gradient.numel():
        feedback, stochastic = (memory, next_memory), rounding == "stochastic"
        launch_quantize(
            gradient, feedback, codes, scales, bits=bits, block=block, stochastic=stochastic, key=key, offset=offset
        )
    elif gradient.numel():
        step = tile_elements(gradient.numel(), block)
        tile = BlockTile(step, bits, block, rounding, key)
        for start, stop in tiles(gradient.numel(), block, step):
            total = torch.add(gradient[start:stop], memory[start:stop], out=next_memory[start:stop])
            planes = plane_parts(codes, scales, bits, block, start, stop)
            tile.write(total, offset + start, *planes, keep_error=True)
    return codes, scales


def dequantize(
    codes: Tensor, scales: Tensor, *, bits: int, block: int = 256, numel: int, out: Tensor | None = None
) -> Tensor:
    """Code times scale, fp32 (numel,), in `out` or in new memory. Codes that no encoder writes (-L - 1) count as well.

    Raises:
        ValueError: arguments that do not belong together.
    """
    check_block("dequantize", bits, block, BITS)
    return decode_planes("dequantize", codes, scales, bits=bits, block=block, numel=numel, out=out)


def quantize_reference(
    x: Tensor, *, bits: int, block: int, rounding: Rounding, key: int, offset: int
) -> tuple[Tensor, Tensor]:
    """The definition of `quantize`."""
    numel = x.numel()
    levels = (1 << (bits - 1)) - 1
    rows = torch.nn.functional.pad(x, (0, -numel % block)).view(-1, block)
    largest = rows.abs().amax(1)
    zero = largest < ZERO_BELOW
    inverse = torch.where(zero, 0.0, torch.div(torch.full_like(largest, levels), largest))
    scales = torch.where(zero, 0.0, largest * (1 / levels))
    values = rows * inverse[:, None]
    if rounding == "stochastic":
        values += dither_reference(key, rows.numel(), offset=offset, device=x.device).view_as(rows)
    rounded = (values + _ROUND - _ROUND).clamp(-levels, levels)
    return pack_reference(rounded.view(-1)[:numel], bits), scales


class BlockTile:
    """Quantises up to `most` elements at a time on the CPU, in memory that is allocated once."""

    def __init__(self, most: int, bits: int, block: int, rounding: Rounding, key: int) -> None:
        self._bits, self._block = bits, block
        self._levels = (1 << (bits - 1)) - 1
        self._values, self._codes = torch.empty(most), torch.empty(most, dtype=torch.int8)
        self._random = WordMaker(key, most // 2 + 1) if rounding == "stochastic" else None
        self._dither = torch.empty(most if self._random else 0)

    def write(self, x: Tensor, place: int, codes: Tensor, scales: Tensor, *, keep_error: bool = False) -> None:
        """Quantise x, a span of `tiles`, into its part of the planes; keep_error leaves x - decoded in x."""
        if (count := x.numel()) % self._block == 0:
            self._quantize(x, place, codes, scales, keep_error)
            return
        padded = torch.zeros(self._block)
        padded[:count] = x
        whole = torch.empty(codes_bytes(self._block, self._bits), dtype=torch.uint8)
        self._quantize(padded, place, whole, scales, keep_error)
        codes.copy_(whole[: len(codes)])
        if keep_error:
            x.copy_(padded[:count])

    def _quantize(self, x: Tensor, place: int, codes: Tensor, scales: Tensor, keep_error: bool) -> None:
        count = x.numel()
        values, whole = self._values[:count], self._codes[:count]
        rows = values.view(-1, self._block)
        torch.abs(x, out=values)
        # As whole numbers the bits of magnitudes have the same order, NaN above all, and PyTorch is faster with them.
        largest = rows.view(torch.int32).amax(1).view(torch.float32).numpy()
        zero = largest < ZERO_BELOW
        inverse = np.float32(self._levels) / np.where(zero, np.float32(np.inf), largest)
        np.multiply(np.where(zero, np.float32(0), largest), np.float32(1 / self._levels), out=scales.numpy())
        torch.mul(x.view_as(rows), torch.from_numpy(inverse)[:, None], out=rows)
        if self._random is not None:
            dither = self._dither[:count].copy_(self._random.halves(place, count)).add_(0.5)
            values.add_(dither, alpha=2.0**-16)
        if keep_error:
            values.add_(_ROUND).sub_(_ROUND)  # round_() would leave -0.0, and with it another error
        else:
            values.round_()
        if self._random is not None:
            values.clamp_(-self._levels, self._levels)
        if self._bits == 8:
            codes.view(torch.int8).copy_(values)
        else:
            pack(whole.copy_(values), self._bits, codes)
        if keep_error:
            rows.mul_(scales[:, None])
            x.sub_(values)


def check_rounding(kernel: str, rounding: str, key: int, offset: int) -> None:
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f'{kernel}: rounding is {rounding!r}; it must be "nearest" or "stochastic"')
    check_place(key, offset)
