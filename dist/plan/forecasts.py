"""What the method of a run will send and keep: each method's own forecast, asked with what it needs to know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from thinwire.comm.allreduce import AllReduceSettings
from thinwire.comm.compress.settings import CompressSettings
from thinwire.comm.forecast import Forecast, Parameter, Seat
from thinwire.comm.local_sgd.door import LocalSGDSettings
from thinwire.comm.partition.settings import PartitionSettings
from thinwire.dist.engine.ddp import DDPSettings
from thinwire.dist.gossip_run import GossipRunSettings
from thinwire.dist.onebyte_run import OneByteRunSettings
from thinwire.dist.plan.cluster import Cluster
from thinwire.dist.plan.gradients import forecast_gradients
from thinwire.dist.plan.run_forecasts import (
    forecast_gossip_run,
    forecast_onebyte_run,
    forecast_partition_run,
    with_experts,
    without_spread_experts,
)
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

    @property
    def buckets(self) -> list[list[Parameter]]:
        """Those of engine ddp, in the order in which backward fills them."""
        assert isinstance(self.config.engine, DDPSettings)
        known = {parameter.name: parameter for parameter in self.parameters}
        tensors = dict(self.model.named_parameters())
        came = [(name, tensors[name]) for name, _ in self.trace.ready]
        return [[known[name] for name in bucket] for bucket in ddp_buckets(came, self.config.engine.bucket_bytes)]


def forecast_run(subject: Subject, seat: Seat, cluster: Cluster | None = None) -> Forecast:
    """What the rank in this seat will send in a step, and keep.

    Args:
        cluster: whose links a method may choose by, as it would by measuring them.
    Raises:
        ValueError: the method's settings do not fit this model or these levels.
    """
    return with_experts(_forecast_method(subject, seat, cluster), subject, seat)


def _forecast_method(subject: Subject, seat: Seat, cluster: Cluster | None) -> Forecast:
    match subject.config.method:
        case AllReduceSettings() | CompressSettings() | LocalSGDSettings() as settings:
            return forecast_gradients(without_spread_experts(subject, seat), settings, seat)
        case PartitionSettings() as settings:
            return forecast_partition_run(subject, settings, seat)
        case GossipRunSettings() as settings:
            return forecast_gossip_run(subject, settings, seat, cluster)
        case OneByteRunSettings() as settings:
            return forecast_onebyte_run(subject, settings, seat)
