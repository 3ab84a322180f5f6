"""The methods that a YAML file can name under `method:`, and how each enters the training loop."""

from __future__ import annotations

from typing import TypeAlias

from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from thinwire.comm.allreduce import AllReduceSettings, allreduce
from thinwire.comm.method import Method
from thinwire.dist.world import World

# A second method makes this Annotated[AllReduceSettings | OtherSettings, Field(discriminator="kind")],
# and adds one case below.
MethodSettings: TypeAlias = AllReduceSettings


def attach(settings: MethodSettings, *, model: DistributedDataParallel, optimizer: Optimizer, world: World) -> Method:
    """Let the configured method into the training run by its own door, and return its handle."""
    match settings:
        case AllReduceSettings():
            return allreduce(model, dtype=settings.dtype, queue=world.queue)
