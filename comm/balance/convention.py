"""What the trainer does to gradients after the backward pass, and the factor that makes up for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Combine = Literal["mean", "sum"]
LossScale = Callable[[], float | Tensor]


@dataclass(frozen=True)
class Convention:
    """How the gradients of all ranks and micro-batches become the gradient that the optimizer sees.

    The balancing loss enters as a gradient, not through the trainer's loss: dividing that loss, by the number of
    micro-batches say, does not reach it. What counts is what happens to gradients themselves.

    ranks: "mean" (DDP, FSDP2, DeepSpeed) or "sum".
    accumulation: "sum" (loss.backward() adds up) or "mean", where the trainer divides gradients by the micro-batches.
    loss_scale: gives the factor by which the trainer multiplies its loss, and later divides its gradients: AMP's.
    """

    ranks: Combine = "mean"
    accumulation: Combine = "sum"
    loss_scale: LossScale | None = None

    def __post_init__(self) -> None:
        for name in ("ranks", "accumulation"):
            if getattr(self, name) not in ("mean", "sum"):
                raise ValueError(
                    f"{name}: {getattr(self, name)!r} is not known; say what the trainer does to gradients: mean or sum"
                )

    def factor(self, size: int, micro_batches: int) -> float | Tensor:
        """kappa = [size if ranks are averaged] * [micro_batches if they are averaged] * loss_scale."""
        kappa: float | Tensor = self.loss_scale() if self.loss_scale else 1.0
        if self.ranks == "mean":
            kappa = kappa * size
        if self.accumulation == "mean":
            kappa = kappa * micro_batches
        return kappa
