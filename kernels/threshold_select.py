"""The largest entries of a tensor by magnitude, in ascending order of their indices: exact, and the same everywhere."""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Selected: TypeAlias = tuple[Tensor, Tensor]
"""Indices, int64 (count,), strictly ascending, and the fp32 values there."""

# Magnitudes are compared as the bits of |x|, which order like |x| and which PyTorch and NumPy treat faster.
_MAGNITUDE = 0x7FFFFFFF
_ANY = 1  # the smallest magnitude that is not zero
_INFINITY = 0x7F800000
_TILE = 1 << 15  # elements: the magnitudes and the mask stay in the cache of one core
_FEW = 1 << 13  # so few elements that looking at a sample first saves nothing
_EXPECTED = 48  # entries of the sample that belong to the k largest


def top_k(x: Tensor, k: int) -> Selected:
    """The k entries of largest magnitude; of equal ones those of lower index.

    Zeros are never selected: fewer than k come back where fewer are nonzero. NaN counts as larger than infinity.
    On a CPU the k-th magnitude of a small sample, lowered until it is hardly ever too high, leaves a few candidates
    in one pass, and only these are partitioned; where it was too high, all entries are.

    Args:
        x: fp32 (numel,), contiguous.
        k: 0 to numel.

    Raises:
        ValueError: another dtype, layout or k.
    """
    _check(x)
    _check_k(k, x.numel())
    values = _numpy(x)
    return _selected(x, _largest(*_candidates(values, k), k))


def select_above(x: Tensor, threshold: float, capacity: int | None = None) -> Selected:
    """The nonzero entries with |x| >= threshold; if they are more than `capacity`, the largest `capacity` of them.

    Args:
        x: fp32 (numel,), contiguous.
        threshold: 0 or more, rounded to fp32.
        capacity: the most that may come back; None for no limit. The choice is that of `top_k`.

    Raises:
        ValueError: another dtype, layout, threshold or capacity.
    """
    _check(x)
    lower = _checked_bits(threshold)
    if capacity is not None:
        _check_k(capacity, x.numel())
    values = _numpy(x)
    return _selected(x, _largest(*_above(values, lower), capacity))


def select_with_feedback(
    gradient: Tensor,
    memory: Tensor,
    next_memory: Tensor,
    *,
    k: int | None = None,
    threshold: float | None = None,
) -> Selected:
    """Select from c = gradient + memory, and write next_memory <- c, with zeros where an entry was selected.

    The same as `torch.add`, then `top_k` (with k), `select_above` (with threshold, k being its capacity) and a
    scatter of zeros, but the sum is read while it is still in the cache. Whoever rounds the values that it sends
    writes `next_memory[indices] = values - rounded` afterwards.

    Args:
        gradient, memory, next_memory: fp32 (numel,), contiguous; next_memory shares memory with neither.
        k, threshold: as above; one of them at least.

    Raises:
        ValueError: another dtype, layout, k or threshold, or tensors of different sizes.
    """
    for tensor in (gradient, memory, next_memory):
        _check(tensor)
    if not gradient.shape == memory.shape == next_memory.shape:
        shapes = [tuple(tensor.shape) for tensor in (gradient, memory, next_memory)]
        raise ValueError(f"threshold_select: gradient, memory and next_memory have shapes {shapes}; make them equal")
    if k is not None:
        _check_k(k, gradient.numel())
    addends, sums = (_numpy(gradient), _numpy(memory)), _numpy(next_memory)
    if threshold is not None:
        candidates = _above(sums, _checked_bits(threshold), addends)
    elif k is not None:
        candidates = _candidates(sums, k, addends)
    else:
        raise ValueError("threshold_select: neither k nor threshold is given; give one of them")
    indices, values = _selected(next_memory, _largest(*candidates, k))
    sums[indices.numpy()] = 0.0
    return indices, values


def sampled_threshold(x: Tensor, k: int, key: int) -> float:
    """A threshold that about k entries reach: at least 0.8 k and at most 1.3 k of them, equal magnitudes permitting.

    Lin, Han, Mao, Wang, Dally (2017), arXiv 1712.01887, estimate it from a sample and then count. As in their code, a
    threshold that too many or too few entries reach is adapted, at most 10 times, and then made exact: it becomes the
    k-th largest magnitude. Unlike there, each adaptation takes another rank of the same sample, in proportion to
    the count, instead of a fixed factor.

    Args:
        x: fp32 (numel,), contiguous.
        k: 1 to numel.
        key: decides where the sample lies.

    Returns: the threshold; 0 if x has no more than 0.8 k nonzero entries, so that all of them are selected.

    Raises:
        ValueError: another dtype, layout or k.
    """
    _check(x)
    _check_k(k, x.numel(), least=1)
    values = _numpy(x)
    numel = len(values)
    stride = min(100, numel // _FEW) | 1
    sample = np.sort(values[key % stride :: stride].view(np.int32) & _MAGNITUDE)[::-1]
    rank = k * len(sample) / numel
    for _ in range(11):
        lower = max(int(sample[min(max(round(rank) - 1, 0), len(sample) - 1)]), _ANY)
        count = _count(values, lower)
        if 0.8 * k <= count <= 1.3 * k:
            break
        rank *= k / max(count, 1)
    else:
        magnitudes = values.view(np.int32) & _MAGNITUDE
        lower = int(np.partition(magnitudes, numel - k)[numel - k])
    return float(np.int32(min(lower, _INFINITY)).view(np.float32)) if lower > _ANY else 0.0


def top_k_reference(x: Tensor, k: int) -> Selected:
    """The definition of `top_k`."""
    return select_above_reference(x, 0.0, k)


def select_above_reference(x: Tensor, threshold: float, capacity: int | None = None) -> Selected:
    """The definition of `select_above`."""
    magnitudes = x.view(torch.int32) & _MAGNITUDE
    order = magnitudes.argsort(descending=True, stable=True)[:capacity]
    indices = order[magnitudes[order] >= _checked_bits(threshold)].sort().values
    return indices, x[indices]


_Floats: TypeAlias = npt.NDArray[np.float32]
_Integers: TypeAlias = npt.NDArray[np.int32]
_Indices: TypeAlias = npt.NDArray[np.int64]


def _candidates(values: _Floats, k: int, addends: tuple[_Floats, _Floats] | None = None) -> tuple[_Indices, _Integers]:
    """Indices and magnitudes of a superset of the k largest; first fills `values` with the sum of the addends."""
    numel = len(values)
    if k > 0 and numel > _FEW and k * 8 <= numel:
        stride = max(8, k // _EXPECTED) | 1  # odd, so that it walks through all columns of most matrices
        sample = values[::stride] if addends is None else addends[0][::stride] + addends[1][::stride]
        expected = k * len(sample) / numel
        rank = min(len(sample), math.ceil(expected + 3.5 * math.sqrt(expected) + 3))
        magnitudes = sample.view(np.int32) & _MAGNITUDE
        lower = int(np.partition(magnitudes, len(sample) - rank)[len(sample) - rank])
        indices, magnitudes = _above(values, max(lower, _ANY), addends)
        if len(indices) >= k or lower <= _ANY:
            return indices, magnitudes
    elif addends is not None:
        np.add(*addends, out=values)
    if k == 0:
        return np.empty(0, np.int64), np.empty(0, np.int32)
    magnitudes = values.view(np.int32) & _MAGNITUDE
    kth = int(np.partition(magnitudes, numel - k)[numel - k])
    return _above(values, max(kth, _ANY))


def _above(values: _Floats, lower: int, addends: tuple[_Floats, _Floats] | None = None) -> tuple[_Indices, _Integers]:
    """Indices and magnitudes of the entries of at least this magnitude, as `_candidates`."""
    magnitudes, reached = np.empty(_TILE, np.int32), np.empty(_TILE, np.bool_)
    indices, kept = [], []
    for start in range(0, len(values), _TILE):
        tile = values[start : start + _TILE]
        size = len(tile)
        if addends is not None:
            np.add(addends[0][start : start + size], addends[1][start : start + size], out=tile)
        np.bitwise_and(tile.view(np.int32), _MAGNITUDE, out=magnitudes[:size])
        np.greater_equal(magnitudes[:size], lower, out=reached[:size])
        found = np.flatnonzero(reached[:size])
        kept.append(magnitudes[found])
        indices.append(np.add(found, start, out=found))
    return np.concatenate(indices or [np.empty(0, np.int64)]), np.concatenate(kept or [np.empty(0, np.int32)])


def _largest(indices: _Indices, magnitudes: _Integers, k: int | None) -> _Indices:
    """Of candidates in ascending order, the k of largest magnitude, in ascending order."""
    count = len(indices)
    if k is None or count <= k:
        return indices
    if k == 0:
        return indices[:0]
    kth = int(np.partition(magnitudes, count - k)[count - k])
    keep = magnitudes > kth
    ties = np.flatnonzero(magnitudes == kth)
    keep[ties[: k - np.count_nonzero(keep)]] = True
    kept: _Indices = indices[keep]
    return kept


def _count(values: _Floats, lower: int) -> int:
    magnitudes = np.empty(_TILE, np.int32)
    count = 0
    for start in range(0, len(values), _TILE):
        tile = values[start : start + _TILE].view(np.int32)
        count += int(np.count_nonzero(np.bitwise_and(tile, _MAGNITUDE, out=magnitudes[: len(tile)]) >= lower))
    return count


def _numpy(tensor: Tensor) -> _Floats:
    array: _Floats = tensor.detach().numpy()
    return array


def _selected(x: Tensor, indices: _Indices) -> Selected:
    places = torch.from_numpy(indices)
    return places, torch.from_numpy(_numpy(x)[indices])


def _check(x: Tensor) -> None:
    if x.dtype != torch.float32 or x.dim() != 1 or not x.is_contiguous():
        raise ValueError(
            f"threshold_select: got a tensor of {x.dtype}, shape {tuple(x.shape)}, stride {x.stride()}; "
            "it must be fp32, flat and contiguous: x.float().contiguous().view(-1)"
        )


def _check_k(k: int, numel: int, least: int = 0) -> None:
    if not least <= k <= numel:
        raise ValueError(f"threshold_select: k is {k}; for {numel} elements it must be {least} to {numel}")


def _checked_bits(threshold: float) -> int:
    if not threshold >= 0:
        raise ValueError(f"threshold_select: threshold is {threshold}; it must be 0 or more")
    return max(int(np.float32(threshold).view(np.int32)), _ANY)
