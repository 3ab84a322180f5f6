"""Selection by magnitude on a CPU, with NumPy, in tiles that stay in the cache of one core."""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

MAGNITUDE = 0x7FFFFFFF  # the bits of |x| order like |x|, NaN last, and are compared faster
ANY = 1  # the smallest magnitude that is not zero
_TILE = 1 << 15  # elements
_FEW = 1 << 13  # so few elements that looking at a sample first saves nothing
_EXPECTED = 48  # entries of the sample that belong to the k largest

Addends: TypeAlias = tuple[Tensor, Tensor]
Floats: TypeAlias = npt.NDArray[np.float32]
Integers: TypeAlias = npt.NDArray[np.int32]
Indices: TypeAlias = npt.NDArray[np.int64]


def select_top(values: Tensor, k: int, addends: Addends | None = None) -> Tensor:
    """Indices of the k largest, ascending; with addends, first writes their sum into `values`."""
    numel = values.numel()
    numbers, parts = values.numpy(), _arrays(addends)
    if sample_pays(k, numel):
        stride, rank = sample_plan(k, numel)
        sample = parts[0][::stride] + parts[1][::stride] if parts else numbers[::stride]
        lower = max(_kth(sample.view(np.int32) & MAGNITUDE, rank), ANY)
        indices, magnitudes = _reaching(numbers, lower, parts)
        if len(indices) >= k or lower == ANY:
            return torch.from_numpy(_largest(indices, magnitudes, k))
    elif parts:
        np.add(*parts, out=numbers)
    lower = max(kth_magnitude(values, k), ANY) if k else MAGNITUDE
    return torch.from_numpy(_largest(*_reaching(numbers, lower), k))


def select_reaching(values: Tensor, lower: int, capacity: int | None, addends: Addends | None = None) -> Tensor:
    """Indices, ascending, of the `capacity` largest whose magnitude has at least the bits `lower`; addends as above."""
    indices, magnitudes = _reaching(values.numpy(), lower, _arrays(addends))
    return torch.from_numpy(_largest(indices, magnitudes, len(indices) if capacity is None else capacity))


def count_reaching(values: Tensor, lower: int) -> int:
    """How many entries have a magnitude of at least the bits `lower`."""
    bits = values.numpy().view(np.int32)
    tiles = (bits[start : start + _TILE] for start in range(0, len(bits), _TILE))
    return sum(int(np.count_nonzero((tile & MAGNITUDE) >= lower)) for tile in tiles)


def kth_magnitude(values: Tensor, k: int) -> int:
    """The bits of the k-th largest magnitude."""
    return _kth(values.numpy().view(np.int32) & MAGNITUDE, k)


def sample_pays(k: int, numel: int) -> bool:
    """Whether a sample is likely to leave far fewer candidates than there are elements."""
    return numel > _FEW and 0 < 8 * k <= numel


def sample_plan(k: int, numel: int) -> tuple[int, int]:
    """Stride of a sample, and a rank in it whose magnitude k of all entries reach, but for one tensor in thousands."""
    stride = max(8, k // _EXPECTED) | 1  # odd, so that it walks through all columns of most matrices
    size = -(-numel // stride)
    expected = k * size / numel
    return stride, min(size, math.ceil(expected + 3.5 * math.sqrt(expected) + 3))


def _reaching(values: Floats, lower: int, parts: tuple[Floats, Floats] | None = None) -> tuple[Indices, Integers]:
    """Indices and magnitudes of the entries of at least this magnitude."""
    magnitudes, reached = np.empty(_TILE, np.int32), np.empty(_TILE, np.bool_)
    indices, kept = [np.empty(0, np.int64)], [np.empty(0, np.int32)]
    for start in range(0, len(values), _TILE):
        tile = values[start : start + _TILE]
        size = len(tile)
        if parts:
            np.add(parts[0][start : start + size], parts[1][start : start + size], out=tile)
        np.bitwise_and(tile.view(np.int32), MAGNITUDE, out=magnitudes[:size])
        np.greater_equal(magnitudes[:size], lower, out=reached[:size])
        found = np.flatnonzero(reached[:size])
        kept.append(magnitudes[found])
        indices.append(found + start)
    return np.concatenate(indices), np.concatenate(kept)


def _largest(indices: Indices, magnitudes: Integers, k: int) -> Indices:
    """Of candidates in ascending order the k of largest magnitude, in ascending order."""
    if len(indices) <= k or k == 0:
        return indices[:k]
    kth = _kth(magnitudes, k)
    keep = magnitudes > kth
    ties = np.flatnonzero(magnitudes == kth)
    keep[ties[: k - np.count_nonzero(keep)]] = True
    largest: Indices = indices[keep]
    return largest


def _kth(magnitudes: Integers, k: int) -> int:
    return int(np.partition(magnitudes, len(magnitudes) - k)[-k])


def _arrays(addends: Addends | None) -> tuple[Floats, Floats] | None:
    return (addends[0].numpy(), addends[1].numpy()) if addends else None
