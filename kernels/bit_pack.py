"""Whole numbers of a few bits each, one after the other without gaps, the lowest bits first."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

WIDEST = 25  # bits: with an offset of up to 7 bits such a number still lies within 4 bytes


def pack_bits(values: Tensor, width: int) -> Tensor:
    """Write number i into the bits i * width to (i + 1) * width - 1; bit b is bit b mod 8 of byte b div 8.

    Bits of a number beyond `width` are cut off; the last byte is filled up with zeros.

    Args:
        values: integers or booleans (count,), of any such dtype.
        width: bits per number, 1 to 25.

    Returns: uint8 (ceil(count * width / 8),), on the device of the values.

    Raises:
        ValueError: another dtype, shape or width.
    """
    _check_width(width)
    if values.dtype.is_floating_point or values.dtype.is_complex or values.dim() != 1:
        raise ValueError(f"pack_bits: got {values.dtype} of shape {tuple(values.shape)}; give integers, flat")
    return torch.from_numpy(_pack(values.detach().numpy(), width))


def unpack_bits(data: Tensor, width: int, count: int) -> Tensor:
    """What `pack_bits` has packed: `count` numbers of `width` bits, int32 (count,), from at least their bytes.

    Args:
        data: uint8, flat, contiguous; bytes and bits behind the numbers are not looked at.
        width: bits per number, 1 to 25.
        count: numbers, 0 or more.

    Raises:
        ValueError: another dtype, shape or width, or fewer bytes than the numbers take.
    """
    _check_width(width)
    if data.dtype != torch.uint8 or data.dim() != 1 or not data.is_contiguous():
        raise ValueError(f"unpack_bits: got {data.dtype} of shape {tuple(data.shape)}; give uint8, flat, contiguous")
    if count < 0 or packed_bytes(count, width) > data.numel():
        raise ValueError(
            f"unpack_bits: count is {count}, but {data.numel()} bytes hold 0 to {8 * data.numel() // width} numbers "
            f"of {width} bits"
        )
    return torch.from_numpy(_unpack(data.numpy(), width, count))


def packed_bytes(count: int, width: int) -> int:
    """Bytes that `count` numbers of `width` bits take."""
    return -(-count * width // 8)


def pack_bits_reference(values: Tensor, width: int) -> Tensor:
    """The definition of `pack_bits`: bit by bit."""
    bits = (values.to(torch.int64)[:, None] >> torch.arange(width, device=values.device)).view(-1) & 1
    padded = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    return (padded << torch.arange(8, device=values.device)).sum(1).to(torch.uint8)


def unpack_bits_reference(data: Tensor, width: int, count: int) -> Tensor:
    """The definition of `unpack_bits`: bit by bit."""
    bits = (data.to(torch.int32)[:, None] >> torch.arange(8, device=data.device)).view(-1) & 1
    numbers = bits[: count * width].view(count, width) << torch.arange(width, device=data.device)
    return numbers.sum(1).to(torch.int32)


_Bytes = npt.NDArray[np.uint8]
_Words = npt.NDArray[np.uint64]


def _pack(values: npt.NDArray[Any], width: int) -> _Bytes:
    """Eight numbers take `width` bytes. Neighbours are joined while a word of 64 bits holds them, then laid out."""
    if width == 1:
        return np.packbits(values & 1, bitorder="little")
    count = len(values)
    groups = -(-count // 8)
    field: _Words = np.zeros(groups * 8, np.uint64)
    np.copyto(field[:count], values, casting="unsafe")
    field &= np.uint64((1 << width) - 1)
    bits = width
    while bits < 8 * width and 2 * bits <= 64:
        field = field[0::2] | (field[1::2] << np.uint64(bits))
        bits *= 2
    fields = field.reshape(groups, 8 * width // bits)
    words = np.zeros((groups, -(-width // 8)), np.uint64)
    for j in range(fields.shape[1]):
        word, shift = divmod(j * bits, 64)
        words[:, word] |= fields[:, j] << np.uint64(shift)
        if shift + bits > 64:
            words[:, word + 1] |= fields[:, j] >> np.uint64(64 - shift)
    return words.view(np.uint8)[:, :width].reshape(-1)[: packed_bytes(count, width)]


def _unpack(data: _Bytes, width: int, count: int) -> npt.NDArray[np.int32]:
    """The steps of `_pack` backwards."""
    if width == 1:
        return np.unpackbits(data, count=count, bitorder="little").astype(np.int32)
    groups = -(-count // 8)
    spread = np.zeros((groups, 8 * -(-width // 8)), np.uint8)
    whole, size = groups * width, packed_bytes(count, width)
    padded = data[:whole] if len(data) >= whole else np.concatenate([data[:size], np.zeros(whole - size, np.uint8)])
    spread[:, :width] = padded.reshape(groups, width)
    words = spread.view(np.uint64)
    bits = width
    while bits < 8 * width and 2 * bits <= 64:
        bits *= 2
    field: _Words = np.empty((groups, 8 * width // bits), np.uint64)
    for j in range(field.shape[1]):
        word, shift = divmod(j * bits, 64)
        np.right_shift(words[:, word], np.uint64(shift), out=field[:, j])
        if shift + bits > 64:
            field[:, j] |= words[:, word + 1] << np.uint64(64 - shift)
    while bits > width:
        bits //= 2
        halves: _Words = np.empty((*field.shape, 2), np.uint64)
        halves[..., 0] = field
        np.right_shift(field, np.uint64(bits), out=halves[..., 1])
        field = halves.reshape(groups, 8 * width // bits)
    field &= np.uint64((1 << width) - 1)
    return field.reshape(-1)[:count].astype(np.int32)


def _check_width(width: int) -> None:
    if not 1 <= width <= WIDEST:
        raise ValueError(f"bit_pack: width is {width} bits; it must be 1 to {WIDEST}")
