"""Whether numbers are numbers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def are_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no element is NaN or infinite. One fast pass; a sum that overflows takes a second, exact one."""
    tensors = list(tensors)
    sums = torch.stack([x.sum() for x in tensors]) if tensors else torch.zeros(1)
    return bool(sums.isfinite().all()) or all(bool(x.isfinite().all()) for x in tensors)
