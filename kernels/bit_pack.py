"""Whole numbers of a few bits each, one after the other without gaps, the lowest bits first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from thinwire.kernels.triton_kernel import triton_is_installed, triton_kernel

if TYPE_CHECKING:
    import triton.language as tl

WIDEST = 25  # bits: with an offset of up to 7 bits such a number still lies within 4 bytes
BLOCK = 512  # words or numbers per program of the Triton kernels


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
    if values.device.type == "cpu":
        return torch.from_numpy(_pack(values.numpy(), width))
    if values.device.type == "cuda" and triton_is_installed() and values.numel():
        return launch_pack(values, width)
    return pack_bits_reference(values, width)


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
    if data.device.type == "cpu":
        return torch.from_numpy(_unpack(data.numpy(), width, count))
    if data.device.type == "cuda" and triton_is_installed() and count:
        return launch_unpack(data, width, count)
    return unpack_bits_reference(data, width, count)


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


@triton_kernel(warps=4, varying=("n",))
def pack_kernel(values: tl.tensor, words: tl.tensor, n: tl.int64, WIDTH: tl.constexpr, BLOCK: tl.constexpr) -> None:
    """Each lane makes a word of 32 bits of the numbers that reach into it."""
    begin = tl.program_id(0).to(tl.int64) * BLOCK * 32
    lane = tl.arange(0, BLOCK)
    bit = (begin % WIDTH).to(tl.int32) + lane * 32  # counted from the first bit of the number that `begin` lies in
    values += begin // WIDTH
    rest = n - begin // WIDTH
    word = tl.zeros((BLOCK,), tl.uint32)
    for j in tl.static_range((31 + WIDTH - 1) // WIDTH + 1):
        i = bit // WIDTH + j
        number = tl.load(values + i, mask=i < rest, other=0).to(tl.uint32) & ((1 << WIDTH) - 1)
        shift = i * WIDTH - bit
        # Shifts of 32 and more are not defined, and each of the two is computed in every lane.
        up = number << tl.minimum(tl.maximum(shift, 0), 31).to(tl.uint32)
        down = number >> tl.minimum(tl.maximum(-shift, 0), 31).to(tl.uint32)
        word |= tl.where(shift >= 32, 0, tl.where(shift >= 0, up, down))
    words += begin // 32
    if begin + BLOCK * 32 <= n * WIDTH:  # without a mask the compiler can store 16 bytes at a time
        tl.store(words + lane, word.to(tl.int32, bitcast=True))
    else:
        tl.store(words + lane, word.to(tl.int32, bitcast=True), mask=lane * 32 < n * WIDTH - begin)


@triton_kernel(warps=4, varying=("n",))
def unpack_kernel(data: tl.tensor, values: tl.tensor, n: tl.int64, WIDTH: tl.constexpr, BLOCK: tl.constexpr) -> None:
    """Each lane joins the bytes that its number reaches into."""
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    data += begin * WIDTH // 8
    size = ((n - begin) * WIDTH + 7) // 8
    bit = lane * WIDTH
    word = tl.zeros((BLOCK,), tl.uint32)
    for j in tl.static_range((WIDTH + 14) // 8):
        i = bit // 8 + j
        word |= tl.load(data + i, mask=i < size, other=0).to(tl.uint32) << (8 * j)
    number = (word >> (bit % 8).to(tl.uint32)) & ((1 << WIDTH) - 1)
    if begin + BLOCK <= n:
        tl.store(values + begin + lane, number.to(tl.int32))
    else:
        tl.store(values + begin + lane, number.to(tl.int32), mask=lane < n - begin)


def compile_time(width: int) -> dict[str, int]:
    """The constants of both kernels."""
    return {"WIDTH": width, "BLOCK": BLOCK}


def launch_pack(values: Tensor, width: int) -> Tensor:
    """Run the Triton kernel on at least one number."""
    numbers = values.contiguous()
    if numbers.dtype == torch.bool:
        numbers = numbers.view(torch.uint8)
    words = torch.empty(-(-len(numbers) * width // 32), dtype=torch.int32, device=numbers.device)
    programs = -(-len(words) // BLOCK)
    pack_kernel.launch(programs, numbers.device, numbers, words, len(numbers), **compile_time(width))
    return words.view(torch.uint8)[: packed_bytes(len(numbers), width)]


def launch_unpack(data: Tensor, width: int, count: int) -> Tensor:
    """Run the Triton kernel for at least one number."""
    values = torch.empty(count, dtype=torch.int32, device=data.device)
    unpack_kernel.launch(-(-count // BLOCK), data.device, data, values, count, **compile_time(width))
    return values


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
