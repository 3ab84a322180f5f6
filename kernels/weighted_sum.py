"""Weighted sum of vectors: what one round of gossip does to a machine's weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def weighted_sum(vectors: Sequence[Tensor], weights: Sequence[float], *, out: Tensor | None = None) -> Tensor:
    """out = ((w[0] v[0] + w[1] v[1]) + w[2] v[2]) + ...; every product and every sum is rounded by itself.

    Args:
        vectors: one-dimensional, of one length and device, fp32 or fp64.
        weights: as many.
        out: of the same kind, sharing no memory with the vectors; default: a new one.
    """
    total = torch.mul(vectors[0], weights[0], out=out)
    scratch = torch.empty_like(total)
    for vector, weight in zip(vectors[1:], weights[1:], strict=True):
        total.add_(torch.mul(vector, weight, out=scratch))
    return total
