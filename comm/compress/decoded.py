"""What a payload says: a dense tensor, or values at some places of a tensor that is zero elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sparse:
    """A flat fp32 tensor of `numel` elements that is zero but at `indices`.

    Attributes: indices, int64 (k,), strictly ascending; values, fp32 (k,).
    """

    numel: int
    indices: Tensor
    values: Tensor


Decoded: TypeAlias = Tensor | Sparse
"""A flat fp32 tensor, or its sparse form."""


def add_to(out: Tensor, decoded: Decoded, scale: float = 1.0) -> None:
    """out += scale * decoded, in the dtype of `out`: the same bits whether decoded is dense or sparse.

    Args:
        out: contiguous, any shape, with as many elements as decoded.
        scale: multiplies first, and is skipped when it is 1.
    """
    flat = out.view(-1)
    if isinstance(decoded, Sparse):
        values = decoded.values if scale == 1.0 else decoded.values * scale
        # The indices are distinct, so no order of additions can matter.
        flat.index_add_(0, decoded.indices, values.to(out.dtype))
    else:
        values = decoded.view(-1)
        if scale in (1.0, -1.0):
            flat.add_(values, alpha=int(scale))  # exact, and without the product's memory
        else:
            flat += values * scale


def to_dense(decoded: Decoded) -> Tensor:
    """The flat fp32 tensor. A dense one is returned as it is, not copied."""
    if isinstance(decoded, Tensor):
        return decoded.view(-1)
    dense = torch.zeros(decoded.numel, dtype=torch.float32, device=decoded.values.device)
    dense[decoded.indices] = decoded.values
    return dense


def split_decoded(decoded: Decoded, sizes: Sequence[int]) -> list[Decoded]:
    """The parts of what was decoded as one tensor, of these numbers of elements."""
    if not isinstance(decoded, Sparse):
        return list(to_dense(decoded).split(list(sizes)))
    ends = torch.tensor(sizes, dtype=torch.int64, device=decoded.indices.device).cumsum(0)
    cuts = torch.searchsorted(decoded.indices, ends).tolist()
    parts: list[Decoded] = []
    begin, start = 0, 0
    for size, cut in zip(sizes, cuts, strict=True):
        parts.append(Sparse(size, decoded.indices[begin:cut] - start, decoded.values[begin:cut]))
        begin, start = cut, start + size
    return parts
