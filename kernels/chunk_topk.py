"""The k largest entries by magnitude of each chunk of a tensor, in ascending order of their indices."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_MAGNITUDE = 0x7FFFFFFF  # the bits of |x| order like |x|
_TILE = 1 << 16  # elements: what a core's cache holds


def chunk_top_k(x: Tensor, k: int, *, chunk: int = 4096) -> tuple[Tensor, Tensor]:
    """The k entries of largest magnitude of each chunk; of equal ones those of lower index.

    Exactly k come back for each chunk, zeros where there are no others. The last chunk may be shorter; it is treated
    as if zeros followed. NaN counts as larger than infinity.

    Args:
        x: fp32 (numel,), contiguous.
        k: 1 to chunk.
        chunk: elements, at least 1.

    Returns: places within the chunk, int32 (chunks, k), strictly ascending; values, fp32 (chunks, k).

    Raises:
        ValueError: another dtype, layout, k or chunk.
    """
    _check(x, k, chunk)
    whole = x.numel() // chunk * chunk
    places, values = _of_rows(x[:whole].view(-1, chunk), k)
    if whole < x.numel():
        tail = F.pad(x[whole:], (0, whole + chunk - x.numel()))
        last_places, last_values = _of_rows(tail.view(1, chunk), k)
        places, values = torch.cat([places, last_places]), torch.cat([values, last_values])
    return places, values


def chunk_top_k_reference(x: Tensor, k: int, *, chunk: int = 4096) -> tuple[Tensor, Tensor]:
    """The definition of `chunk_top_k`."""
    rows = F.pad(x, (0, -x.numel() % chunk)).view(-1, chunk)
    magnitudes = rows.view(torch.int32) & _MAGNITUDE
    places = magnitudes.argsort(dim=1, descending=True, stable=True)[:, :k].sort(dim=1).values
    return places.to(torch.int32), rows.gather(1, places)


def _of_rows(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As `chunk_top_k` for (chunks, chunk), on a CPU: a few chunks at a time, which stay in the cache."""
    numbers = rows.detach().numpy()
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
