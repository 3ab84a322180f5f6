"""What the loss of one micro-batch is taken against: the experts' shares of the batch, and how large that batch is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thinwire.comm.balance.columns import Columns


@dataclass(frozen=True)
class Target:
    """fractions: (layers, num_experts) fp64, f; each row sums to 1. tokens: (layers,) fp64, valid ones in the batch."""

    fractions: Tensor
    tokens: Tensor


def target_of(rows: Tensor, tokens: Tensor, columns: Columns) -> Target:
    """The target of counts, which may have been scaled.

    Args:
        rows: (layers, columns.width), of any dtype.
        tokens: (layers,), of the whole step.
    """
    return Target(fractions_of(rows, columns), tokens.double().clamp(min=1.0))


def fractions_of(rows: Tensor, columns: Columns) -> Tensor:
    """f_i = c_i / sum_j c_j; of layers that have counted nothing: 1 / num_experts, which pulls nowhere."""
    loads = columns.loads(rows).double()
    total = loads.sum(-1, keepdim=True)
    return torch.where(total > 0, loads / total.clamp(min=1e-300), 1.0 / columns.num_experts)
