"""Outer optimizers: how the weights that all ranks share follow the mean of what the ranks have changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from thinwire.comm.settings import Settings


class AverageSettings(Settings):
    """theta <- theta - d: the mean of the ranks' weights."""

    kind: Literal["average"] = "average"
    lr: ClassVar[float] = 1.0
    momentum: ClassVar[float] = 0.0


class OuterSGDSettings(Settings):
    """theta <- theta - lr * d. SparseLoCo's (Sarfi et al. 2025, 2508.15706), with lr 1."""

    kind: Literal["sgd"] = "sgd"
    lr: float = Field(1.0, gt=0)
    momentum: ClassVar[float] = 0.0


class NesterovSettings(Settings):
    """b <- momentum * b + d; theta <- theta - lr * (d + momentum * b). DiLoCo's (Douillard et al. 2023, 2311.08105)."""

    kind: Literal["nesterov"] = "nesterov"
    lr: float = Field(0.7, gt=0)
    momentum: float = Field(0.9, gt=0, lt=1)


def _by_name(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


OuterSettings: TypeAlias = Annotated[
    Annotated[AverageSettings | OuterSGDSettings | NesterovSettings, Field(discriminator="kind")],
    BeforeValidator(_by_name),
]
"""Settings with a `kind`, or its name alone, such as "average"."""


class Outer:
    """The outer optimizer: the same state and the same bits on every rank.

    Args:
        settings: what to do with the pseudo-gradient d = 1/n sum_r (theta - theta_r), theta_r being the weights of rank
            r after its local steps from theta.
    """

    def __init__(self, settings: AverageSettings | OuterSGDSettings | NesterovSettings) -> None:
        self._settings = settings
        self._momentum: dict[str, Tensor] = {}

    def step(self, name: str, weights: Tensor, pseudo_gradient: Tensor) -> None:
        """Move the shared weights of one parameter, in place.

        Args: fp32 tensors of one shape; the pseudo-gradient's memory may be overwritten.
        """
        lr, momentum = self._settings.lr, self._settings.momentum
        if momentum:
            if name not in self._momentum:
                self._momentum[name] = torch.zeros_like(weights)
            velocity = self._momentum[name].mul_(momentum).add_(pseudo_gradient)
            pseudo_gradient.add_(velocity, alpha=momentum)
        weights.sub_(pseudo_gradient, alpha=lr)

    def state_dict(self) -> dict[str, Any]:
        """A copy of the momentum, by parameter name."""
        return {name: value.clone() for name, value in self._momentum.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what state_dict() gave."""
        self._momentum = {name: value.clone() for name, value in state.items()}
