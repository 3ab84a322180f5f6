"""The methods that a YAML file can name under `method:`, and how each enters the training loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, TypeAlias

from pydantic import Field
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from thinwire.comm.allreduce import AllReduceSettings, allreduce
from thinwire.comm.compress.door import enter as enter_compress
from thinwire.comm.compress.settings import CompressSettings
from thinwire.comm.forecast import Seat
from thinwire.comm.local_sgd.door import LocalSGDSettings
from thinwire.comm.local_sgd.door import enter as enter_local_sgd
from thinwire.comm.method import Method
from thinwire.comm.partition.settings import PartitionSettings
from thinwire.dist.gossip_run import GossipRunSettings
from thinwire.dist.mesh import Mesh
from thinwire.dist.onebyte_run import OneByteRunSettings
from thinwire.dist.world import World

MethodSettings: TypeAlias = Annotated[
    AllReduceSettings
    | CompressSettings
    | LocalSGDSettings
    | GossipRunSettings
    | OneByteRunSettings
    | PartitionSettings,
    Field(discriminator="kind"),
]

# Settings that mean nothing to a run by OneByteSPSA, and why.
_UNUSED_BY_ONEBYTE = {
    "optimizer": "is the optimizer itself: method.lr and method.weight_decay are its settings",
    "engine": "has no backward pass that an engine could help with",
    "train.clip_norm": "has no gradient to clip: method.robust limits what a slope may do",
    "checkpoint.every_steps": "keeps a log of every round, which is the checkpoint",
    "checkpoint.keep": "keeps a log of every round, which is the checkpoint",
}

# Settings that mean nothing to a gossip run, and why.
_UNUSED_BY_GOSSIP = {"engine": "has no collective in its backward pass that an engine could help with"}

# A setting of tw.partition() that a run says elsewhere.
_UNUSED_BY_PARTITION = {"method.clip_norm": "clips at train.clip_norm here"}

# What trains by which engine; the first is the default.
_ENGINES = {"partition": ("fsdp2",), "allreduce": ("ddp", "deepspeed")}
_OTHERS_ENGINES = ("ddp",)


def unused_by(settings: MethodSettings) -> Mapping[str, str]:
    """The settings, by path, that a run by this method has no use for, each with the reason."""
    if isinstance(settings, GossipRunSettings):
        return _UNUSED_BY_GOSSIP
    if isinstance(settings, PartitionSettings):
        return _UNUSED_BY_PARTITION
    return _UNUSED_BY_ONEBYTE if isinstance(settings, OneByteRunSettings) else {}


def engines_for(method: str) -> tuple[str, ...]:
    """The kinds of engine that a kind of method trains with, the default first."""
    return _ENGINES.get(method, _OTHERS_ENGINES)


def methods_for(engine: str) -> tuple[str, ...]:
    """The kinds of method that train with a kind of engine other than ddp."""
    return tuple(method for method, engines in _ENGINES.items() if engine in engines)


def attach(
    settings: MethodSettings,
    *,
    model: DistributedDataParallel,
    optimizer: Optimizer,
    world: World,
    clip_norm: float = 0.0,
) -> Method:
    """Let the configured method into the training run by its own door, and return its handle.

    Args:
        clip_norm: largest norm of the gradient, for a method that clips before it compresses; 0 = no limit.
    """
    match settings:
        case AllReduceSettings():
            groups = exact_groups(settings.exact_within, world.mesh)
            return allreduce(model, dtype=settings.dtype, exact_within=groups, queue=world.queue)
        case CompressSettings():
            return enter_compress(
                model,
                settings,
                inner=exact_groups(settings.exact_within, world.mesh),
                clip_norm=clip_norm if settings.clip == "before" else 0.0,
                optimizer=optimizer,
                queue=world.queue,
            )
        case LocalSGDSettings():
            return enter_local_sgd(model, optimizer, settings, queue=world.queue)
        case PartitionSettings():
            raise ValueError("method: partition shards the model; engine fsdp2 trains by it")
        case GossipRunSettings():
            raise ValueError("method: gossip has no step in common to all ranks; gossip_train.py trains by it")
        case OneByteRunSettings():
            raise ValueError(
                "method: onebyte is an optimizer that needs no backward pass; zeroth_order.py trains by it"
            )


def exact_groups(level: str | None, machine: Mesh | Seat) -> Sequence[Sequence[int]] | None:
    """The groups of a level, for method.exact_within; None where each rank is a group of its own.

    Raises:
        ValueError: there is no such level, or it holds all ranks.
    """
    if level is None:
        return None
    try:
        groups = machine.groups(level)
    except ValueError as error:
        raise ValueError(f"method.exact_within: {error}; name one of them, or give null") from None
    size = len(groups[0])
    if len(groups) == 1 and size > 1:
        raise ValueError(
            f"method.exact_within: {level} holds all {size} ranks, which leaves nothing to send between groups; "
            "name a faster level, or give null"
        )
    return groups if size > 1 else None
