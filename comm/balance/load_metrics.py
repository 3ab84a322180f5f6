"""How evenly the experts are loaded."""

from __future__ import annotations

import math

from torch import Tensor


def load_metrics(loads: Tensor) -> dict[str, float]:
    """Of each layer's counts c: MaxVio = max_i c_i / mean(c) - 1, the coefficient of variation, and the entropy.

    Wang et al. 2024 (2408.15664) for MaxVio. The entropy is divided by its largest value, ln E: 1 = evenly loaded.

    Args:
        loads: (layers, experts) integers.
    Returns: max_violation (the worst layer's) and mean_max_violation, load_cv and load_entropy (means over layers).
    """
    c = loads.double()
    mean = c.mean(-1).clamp(min=1e-300)
    violation = c.amax(-1) / mean - 1
    share = c / c.sum(-1, keepdim=True).clamp(min=1e-300)
    entropy = -(share * share.clamp(min=1e-300).log()).sum(-1)
    return {
        "max_violation": float(violation.max()),
        "mean_max_violation": float(violation.mean()),
        "load_cv": float((c.std(-1, correction=0) / mean).mean()),
        "load_entropy": float(entropy.mean()) / math.log(c.shape[-1]) if c.shape[-1] > 1 else 1.0,
    }
