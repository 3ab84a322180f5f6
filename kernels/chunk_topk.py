"""The k largest entries by magnitude of each chunk of a tensor, in ascending order of their indices."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from thinwire.kernels.triton_kernel import triton_is_installed, triton_kernel

if TYPE_CHECKING:
    import triton.language as tl

_MAGNITUDE = 0x7FFFFFFF  # the bits of |x| order like |x|
_TILE = 1 << 16  # elements: what a core's cache holds
WIDEST = 8192  # elements of a chunk that the Triton kernel keeps in registers


def chunk_top_k(x: Tensor, k: int, *, chunk: int = 4096) -> tuple[Tensor, Tensor]:
    """The k entries of largest magnitude of each chunk; of equal ones those of lower index.

    Exactly k come back for each chunk, zeros where there are no others. The last chunk may be shorter; it is treated
    as if zeros followed. NaN counts as larger than infinity. On a GPU a Triton kernel reads each chunk once, for
    chunks of up to 8192 elements; PyTorch takes longer ones. Not differentiable.

    Args:
        x: fp32 (numel,), contiguous.
        k: 1 to chunk.
        chunk: elements, at least 1.

    Returns: places within the chunk, int32 (chunks, k), strictly ascending; values, fp32 (chunks, k).

    Raises:
        ValueError: another dtype, layout, k or chunk.
    """
    _check(x, k, chunk)
    x = x.detach()
    if x.device.type == "cuda" and x.numel() and chunk <= WIDEST:
        if triton_is_installed():
            return launch(x, k, chunk)
        warnings.warn(
            "chunk_top_k: Triton is not installed, so PyTorch ranks the chunks: same result, several times slower; "
            "pip install 'thinwire[triton]' brings it",
            RuntimeWarning,
            stacklevel=2,
        )
    of_rows = _of_rows_on_cpu if x.device.type == "cpu" else _of_rows
    whole = x.numel() // chunk * chunk
    places, values = of_rows(x[:whole].view(-1, chunk), k)
    if whole < x.numel():
        tail = F.pad(x[whole:], (0, whole + chunk - x.numel()))
        last_places, last_values = of_rows(tail.view(1, chunk), k)
        places, values = torch.cat([places, last_places]), torch.cat([values, last_values])
    return places, values


def chunk_top_k_reference(x: Tensor, k: int, *, chunk: int = 4096) -> tuple[Tensor, Tensor]:
    """The definition of `chunk_top_k`."""
    rows = F.pad(x, (0, -x.numel() % chunk)).view(-1, chunk)
    magnitudes = rows.view(torch.int32) & _MAGNITUDE
    places = magnitudes.argsort(dim=1, descending=True, stable=True)[:, :k].sort(dim=1).values
    return places.to(torch.int32), rows.gather(1, places)


@triton_kernel(warps=16, varying=("n",))
def kernel(
    x: tl.tensor,
    places: tl.tensor,
    values: tl.tensor,
    n: tl.int64,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    x += row * CHUNK
    if row * CHUNK + BLOCK <= n:
        number = tl.load(x + lane)
    else:
        number = tl.load(x + lane, mask=lane < n - row * CHUNK, other=0.0)
    bits = tl.where(lane < CHUNK, number.to(tl.int32, bitcast=True) & 0x7FFFFFFF, -1)

    # More than `low` are at least K entries, more than `high` fewer than K (or low = high = 0: the rest is zeros).
    # Each round counts at three points between. Most chunks end within the factor of 64 below their largest entry.
    high = tl.max(bits)
    low = tl.maximum(high - (6 << 23), 0)
    count = tl.sum((bits > low).to(tl.int32))
    if count < K:
        high = low
        low = tl.zeros_like(low)
        count = tl.sum((bits > 0).to(tl.int32))
    if count < K:
        high = tl.zeros_like(low)
    while (count != K) & (high - low > 1):
        second = low + ((high - low) >> 1)
        first = low + tl.maximum((high - low) >> 2, 1)
        third = second + ((high - low) >> 2)
        counts = tl.sum((bits > first).to(tl.int32) + ((bits > second).to(tl.int32) << 16))
        at_first, at_second = counts & 0xFFFF, counts >> 16
        at_third = tl.sum((bits > third).to(tl.int32))
        if at_third >= K:
            low, count = third, at_third
        elif at_second >= K:
            low, high, count = second, third, at_second
        elif at_first >= K:
            low, high, count = first, second, at_first
        else:
            high = first

    limit = tl.where(count == K, low, high)
    ranks = tl.cumsum((bits > limit).to(tl.int32) + ((bits == limit).to(tl.int32) << 16))
    above, equal = ranks & 0xFFFF, ranks >> 16
    room = K - tl.sum((bits > limit).to(tl.int32))
    keep = (bits > limit) | ((bits == limit) & (equal <= room))
    place = row * K + above + tl.minimum(equal, room) - 1
    tl.store(places + place, lane, mask=keep)
    tl.store(values + place, number, mask=keep)


def compile_time(k: int, chunk: int) -> dict[str, int]:
    """The kernel's constants."""
    return {"K": k, "CHUNK": chunk, "BLOCK": 1 << max(chunk - 1, 1).bit_length()}


def launch(x: Tensor, k: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Run the Triton kernel on checked arguments with at least one element and chunks of at most WIDEST."""
    chunks = -(-x.numel() // chunk)
    places = torch.empty(chunks, k, dtype=torch.int32, device=x.device)
    values = torch.empty(chunks, k, dtype=torch.float32, device=x.device)
    kernel.launch(chunks, x.device, x, places, values, x.numel(), **compile_time(k, chunk))
    return places, values


def _of_rows(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As `chunk_top_k` for (chunks, chunk), with PyTorch."""
    magnitudes = rows.view(torch.int32) & _MAGNITUDE
    kth = magnitudes.topk(k, dim=1).values[:, -1:]
    above, equal = magnitudes > kth, magnitudes == kth
    keep = above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
    places = keep.nonzero()[:, 1].view(-1, k)
    return places.to(torch.int32), rows.gather(1, places)


def _of_rows_on_cpu(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same with NumPy, a few chunks at a time, which stay in the cache."""
    numbers = rows.numpy()
    chunks, chunk = numbers.shape
    places = np.empty((chunks, k), np.int32)
    values = np.empty((chunks, k), np.float32)
    step = max(1, _TILE // chunk)
    for start in range(0, chunks, step):
        tile = numbers[start : start + step]
        magnitudes = tile.view(np.int32) & _MAGNITUDE
        kth = np.partition(magnitudes, chunk - k, axis=1)[:, chunk - k, None]
        keep = magnitudes >= kth
        tied = np.flatnonzero(np.count_nonzero(keep, axis=1) > k)
        if len(tied):
            above, equal = magnitudes[tied] > kth[tied], magnitudes[tied] == kth[tied]
            room = k - np.count_nonzero(above, axis=1)[:, None]
            keep[tied] = above | (equal & (np.cumsum(equal, axis=1, dtype=np.int32) <= room))
        found = np.flatnonzero(keep).reshape(len(tile), k)
        values[start : start + step] = tile.reshape(-1)[found]
        places[start : start + step] = found - np.arange(0, tile.size, chunk)[:, None]
    return torch.from_numpy(places), torch.from_numpy(values)


def _check(x: Tensor, k: int, chunk: int) -> None:
    if x.dtype != torch.float32 or x.dim() != 1 or not x.is_contiguous():
        raise ValueError(
            f"chunk_top_k: got a tensor of {x.dtype}, shape {tuple(x.shape)}, stride {x.stride()}; "
            "it must be fp32, flat and contiguous: x.float().contiguous().view(-1)"
        )
    if chunk < 1:
        raise ValueError(f"chunk_top_k: chunk is {chunk}; it must be at least 1 element")
    if not 1 <= k <= chunk:
        raise ValueError(f"chunk_top_k: k is {k}; for chunks of {chunk} elements it must be 1 to {chunk}")
