"""Steps of a LoadBalance on logits that are given, and the f of each micro-batch read back from its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from ranks import Rank
from torch import Tensor

from thinwire.comm.balance.balance import LoadBalance
from thinwire.comm.queue import CommQueue

LAYERS = 2
Order = Literal["interleaved", "gpipe"]


class Steps:
    """One rank's steps. Logits are 0, so that p = 1 / E and dz_i = a / N * (f_i - 1 / E): f and N can be read from it.

    Args:
        selections: selected[step][rank][unit] (tokens, 1) experts; layer l adds l to them, modulo E.
    """

    def __init__(
        self, rank: Rank, num_experts: int, units: int, *, queue: CommQueue | None = None, **settings: Any
    ) -> None:
        self.rank, self.experts, self.units = rank, num_experts, units
        self.queue = queue or rank.queue()
        self.balance = LoadBalance(
            num_experts=num_experts,
            top_k=1,
            coef=1.0,
            micro_batches=units,
            ranks="sum",
            queue=self.queue,
            **settings,
        )

    def run(self, selected: Sequence[Tensor], order: Order = "interleaved") -> Tensor:
        """One step. Args: selected: of each unit. Returns N^-1 (f - 1 / E): (units, layers, experts)."""
        leaves = [[torch.zeros(len(s), self.experts, dtype=torch.float64) for _ in range(LAYERS)] for s in selected]
        waiting = []
        for unit, choice in zip(leaves, selected, strict=True):
            outs = []
            for layer, logits in enumerate(unit):
                logits.requires_grad_()
                outs.append(self.balance(layer, logits, (choice + layer) % self.experts).sum())
            loss = 0 * torch.stack(outs).sum()
            waiting.append(loss)
            if order == "interleaved":
                waiting.pop().backward()
        for loss in waiting:
            loss.backward()
        gradients = []
        for unit in leaves:
            assert all(logits.grad is not None for logits in unit)
            gradients.append(torch.stack([logits.grad[0] for logits in unit]))  # type: ignore[index]
        return torch.stack(gradients)


def pull_of(counts: Tensor, tokens: Tensor | float) -> Tensor:
    """What Steps.run() gives for f ~ counts (..., layers, experts) and N tokens."""
    f = counts.double() / counts.sum(-1, keepdim=True)
    return (f - 1 / counts.shape[-1]) / tokens
