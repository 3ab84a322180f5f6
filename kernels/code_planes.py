"""Planes of a quantised tensor: codes of 1, 2, 4 or 8 bits, several to a byte, and one fp32 scale for each block."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from thinwire.kernels.triton_kernel import triton_is_installed


def codes_bytes(numel: int, bits: int) -> int:
    """Bytes of the plane of codes."""
    return -(-numel * bits // 8)


def scales_count(numel: int, block: int) -> int:
    """Scales of as many elements, the last of which may stand for a part of a block."""
    return -(-numel // block)


def tile_elements(numel: int, block: int) -> int:
    """How many elements, in whole blocks, a CPU is best given at a time.

    PyTorch keeps element-wise operations of up to 2^15 elements on the calling thread, where they disturb nobody; with
    one thread, more of them take less time to call, and still stay in the cache.
    """
    most = 1 << 17 if torch.get_num_threads() == 1 else 1 << 15
    return max(min(most, numel) // block, 1) * block


def tiles(numel: int, block: int, step: int) -> Iterator[tuple[int, int]]:
    """Spans that cover all elements: of whole blocks, at most `step` elements each; then what is left of a block."""
    whole = numel // block * block
    for start in range(0, whole, step):
        yield start, min(start + step, whole)
    if whole < numel:
        yield whole, numel


def plane_parts(codes: Tensor, scales: Tensor, bits: int, block: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Views of what the planes hold about a span of `tiles`; of all rows, where the planes have several."""
    return (
        codes[..., codes_bytes(start, bits) : codes_bytes(stop, bits)],
        scales[..., scales_count(start, block) : scales_count(stop, block)],
    )


def pack(codes: Tensor, bits: int, out: Tensor) -> None:
    """Write int8 codes of 4 or 2 bits (count,) on the CPU into `out`, uint8 (count bits / 8,), the first lowest."""
    source, target = codes.numpy(), out.numpy()
    if bits == 4:
        pairs = source.view(np.uint16)
        np.copyto(target, pairs & 0x0F | pairs >> 4 & 0xF0, casting="unsafe")
    else:
        fours = source.view(np.uint32) & 0x03030303
        fours |= fours >> 6
        np.copyto(target, fours | fours >> 12, casting="unsafe")


def unpack(codes: Tensor, bits: int) -> Tensor:
    """The codes in uint8 `codes` on the CPU, as int8 (8 / bits codes a byte,): -1 and 1 where they have one bit."""
    source = codes.numpy()
    if bits == 8:
        return codes.view(torch.int8)
    if bits == 4:
        pairs = source.astype(np.uint16)
        pairs |= pairs << 4
        pairs &= 0x0F0F
        fields = pairs.view(np.int8)
    elif bits == 2:
        fours = source.astype(np.uint32)
        fours |= fours << 12
        fours &= 0x000F000F
        fours |= fours << 6
        fours &= 0x03030303
        fields = fours.view(np.int8)
    else:
        fields = np.unpackbits(source, bitorder="little").view(np.int8)
        fields += fields
        fields -= 1
        return torch.from_numpy(fields)
    fields ^= 1 << (bits - 1)
    fields -= 1 << (bits - 1)
    return torch.from_numpy(fields)


def pack_reference(codes: Tensor, bits: int) -> Tensor:
    """The definition of the plane of codes, with zeros behind the last: whole numbers (numel,) to uint8."""
    per_byte = 8 // bits
    padded = torch.nn.functional.pad(codes.to(torch.int64), (0, -codes.numel() % per_byte)).view(-1, per_byte)
    places = torch.arange(0, 8, bits, device=codes.device)
    return ((padded & ((1 << bits) - 1)) << places).sum(1).to(torch.uint8)


def unpack_reference(codes: Tensor, bits: int, numel: int) -> Tensor:
    """What `pack_reference` packed, int64 (numel,): -1 and 1 where the codes have one bit."""
    places = torch.arange(0, 8, bits, device=codes.device)
    fields = (codes.to(torch.int64)[:, None] >> places & ((1 << bits) - 1)).view(-1)[:numel]
    half = 1 << (bits - 1)
    return 2 * fields - 1 if bits == 1 else (fields ^ half) - half


def decode_reference(codes: Tensor, scales: Tensor, *, bits: int, block: int, numel: int) -> Tensor:
    """The definition of decoding: code times scale, fp32 (numel,)."""
    return unpack_reference(codes, bits, numel).to(torch.float32) * scales.repeat_interleave(block)[:numel]


def decode_tile(codes: Tensor, scales: Tensor, *, bits: int, block: int, out: Tensor) -> None:
    """Decode whole blocks, or a part of one, on the CPU."""
    out.copy_(unpack(codes, bits)[: out.numel()])
    if out.numel() < block:
        out.mul_(scales)
    else:
        rows = out.view(-1, block)
        rows.mul_(scales[:, None])


def needs_reference(kernel: str, device: torch.device, block: int) -> bool:
    """Whether neither the tiles for CPUs nor Triton can serve this device; warns, because that is slow on a GPU."""
    if device.type == "cpu":
        return False
    if device.type == "cuda" and triton_is_installed():
        if fits_triton(block):
            return False
        reason = f"the GPU kernel wants a power of two from 16 to 4096 as block, not {block}"
    else:
        reason = "Triton is not installed; pip install 'thinwire[triton]' brings it"
    warnings.warn(f"{kernel}: PyTorch does it, with the same result but slowly: {reason}", RuntimeWarning, stacklevel=3)
    return True


def fits_triton(block: int) -> bool:
    return 16 <= block <= 4096 and block & (block - 1) == 0


def check_block(kernel: str, bits: int, block: int, allowed: tuple[int, ...]) -> None:
    if bits not in allowed:
        raise ValueError(f"{kernel}: bits is {bits}; it must be one of {allowed}")
    if block < 8 or block % 8:
        raise ValueError(f"{kernel}: block is {block}; it must be a positive multiple of 8")


def check_plane(
    kernel: str, name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> None:
    """Raises ValueError unless `tensor` is contiguous, of this shape and dtype and on this device."""
    if tensor.dtype != dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous():
        contiguous = "contiguous" if tensor.is_contiguous() else "not contiguous"
        raise ValueError(
            f"{kernel}: {name} is {contiguous}, {tensor.dtype}, of shape {tuple(tensor.shape)}; "
            f"it must be contiguous, {dtype}, of shape {shape}"
        )
    if tensor.device != device:
        raise ValueError(f"{kernel}: {name} is on {tensor.device}, not on {device}; use one device")


def planes_for(
    kernel: str, numel: int, device: torch.device, bits: int, block: int, codes: Tensor | None, scales: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The planes to write: those given, if they are of the right size, or new ones."""
    if codes is None:
        codes = torch.empty(codes_bytes(numel, bits), dtype=torch.uint8, device=device)
    if scales is None:
        scales = torch.empty(scales_count(numel, block), dtype=torch.float32, device=device)
    check_plane(kernel, "codes", codes, (codes_bytes(numel, bits),), device, torch.uint8)
    check_plane(kernel, "scales", scales, (scales_count(numel, block),), device, torch.float32)
    return codes, scales
