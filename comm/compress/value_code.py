"""The code of the kept values of a sparse tensor: whole numbers of few bits with a scale, a codebook, or a plain dtype.

    fp32, bf16, fp16   the values to nearest even; what the dtype cannot hold becomes its largest number
    int8, int4         fp32 scale = max|v| / 127 or / 7 for each 256 values, then round(v / scale), two int4 to a byte:
                       kernels/block_quantize.py
    int8_stochastic, int4_stochastic
                       the same, rounded up or down by chance, so that the mean is the value
    2bit               4 fp32 numbers, then for each value which of them is nearest, four to a byte
    sign               fp32 scale = mean |v|, then a bit for each value, set where v >= 0

All little-endian, the first value in the lowest bits. A block of zeros has scale 0. -128 and -8 stand for nothing.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from thinwire.comm.wire import PayloadError
from thinwire.kernels.block_quantize import Rounding, dequantize, quantize

ValueKind: TypeAlias = Literal[
    "fp32", "bf16", "fp16", "int8", "int8_stochastic", "int4", "int4_stochastic", "2bit", "sign"
]
Bytes: TypeAlias = npt.NDArray[np.uint8]
Floats: TypeAlias = npt.NDArray[np.float32]

BLOCK = 256
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_BLOCK_BITS = {"int8": 8, "int8_stochastic": 8, "int4": 4, "int4_stochastic": 4}
_LLOYD_SAMPLES = 1 << 14
_LLOYD_GROUPS = 128
_LLOYD_ROUNDS = 16


def values_bytes(count: int, kind: ValueKind) -> int:
    """Length of what encode_values() makes of `count` values."""
    if count == 0:
        return 0
    if kind in _DTYPES:
        return count * _DTYPES[kind].itemsize
    if kind == "2bit":
        return 16 + -(-count // 4)
    if kind == "sign":
        return 4 + -(-count // 8)
    return 4 * -(-count // BLOCK) + -(-count * _BLOCK_BITS[kind] // 8)


def encode_values(values: Tensor, kind: ValueKind, key: int = 0) -> Tensor:
    """Encode finite values.

    The four numbers of 2bit are those of Lloyd (1982): each is the mean of the values nearest to it. The search begins
    at the best cuts between 128 groups of values, and looks at every k-th value, 16384 or so; the means are of all.

    Args: values, fp32 (k,); key, for the stochastic kinds alone: the same key gives the same bytes.
    Returns: uint8 (values_bytes,), on the device of the values.
    """
    if values.numel() == 0:
        return torch.empty(0, dtype=torch.uint8, device=values.device)
    if kind in _DTYPES:
        largest = torch.finfo(_DTYPES[kind]).max
        return values.clamp(-largest, largest).to(_DTYPES[kind]).view(torch.uint8)
    if kind in _BLOCK_BITS:
        rounding: Rounding = "stochastic" if kind.endswith("_stochastic") else "nearest"
        return _encode_blocks(values, _BLOCK_BITS[kind], rounding, key)
    numbers = values.cpu().numpy()
    payload = _encode_codebook(numbers) if kind == "2bit" else _encode_sign(numbers)
    return torch.from_numpy(payload).to(values.device)


def decode_values(payload: Tensor, count: int, kind: ValueKind) -> tuple[Tensor, int]:
    """The values at the beginning of `payload`, and how many bytes they take there. Safe with hostile bytes.

    Args: payload, uint8, contiguous, maybe longer than the code.
    Returns: finite values, fp32 (count,), on the payload's device; bytes used.
    Raises:
        PayloadError: the payload is too short, a value or scale is not finite, or a code stands for nothing.
    """
    used = values_bytes(count, kind)
    if count < 0 or payload.numel() < used:
        raise PayloadError(f"{payload.numel()} bytes where {count} {kind} values take {used}")
    if count == 0:
        return torch.empty(0, dtype=torch.float32, device=payload.device), 0
    if kind in _DTYPES:
        # The clone begins at an address that any dtype can begin at.
        values = payload[:used].clone().view(_DTYPES[kind]).float()
        if not values.isfinite().all():
            raise PayloadError(f"{kind} values that are not finite")
        return values, used
    if kind in _BLOCK_BITS:
        return _decode_blocks(payload[:used], count, _BLOCK_BITS[kind]), used
    stored = payload[:used].cpu().numpy()
    numbers = _decode_codebook(stored, count) if kind == "2bit" else _decode_sign(stored, count)
    return torch.from_numpy(numbers).to(payload.device), used


def _encode_blocks(values: Tensor, bits: int, rounding: Rounding, key: int) -> Tensor:
    codes, scales = quantize(values, bits=bits, block=BLOCK, rounding=rounding, key=key)
    return torch.cat([scales.clamp_(max=_largest_scale(bits)).view(torch.uint8), codes])


def _decode_blocks(stored: Tensor, count: int, bits: int) -> Tensor:
    # The clones begin at addresses that any dtype can begin at.
    end = 4 * -(-count // BLOCK)
    scales, codes = stored[:end].clone().view(torch.float32), stored[end:].clone()
    if not ((scales >= 0) & (scales <= _largest_scale(bits))).all():
        raise PayloadError("a scale that is negative, too large or not a number")
    reserved = 1 << bits - 1
    if ((codes & (1 << bits) - 1 == reserved) | (codes >> 8 - bits == reserved)).any():
        raise PayloadError(f"the code {-reserved}, which stands for nothing")
    return dequantize(codes, scales, bits=bits, block=BLOCK, numel=count)


def _encode_codebook(values: Floats) -> Bytes:
    codebook = _lloyd(np.sort(values[:: -(-values.size // _LLOYD_SAMPLES)]).astype(np.float64))
    codes = np.zeros(-(-values.size // 4) * 4, dtype=np.uint8)
    for border in (codebook[1:] + codebook[:-1]) / 2:
        codes[: values.size] += values > np.float32(border)
    used = codes[: values.size]
    counts = np.bincount(used, minlength=4)
    sums = np.bincount(used, weights=values, minlength=4)
    np.divide(sums, counts, out=codebook, where=counts > 0)
    fours = codes.reshape(-1, 4)
    packed = fours[:, 0] | fours[:, 1] << 2 | fours[:, 2] << 4 | fours[:, 3] << 6
    return np.concatenate([codebook.astype("<f4").view(np.uint8), packed])


def _lloyd(ordered: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Four ascending numbers, each the mean of those of the `ordered` ones that are nearest to it."""
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    ends = _best_cuts(ordered, sums)
    codebook = ordered[np.minimum(ends[:4], ordered.size - 1)]
    for _ in range(_LLOYD_ROUNDS):
        counts = np.diff(ends)
        np.divide(np.diff(sums[ends]), counts, out=codebook, where=counts > 0)
        borders = np.searchsorted(ordered, (codebook[1:] + codebook[:-1]) / 2, side="right")
        previous, ends = ends, np.concatenate([[0], borders, [ordered.size]])
        if np.array_equal(previous, ends):
            break
    return codebook


def _best_cuts(ordered: npt.NDArray[np.float64], sums: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """0, three cuts, and the size: four stretches of the least variance, cut between 128 groups of equal size.

    What top-k keeps has a wide gap about 0, so that a group must not reach across.
    """
    edges = np.linspace(0, ordered.size, min(ordered.size, _LLOYD_GROUPS) + 1).astype(np.int64)
    edges = np.union1d(edges, np.searchsorted(ordered, 0.0))
    squares = np.concatenate([[0.0], np.cumsum(ordered * ordered)])[edges]
    sizes = edges[None, :] - edges[:, None]
    means = sums[edges][None, :] - sums[edges][:, None]
    spread = squares[None, :] - squares[:, None] - means * means / np.maximum(sizes, 1)
    spread[sizes < 0] = np.inf
    least = spread[0]
    choices = []
    for _ in range(3):
        total = least[:, None] + spread
        choices.append(total.argmin(axis=0))
        least = total.min(axis=0)
    cuts = [edges.size - 1]
    for choice in reversed(choices):
        cuts.append(int(choice[cuts[-1]]))
    return edges[[0, *reversed(cuts)]]


def _decode_codebook(stored: Bytes, count: int) -> Floats:
    codebook = stored[:16].view("<f4").astype(np.float32)
    if not np.isfinite(codebook).all():
        raise PayloadError("a codebook whose numbers are not finite")
    packed = stored[16:]
    codes = np.stack([packed & 3, packed >> 2 & 3, packed >> 4 & 3, packed >> 6], axis=1)
    return codebook[codes.reshape(-1)[:count]]


def _encode_sign(values: Floats) -> Bytes:
    scale = np.abs(values).mean(dtype=np.float64)
    return np.concatenate([np.array([scale], "<f4").view(np.uint8), np.packbits(values >= 0, bitorder="little")])


def _decode_sign(stored: Bytes, count: int) -> Floats:
    scale = stored[:4].view("<f4").astype(np.float32)
    if not (np.isfinite(scale[0]) and scale[0] >= 0):
        raise PayloadError(f"the scale {scale[0]}, which is negative or not finite")
    positive = np.unpackbits(stored[4:], count=count, bitorder="little")
    return np.concatenate([-scale, scale])[positive]


def _largest_scale(bits: int) -> float:
    """A little below what, times the largest code, would overflow."""
    return torch.finfo(torch.float32).max / ((1 << bits - 1) - 1) * (1 - 2**-20)
