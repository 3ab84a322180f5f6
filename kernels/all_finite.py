"""Whether a tensor holds neither NaN nor infinity, without a temporary of its size."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def all_finite(x: Tensor) -> bool:
    """True if every element is finite; one pass over x. On a GPU this waits for the result.

    Args:
        x: any shape and floating dtype; an empty one is finite.
    """
    if x.numel() == 0:
        return True
    low, high = torch.aminmax(x.detach())  # NaN wins both
    return math.isfinite(low.item()) and math.isfinite(high.item())
