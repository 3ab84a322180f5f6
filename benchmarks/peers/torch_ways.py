"""torch's own: DDP with its hooks, post-local SGD, FSDP2, HSDP; DiLoCo in a few lines of torch; and no exchange."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook, fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.nn.parallel import DistributedDataParallel

from peers.peer import EVERY, OUTER_LR, OUTER_MOMENTUM, Job, Peer
from thinwire.comm.partition.blocks import find_blocks
from thinwire.dist.data import Batch
from thinwire.dist.engine import DDPSettings
from thinwire.dist.world import World

POWER_SGD_RANK = 16


def alone(job: Job, world: World) -> Peer:
    """Every rank trains a model of its own: what computing takes while all of them compute."""
    model = job.model()
    return Peer(job, model, model, job.optimizer(model))


def ddp(job: Job, world: World, hook: str = "") -> Peer:
    model = job.model()
    assert isinstance(job.config.engine, DDPSettings)
    # The PowerSGD hook fails on gloo with more than one bucket.
    bucket_mb = 1e6 if hook == "powersgd" else job.config.engine.bucket_mb
    wrapped = DistributedDataParallel(
        model, process_group=world.group, bucket_cap_mb=bucket_mb, gradient_as_bucket_view=True
    )
    if hook == "bf16":
        wrapped.register_comm_hook(world.group, bf16_compress_hook)
    elif hook == "fp16":
        wrapped.register_comm_hook(world.group, fp16_compress_hook)
    elif hook == "powersgd":
        # 2 is the earliest that the hook allows, with error feedback and warm start as by default.
        state = PowerSGDState(world.group, matrix_approximation_rank=POWER_SGD_RANK, start_powerSGD_iter=2)
        wrapped.register_comm_hook(state, powerSGD_hook)
    else:
        assert not hook, hook
    return Peer(job, model, wrapped, job.optimizer(model))


def post_local_sgd(job: Job, world: World) -> Peer:
    """All-reduce for one round, then local steps and averages of the weights (Lin et al. 2018, 1808.07217)."""
    model = job.model()
    wrapped = DistributedDataParallel(model, process_group=world.group, gradient_as_bucket_view=True)
    own, _ = dist.new_subgroups(group_size=1)
    wrapped.register_comm_hook(PostLocalSGDState(world.group, own, start_localSGD_iter=EVERY), post_localSGD_hook)
    averager = PeriodicModelAverager(period=EVERY, warmup_steps=EVERY, process_group=world.group)
    return Peer(job, model, wrapped, PostLocalSGDOptimizer(job.optimizer(model), averager))


class Sharded(Peer):
    """torch's fully_shard, over all ranks (FSDP2) or over half of them with replicas (HSDP)."""

    forward_is_collective = True


def fsdp2(job: Job, world: World) -> Peer:
    return _sharded(job, (world.size,), ("world",))


def hsdp(job: Job, world: World) -> Peer:
    """Shards over a host's ranks; where a host has one, over pairs of hosts."""
    within = job.local_size if job.local_size > 1 else 2
    return _sharded(job, (world.size // within, within), ("world", "node"))


def _sharded(job: Job, sizes: tuple[int, ...], names: tuple[str, ...]) -> Peer:
    model = job.model()
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    for module in [*find_blocks(model), model]:
        fully_shard(module, mesh=mesh)
    return Sharded(job, model, model, job.optimizer(model))


class DiLoCo(Peer):
    """Plain DiLoCo (2311.08105): H local steps, fp32 mean of the differences, outer Nesterov."""

    def __init__(self, job: Job, model: nn.Module) -> None:
        super().__init__(job, model, model, job.optimizer(model))
        self._parameters = list(model.parameters())
        self._start = [p.detach().clone() for p in self._parameters]
        self._outer = torch.optim.SGD(self._start, lr=OUTER_LR, momentum=OUTER_MOMENTUM, nesterov=True)
        self._steps = 0

    def step(self, batch: Batch, lr: float) -> float:
        loss = super().step(batch, lr)
        self._steps += 1
        if self._steps % EVERY == 0 or self._steps == self.job.config.train.steps:
            self._synchronise()
        return loss

    @torch.no_grad()
    def _synchronise(self) -> None:
        flat = torch.cat([(s - p).flatten() for s, p in zip(self._start, self._parameters, strict=True)])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for start, delta in zip(self._start, flat.split([p.numel() for p in self._parameters]), strict=True):
            start.grad = delta.view_as(start)
        self._outer.step()
        for parameter, start in zip(self._parameters, self._start, strict=True):
            parameter.copy_(start)


def diloco(job: Job, world: World) -> Peer:
    return DiLoCo(job, job.model())
