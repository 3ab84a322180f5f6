"""The largest entries of a tensor by magnitude, in ascending order of their indices: exact, and the same everywhere."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from thinwire.kernels import select_on_cpu, select_on_gpu

Selected: TypeAlias = tuple[Tensor, Tensor]
"""Indices, int64 (count,), strictly ascending, and the fp32 values there."""

_INFINITY = 0x7F800000
_SAMPLE = 1 << 13  # entries at least, and 1 % of the tensor


def top_k(x: Tensor, k: int) -> Selected:
    """The k entries of largest magnitude; of equal ones those of lower index.

    Zeros are never selected: fewer than k come back where fewer are nonzero. NaN counts as larger than infinity.
    The k-th magnitude of a small sample, lowered until it is hardly ever too high, leaves a few candidates after one
    pass, and only these are ranked; where it was too high, all entries are. Not differentiable.

    Args:
        x: fp32 (numel,), contiguous.
        k: 0 to numel.

    Raises:
        ValueError: another dtype, layout or k.
    """
    _check(x)
    _check_k(k, x.numel())
    device = select_on_cpu if x.device.type == "cpu" else select_on_gpu
    return _with_values(x, device.select_top(x.detach(), k))


def select_above(x: Tensor, threshold: float, capacity: int | None = None) -> Selected:
    """The nonzero entries with |x| >= threshold; if they are more than `capacity`, the largest `capacity` of them.

    Args:
        x: fp32 (numel,), contiguous.
        threshold: 0 or more, rounded to fp32.
        capacity: the most that may come back, chosen as by `top_k`; None for no limit.

    Raises:
        ValueError: another dtype, layout, threshold or capacity.
    """
    _check(x)
    if capacity is not None:
        _check_k(capacity, x.numel())
    lower = _bits_of(threshold)
    device = select_on_cpu if x.device.type == "cpu" else select_on_gpu
    return _with_values(x, device.select_reaching(x.detach(), lower, capacity))


def select_with_feedback(
    gradient: Tensor,
    memory: Tensor,
    next_memory: Tensor,
    *,
    k: int | None = None,
    threshold: float | None = None,
) -> Selected:
    """Select from c = gradient + memory, and write next_memory <- c, with zeros where an entry was selected.

    The same as `torch.add`, then `top_k` (with k) or `select_above` (with a threshold; k is then its capacity), then
    a scatter of zeros, but the sum is examined while it is still in the cache. Whoever rounds the values that it
    sends writes `next_memory[indices] = values - rounded` afterwards.

    Args:
        gradient, memory, next_memory: fp32 (numel,), contiguous; next_memory shares memory with neither of the others.
        k, threshold: as above; at least one of them.

    Raises:
        ValueError: another dtype, layout, k or threshold, tensors of different sizes or devices.
    """
    for tensor in (gradient, memory, next_memory):
        _check(tensor)
    given = [(tuple(tensor.shape), str(tensor.device)) for tensor in (gradient, memory, next_memory)]
    if len(set(given)) > 1:
        raise ValueError(
            f"threshold_select: gradient, memory and next_memory are {given}; they must have one shape and device"
        )
    if k is not None:
        _check_k(k, gradient.numel())
    device = select_on_cpu if gradient.device.type == "cpu" else select_on_gpu
    sums, addends = next_memory.detach(), (gradient.detach(), memory.detach())
    if threshold is not None:
        indices = device.select_reaching(sums, _bits_of(threshold), k, addends)
    elif k is not None:
        indices = device.select_top(sums, k, addends)
    else:
        raise ValueError("threshold_select: neither k nor threshold is given; give one of them")
    selected = _with_values(sums, indices)
    sums.index_fill_(0, indices, 0.0)
    return selected


def sampled_threshold(x: Tensor, k: int, key: int) -> float:
    """A threshold that 0.8 k to 1.3 k entries reach, or more where magnitudes are equal.

    Lin, Han, Mao, Wang, Dally (2017), arXiv 1712.01887: the k-th largest magnitude is estimated from a sample, and the
    threshold adapted, at most 10 times, while too many or too few entries reach it. Here an adaptation takes another
    rank of the same sample, in proportion to the count, where theirs multiplies the threshold by a fixed factor; and
    if none is accepted, the threshold is the exact k-th magnitude.

    Args:
        x: fp32 (numel,), contiguous.
        k: 1 to numel.
        key: 0 or more; decides where the sample lies.

    Returns: the threshold; 0, which selects all nonzero entries, where these are fewer than 0.8 k.

    Raises:
        ValueError: another dtype, layout or k.
    """
    _check(x)
    _check_k(k, x.numel(), least=1)
    values, numel = x.detach(), x.numel()
    device = select_on_cpu if x.device.type == "cpu" else select_on_gpu
    stride = min(100, numel // _SAMPLE) | 1
    sample = np.sort(values[key % stride :: stride].cpu().numpy().view(np.int32) & select_on_cpu.MAGNITUDE)[::-1]
    rank = k * len(sample) / numel
    for _ in range(11):
        lower = max(int(sample[min(max(round(rank), 1), len(sample)) - 1]), select_on_cpu.ANY)
        count = device.count_reaching(values, lower)
        if 0.8 * k <= count <= 1.3 * k:
            break
        rank *= k / max(count, 1)
    else:
        lower = device.kth_magnitude(values, k)
    return float(np.int32(min(lower, _INFINITY)).view(np.float32)) if lower > select_on_cpu.ANY else 0.0


def top_k_reference(x: Tensor, k: int) -> Selected:
    """The definition of `top_k`."""
    return select_above_reference(x, 0.0, k)


def select_above_reference(x: Tensor, threshold: float, capacity: int | None = None) -> Selected:
    """The definition of `select_above`."""
    magnitudes = x.view(torch.int32) & select_on_cpu.MAGNITUDE
    order = magnitudes.argsort(descending=True, stable=True)[:capacity]
    indices = order[magnitudes[order] >= _bits_of(threshold)].sort().values
    return indices, x[indices]


def _with_values(x: Tensor, indices: Tensor) -> Selected:
    return indices, x.detach().index_select(0, indices)


def _check(x: Tensor) -> None:
    if x.dtype != torch.float32 or x.dim() != 1 or not x.is_contiguous():
        raise ValueError(
            f"threshold_select: got a tensor of {x.dtype}, shape {tuple(x.shape)}, stride {x.stride()}; "
            "it must be fp32, flat and contiguous: x.float().contiguous().view(-1)"
        )


def _check_k(k: int, numel: int, least: int = 0) -> None:
    if not least <= k <= numel:
        raise ValueError(f"threshold_select: k is {k}; for {numel} elements it must be {least} to {numel}")


def _bits_of(threshold: float) -> int:
    if not threshold >= 0:
        raise ValueError(f"threshold_select: threshold is {threshold}; it must be 0 or more")
    with np.errstate(over="ignore"):  # beyond fp32 is infinity
        return max(int(np.float32(abs(threshold)).view(np.int32)), select_on_cpu.ANY)
