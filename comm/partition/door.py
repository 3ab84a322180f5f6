"""tw.partition(): the one call by which a model and its optimizer are sharded, each state over a level of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.optim import Optimizer

from thinwire.comm.partition.gather import Gather
from thinwire.comm.partition.gradient_shard import GradientShard
from thinwire.comm.partition.levels import Levels, MachineMesh, levels_of
from thinwire.comm.partition.micro_batches import MicroBatches
from thinwire.comm.partition.optimizer import PartitionedOptimizer, PartitionedUnit
from thinwire.comm.partition.ownership import Ownership
from thinwire.comm.partition.placement import Placement, place
from thinwire.comm.partition.process_groups import StateMeshes, cuts_of
from thinwire.comm.partition.settings import PartitionSettings
from thinwire.comm.partition.unit import Unit, find_units
from thinwire.comm.partition.weight_shard import WeightShard
from thinwire.comm.partition.wires.gradients import PlainGradients
from thinwire.comm.partition.wires.weights import build_gather_wire, build_update_wire
from thinwire.comm.queue import CommQueue, open_queue


def enter(
    model: nn.Module,
    mesh: MachineMesh | DeviceMesh,
    optimizer: Callable[..., Optimizer],
    settings: PartitionSettings,
    *,
    units: Sequence[nn.Module] | None = None,
    compute_dtype: torch.dtype | None = None,
    micro_batches: int = 1,
    queue: CommQueue | None = None,
    timeout_s: float = 60.0,
    **options: Any,
) -> PartitionedOptimizer:
    """partition() with its settings in one piece: what a configuration file gives."""
    beyond = queue or open_queue(timeout_s=timeout_s)
    inside = beyond.beside("gathers")
    levels = levels_of(mesh, rank=beyond.rank, world_size=beyond.size)
    placement = place(
        levels, params=settings.params, grads=settings.grads, optim=settings.optim, secondary=settings.secondary
    )
    device_type = next(model.parameters()).device.type
    meshes = StateMeshes(levels, placement, device_type, timeout_s)
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for module in [*(find_blocks(model) if units is None else units), model]:
        fully_shard(module, mesh=meshes.params, mp_policy=policy)
    assert isinstance(model, FSDPModule)
    model.set_gradient_divide_factor(1.0)  # sums: the mean is taken once, when all levels have been added
    model.set_force_sum_reduction_for_comms(True)
    model.set_reduce_scatter_unused_params(True)
    model.set_requires_all_reduce(False)  # step() sends what goes beyond the grads level, once
    parts = [_partition_unit(unit, levels, placement, settings, inside) for unit in find_units(model)]
    separate = settings.weights != "fp32" or not build_update_wire(settings.update).is_exact
    for part in parts:
        part.build_masters(meshes, separate=separate)
        part.unit.module.set_custom_all_gather(part.gather)
    masters = {name: master for part in parts for name, master in part.masters.items()}
    inner = optimizer(list(masters.values()), **options)
    backward = MicroBatches(parts, inside, beyond, rank=levels.rank)
    return PartitionedOptimizer(
        parts,
        inner,
        beyond,
        levels,
        placement,
        backward,
        clip_norm=settings.clip_norm,
        micro_batches=micro_batches,
    )


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that are gathered one by one: the members of the outermost ModuleLists."""
    blocks: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList):
                blocks.extend(member for member in child if any(True for _ in member.parameters()))
            else:
                visit(child)

    visit(model)
    return blocks


def _partition_unit(
    unit: Unit, levels: Levels, placement: Placement, settings: PartitionSettings, queue: CommQueue
) -> PartitionedUnit:
    ownership = Ownership(unit.shapes, cuts_of(levels, placement))
    formats = {name: settings.gradients.get(name, PlainGradients()) for name in levels.names}
    feedback = frozenset(name for name, one in formats.items() if one.feedback)
    wires = {name: one.build() for name, one in formats.items()}
    gradients = GradientShard(ownership, levels, placement, wires, feedback=feedback)
    weights = WeightShard(ownership, levels, placement, build_update_wire(settings.update))
    gather = Gather(unit, levels, placement, build_gather_wire(settings.gather), queue)
    return PartitionedUnit(unit, ownership, gradients, weights, gather)
