"""What the method of a run will send and keep: each method's own forecast, asked with what it needs to know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import nn

from thinwire.comm.allreduce import AllReduceSettings, forecast_allreduce
from thinwire.comm.forecast import Forecast, Parameter, Seat
from thinwire.dist.engine.ddp import DDPSettings
from thinwire.dist.plan.trace import StepTrace, ddp_buckets

if TYPE_CHECKING:
    from thinwire.dist.config import RunConfig


@dataclass(frozen=True)
class Subject:
    """A run whose cost is asked. model: on the meta device. trace: of one of its micro-batches."""

    config: RunConfig
    model: nn.Module
    trace: StepTrace

    @property
    def parameters(self) -> list[Parameter]:
        """In the model's order."""
        return [Parameter(n, p.shape, p.dtype, p.requires_grad) for n, p in self.model.named_parameters()]

    def buckets(self, settings: DDPSettings) -> list[list[Parameter]]:
        """DDP's, in the order in which backward fills them."""
        known = {parameter.name: parameter for parameter in self.parameters}
        tensors = dict(self.model.named_parameters())
        came = [(name, tensors[name]) for name, _ in self.trace.ready]
        names = ddp_buckets(came, int(settings.bucket_mb * 1e6), dist._DEFAULT_FIRST_BUCKET_BYTES)
        return [[known[name] for name in bucket] for bucket in names]


def forecast_run(subject: Subject, seat: Seat) -> Forecast:
    """What the rank in this seat will send in a step, and keep.

    Raises:
        ValueError: the method's settings do not fit this model or these levels.
    """
    config = subject.config
    match config.method:
        case AllReduceSettings():
            assert isinstance(config.engine, DDPSettings)
            return forecast_allreduce(config.method, subject.buckets(config.engine), seat)
        case _:
            raise ValueError(f"method.kind: {config.method.kind} has no forecast")
