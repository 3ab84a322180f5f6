"""AdamW and SGD with decoupled weight decay, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

import torch
from pydantic import Field, model_validator
from torch import nn

from thinwire.comm.settings import Settings


class AdamWSettings(Settings):
    """Loshchilov and Hutter 2017 (1711.05101). lr: the peak of the schedule. weight_decay: of matrices only."""

    kind: Literal["adamw"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)


class SGDSettings(Settings):
    """SGD with momentum. lr: the peak of the schedule. weight_decay: decoupled, of matrices only."""

    kind: Literal["sgd"] = "sgd"
    lr: float = Field(0.1, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> SGDSettings:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov: true needs momentum above 0")
        return self


OptimizerSettings: TypeAlias = Annotated[AdamWSettings | SGDSettings, Field(discriminator="kind")]


class ScheduleSettings(Settings):
    """How the learning rate goes: up linearly for warmup_steps, then as `kind` says.

    decay_steps: step at which the cosine reaches its end; "auto" = train.steps.
    final: learning rate at the end of the cosine, as a share of the peak.
    """

    kind: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    decay_steps: Annotated[int, Field(gt=0)] | Literal["auto"] = "auto"
    final: float = Field(0.1, ge=0, le=1)


class SGD(torch.optim.SGD):
    """x <- (1 - lr * weight_decay) x - lr * momentum(g): torch's own SGD would put the decay into the momentum."""

    def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
        super().__init__(groups, weight_decay=0.0, **options)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.mul_(1 - group["lr"] * group["decoupled_decay"])
        loss: float | None = super().step(closure)
        return loss


@dataclass(frozen=True)
class OptimizerPlan:
    """An optimizer that is not built yet: factory(groups, **options)."""

    factory: Callable[..., torch.optim.Optimizer]
    groups: list[dict[str, Any]]
    options: dict[str, Any]


def plan_optimizer(settings: AdamWSettings | SGDSettings, model: nn.Module) -> OptimizerPlan:
    """The optimizer over all parameters that learn, weight decay on those with two or more dimensions."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.dim() >= 2]
    others = [p for p in parameters if p.dim() < 2]
    decays = [(params, decay) for params, decay in ((matrices, settings.weight_decay), (others, 0.0)) if params]
    if isinstance(settings, SGDSettings):
        return OptimizerPlan(
            SGD,
            [{"params": params, "decoupled_decay": decay} for params, decay in decays],
            {"lr": settings.lr, "momentum": settings.momentum, "nesterov": settings.nesterov},
        )
    return OptimizerPlan(
        torch.optim.AdamW,
        [{"params": params, "weight_decay": decay} for params, decay in decays],
        {"lr": settings.lr, "betas": (settings.beta1, settings.beta2), "eps": settings.eps, "fused": True},
    )


def build_optimizer(settings: AdamWSettings | SGDSettings, model: nn.Module) -> torch.optim.Optimizer:
    """The planned optimizer, on the model's own parameters."""
    plan = plan_optimizer(settings, model)
    return plan.factory(plan.groups, **plan.options)


def learning_rate(peak: float, schedule: ScheduleSettings, step: int, total_steps: int) -> float:
    """Learning rate of step `step` (the first is 0).

    Warm-up: peak * (step + 1) / warmup_steps. Then peak, or
    peak * (final + (1 - final) * (1 + cos(pi * t)) / 2) with t going from 0 to 1 up to decay_steps, and final after it.
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return peak
    end = total_steps if schedule.decay_steps == "auto" else schedule.decay_steps
    progress = min(1.0, (step - schedule.warmup_steps) / max(1, end - schedule.warmup_steps))
    return peak * (schedule.final + (1 - schedule.final) * 0.5 * (1 + math.cos(math.pi * progress)))
