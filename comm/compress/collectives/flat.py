"""Several tensors seen as one flat tensor: without a copy where they lie one after another, as in a DDP bucket."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """The elements of contiguous tensors, one tensor after another: a view if possible, otherwise a copy."""
    view = as_one(tensors)
    return torch.cat([x.reshape(-1) for x in tensors]) if view is None else view


def as_one(tensors: Sequence[Tensor]) -> Tensor | None:
    """The flat view of contiguous tensors that lie one after another in one storage; None if they do not."""
    first = tensors[0]
    storage, end = first.untyped_storage().data_ptr(), first.storage_offset()
    for x in tensors:
        if x.untyped_storage().data_ptr() != storage or x.storage_offset() != end:
            return None
        end += x.numel()
    return first.as_strided((end - first.storage_offset(),), (1,))


def destination(targets: Sequence[Tensor], sources: Sequence[Tensor], flat: Tensor) -> Tensor:
    """Where to write what the targets shall be; copy_back() does the rest.

    Their flat view, if they have one; otherwise `flat`, which joined(sources) gave, if that is a copy; or new memory.
    """
    view = as_one(targets)
    if view is not None:
        return view
    return flat if as_one(sources) is None else torch.empty_like(flat)


def split_like(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of joined(): a flat view of the part of each tensor."""
    return list(flat.split([x.numel() for x in tensors]))


def shaped_like(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """split_like(), each part in the shape of its tensor."""
    return [part.view(x.shape) for part, x in zip(split_like(flat, tensors), tensors, strict=True)]


def copy_back(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    """Write the parts of `flat` into the tensors, unless it is a view of them."""
    for part, x in zip(shaped_like(flat, tensors), tensors, strict=True):
        if part.data_ptr() != x.data_ptr():
            x.copy_(part)
