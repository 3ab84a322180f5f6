"""Quantise to one bit an element and the mean magnitude of each block, plainly or with error feedback."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from thinwire.kernels.code_planes import (
    check_block,
    check_plane,
    decode_reference,
    needs_reference,
    pack_reference,
    plane_parts,
    planes_for,
    tile_elements,
    tiles,
)
from thinwire.kernels.decode_planes import decode_planes
from thinwire.kernels.quantize_on_gpu import launch_quantize


def quantize_sign(
    x: Tensor, *, block: int = 256, bits: Tensor | None = None, scales: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Write x as signs and scales, the same bits on every device.

    bit_i = 1 if x_i >= 0 (so sign(0) = 1) else 0; scale = mean |x_j| over the block of i, of which the last one may
    be a part. A block of zeros has scale 0. Bits behind the last are 0. Decoding is scale times 1 or -1.

    The mean is a sum over a tree: with zeros added to make the block a power of two, the second half is added to the
    first until one number is left; then it is divided by the number of elements. Everything is rounded to fp32.
    A block with an element that is not finite, or whose sum is not, has a scale that is not finite.

    On a GPU this is the Triton kernel, if the block is a power of two from 16 to 4096 (else PyTorch, with a warning).
    Not differentiable.

    Args:
        x: (numel,), fp32, contiguous.
        block: elements that share a scale, a multiple of 8.
        bits: where to write the signs, uint8 (ceil(numel / 8),), the first in the lowest bit; otherwise new memory.
        scales: where to write the scales, fp32 (ceil(numel / block),); otherwise new memory.

    Raises:
        ValueError: arguments other than these.
    """
    check_block("quantize_sign", 1, block, (1,))
    check_plane("quantize_sign", "x", x, (x.numel(),), x.device, torch.float32)
    bits, scales = planes_for("quantize_sign", x.numel(), x.device, 1, block, bits, scales)
    if needs_reference("quantize_sign", x.device, block):
        made = quantize_sign_reference(x, block=block)
        bits.copy_(made[0])
        scales.copy_(made[1])
    elif x.device.type == "cuda" and x.numel():
        launch_quantize(x, None, bits, scales, bits=1, block=block)
    elif x.numel():
        step = tile_elements(x.numel(), block)
        tile = SignTile(step, block)
        for start, stop in tiles(x.numel(), block, step):
            tile.write(x[start:stop], *plane_parts(bits, scales, 1, block, start, stop))
    return bits, scales


def quantize_sign_with_feedback(
    gradient: Tensor,
    memory: Tensor,
    next_memory: Tensor,
    *,
    block: int = 256,
    bits: Tensor | None = None,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantise c = gradient + memory and write next_memory <- c - decoded(c), in one pass.

    Karimireddy, Rebjock, Stich, Jaggi (2019), arXiv 1901.09847, with the scale of each block instead of the tensor.

    Args:
        gradient: (numel,), fp32, contiguous.
        memory: likewise: what was left behind before.
        next_memory: likewise: what is left behind now. May be `memory` itself, but share no other memory.
        block, bits, scales: as of `quantize_sign`.

    Raises:
        ValueError: arguments other than these.
    """
    name = "quantize_sign_with_feedback"
    check_block(name, 1, block, (1,))
    bits, scales = planes_for(name, gradient.numel(), gradient.device, 1, block, bits, scales)
    for what, tensor in (("gradient", gradient), ("memory", memory), ("next_memory", next_memory)):
        check_plane(name, what, tensor, (gradient.numel(),), gradient.device, torch.float32)
    if needs_reference(name, gradient.device, block):
        torch.add(gradient, memory, out=next_memory)
        made = quantize_sign_reference(next_memory, block=block)
        bits.copy_(made[0])
        scales.copy_(made[1])
        next_memory.sub_(decode_reference(bits, scales, bits=1, block=block, numel=gradient.numel()))
    elif gradient.device.type == "cuda" and gradient.numel():
        launch_quantize(gradient, (memory, next_memory), bits, scales, bits=1, block=block)
    elif gradient.numel():
        step = tile_elements(gradient.numel(), block)
        tile = SignTile(step, block)
        for start, stop in tiles(gradient.numel(), block, step):
            total = torch.add(gradient[start:stop], memory[start:stop], out=next_memory[start:stop])
            tile.write(total, *plane_parts(bits, scales, 1, block, start, stop), keep_error=True)
    return bits, scales


def dequantize_sign(bits: Tensor, scales: Tensor, *, block: int = 256, numel: int, out: Tensor | None = None) -> Tensor:
    """Scale times 1 or -1, fp32 (numel,), in `out` or in new memory.

    Raises:
        ValueError: arguments that do not belong together.
    """
    check_block("dequantize_sign", 1, block, (1,))
    return decode_planes("dequantize_sign", bits, scales, bits=1, block=block, numel=numel, out=out)


def quantize_sign_reference(x: Tensor, *, block: int) -> tuple[Tensor, Tensor]:
    """The definition of `quantize_sign`."""
    numel = x.numel()
    rows = torch.nn.functional.pad(x.abs(), (0, -numel % block)).view(-1, block)
    scales = _tree_sum(torch.nn.functional.pad(rows, (0, _power_of_two(block) - block)))
    counts = torch.full_like(scales, block)
    counts[numel // block :] = numel % block
    return pack_reference((x >= 0).to(torch.int64), 1), scales / counts


class SignTile:
    """Quantises up to `most` elements at a time on the CPU, in memory that is allocated once."""

    def __init__(self, most: int, block: int) -> None:
        self._block = block
        self._values, self._positive = np.empty(most, dtype=np.float32), np.empty(most, dtype=np.bool_)

    @np.errstate(over="ignore", invalid="ignore")  # the scales tell
    def write(self, x: Tensor, bits: Tensor, scales: Tensor, *, keep_error: bool = False) -> None:
        """Quantise x, a span of `tiles`, into its part of the planes; keep_error leaves x - decoded in x."""
        count = x.numel()
        source, means = x.numpy(), scales.numpy()
        values, positive = self._values[:count], self._positive[:count]
        np.greater_equal(source, 0, out=positive)
        np.copyto(bits.numpy(), np.packbits(positive, bitorder="little"))
        np.abs(source, out=values)
        width = min(self._block, count)
        np.divide(_tree_sum_on_cpu(values.reshape(-1, width), self._block), np.float32(width), out=means)
        if keep_error:
            np.add(source, np.float32(0), out=values)  # makes -0.0 positive, so that the sign bits are those sent
            decoded = values.view(np.int32)
            decoded &= np.int32(-(2**31))
            rows = decoded.reshape(-1, width)
            rows |= means.view(np.int32)[:, None]
            np.subtract(source, values, out=source)


def _tree_sum(rows: Tensor) -> Tensor:
    """Sums of rows (n, power of two), halves added to halves."""
    while (half := rows.shape[1] // 2) > 0:
        rows = rows[:, :half] + rows[:, half:]
    return rows[:, 0]


def _tree_sum_on_cpu(rows: npt.NDArray[np.float32], block: int) -> npt.NDArray[np.float32]:
    """`_tree_sum` of rows to which zeros are added."""
    if (missing := _power_of_two(block) - rows.shape[1]) > 0:
        rows = np.pad(rows, ((0, 0), (0, missing)))
    while (half := rows.shape[1] // 2) >= 16:
        rows = rows[:, :half] + rows[:, half:]
    columns: npt.NDArray[np.float32] = np.ascontiguousarray(rows.T)  # short rows are slow to add
    while (half := len(columns) // 2) > 0:
        columns = columns[:half] + columns[half:]
    return columns.reshape(-1)


def _power_of_two(count: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << (count - 1).bit_length()
