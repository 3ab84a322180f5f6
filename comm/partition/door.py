"""tw.partition(): the one call by which a model and its optimizer are sharded, each state over a level of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

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
from thinwire.comm.partition.wires.gradients import formats_of
from thinwire.comm.partition.wires.weights import build_gather_wire, build_update_wire
from thinwire.comm.queue import CommQueue, open_queue


def partition(
    model: nn.Module,
    mesh: MachineMesh | DeviceMesh,
    optimizer: Callable[..., Optimizer],
    *,
    preset: str | None = None,
    params: str | None = None,
    grads: str | None = None,
    optim: str | None = None,
    secondary: str | None = None,
    units: Sequence[nn.Module] | None = None,
    parameter_groups: Sequence[Mapping[str, Any]] | None = None,
    weights: Literal["fp32", "bf16"] = "fp32",
    compute_dtype: torch.dtype | None = None,
    gather: str | Mapping[str, Any] = "same",
    update: str | Mapping[str, Any] = "same",
    gradients: Mapping[str, str | Mapping[str, Any]] | None = None,
    clip_norm: float = 0.0,
    micro_batches: int = 1,
    prefetch: int = 1,
    queue: CommQueue | None = None,
    timeout_s: float = 60.0,
    seed: int = 0,
    **options: Any,
) -> PartitionedOptimizer:
    """Shard parameters, gradients and optimizer state, each over a level of its own, and return the optimizer.

    ZeRO (Rajbhandari et al. 2019, 1910.02054) with three degrees of sharding as in AMSP (Chen et al. 2023, 2311.00257)
    and in the 3-level scheme for Frontier (Xu et al. 2025, 2501.04266). With levels of L_0 (fastest), L_1, ... groups,
    W ranks and k micro-batches of gradients g_r,i, a step is

        inside grads, for each i:   t <- t + sum of g_r,i over the ranks of the grads level    (reduce-scatter)
        beyond grads, once:         g <- 1/(W k) sum of t over the world                       (reduce-scatter)
        on each owner:              theta <- optimizer(theta, min(1, clip_norm / |g|) g)
        beyond params, once:        each rank's parameter shard follows                         (all-gather)

    so that the links beyond grads carry gradients once per step however many micro-batches there are, and a rank
    receives psi / (L_0 ... L_{l-1}) (L_l - 1) / L_l elements at level l for a unit of psi. 1/k is the caller's: divide
    the loss, as with DistributedDataParallel. Unlike the papers, each level has a wire format of its own, any nested
    triple is allowed, and sums are divided once, so SGD sees the same mean as with DDP.

    The model becomes one of torch's fully_shard() modules: train it as before. Gradients never appear in .grad;
    step() forgets them. Every rank must run the same modules in the same order. Parameters that a backward did not
    reach count as having gradient 0. On a meta device call model.to_empty() and initialise after this call.

    Args:
        model: fp32 parameters (bf16 ones with weights="bf16"), equal on all ranks; changed in place.
        mesh: the levels of the machine: world.mesh, or a DeviceMesh of all ranks with named dimensions, slowest first.
        optimizer: class or factory, called with the rows that this rank owns, fp32, and `options`: torch.optim.AdamW.
            It must work element by element. Called twice: the first time on placeholders, to refuse bad options.
        preset: zero1, zero2, zero3, hsdp, mics, hpz or frontier; params, grads, optim and secondary override it.
        params, grads, optim: level over which each is sharded, none faster than the one before; "rank" = whole on each
            rank. Default: node, node, world.
        secondary: level faster than params that keeps its share of the weights between gathers; default: none.
        units: modules that are gathered one at a time; default: the members of the outermost ModuleLists. What is in
            none of them is a unit of its own.
        parameter_groups: dicts as of torch.optim whose "params" are parameters, names or patterns such as "*.bias"; a
            parameter belongs to the first group that names it. Default: all with requires_grad, in one group.
        weights: what shards are kept in; with "bf16" owners keep fp32 masters, begun from the values before rounding.
        compute_dtype: torch.bfloat16 computes and gathers in it; default: the weights' dtype.
        gather: wire of weights in forward and backward: "same" = as they are, or a format.
        update: wire of changed weights beyond params: "same", or a format such as {"kind": "difference", "bits": 4}.
        gradients: wire by level, such as {"world": "int4"}; default: fp32.
        clip_norm: largest norm of the mean gradient; 0 = no limit.
        micro_batches: backwards per step, for predicted_bytes() alone.
        prefetch: units gathered ahead of the one that computes, in forward and backward; 0 = none.
        queue: CommQueue over all ranks; default: a new one.
        timeout_s: deadline of one operation, in seconds, when no queue is given; torch's groups get it too.
        seed: of stochastic rounding; the same on every rank.
        options: for the optimizer, such as lr=3e-4.
    Returns: the optimizer: step(), zero_grad(), clip_grad_norm_(), state_dict(); schedulers take it.
    Raises:
        ValueError: before anything is sent or changed: a setting is not allowed, or the model, the mesh or the
            optimizer cannot be used; or, on every rank, the ranks begin with different weights.
        NonFiniteGradientError: from step(), on every rank; no weight or state has changed.
        PeerLostError, PeerLateError, PeerFailedError: from forward, backward or step(), when a rank is gone or overdue.

    Example:
        world = thinwire.init()
        optimizer = thinwire.partition(
            model, world.mesh, torch.optim.AdamW, params="pair", grads="node", optim="world", lr=3e-4
        )
    """
    given = {"preset": preset, "params": params, "grads": grads, "optim": optim, "secondary": secondary}
    settings = PartitionSettings.model_validate(
        {
            **{name: level for name, level in given.items() if level is not None},
            "weights": weights,
            "gather": gather,
            "update": update,
            "gradients": gradients or {},
            "clip_norm": clip_norm,
            "seed": seed,
        }
    )
    return enter(
        model,
        mesh,
        optimizer,
        settings,
        units=units,
        parameter_groups=parameter_groups,
        compute_dtype=compute_dtype,
        micro_batches=micro_batches,
        prefetch=prefetch,
        queue=queue,
        timeout_s=timeout_s,
        **options,
    )


def enter(
    model: nn.Module,
    mesh: MachineMesh | DeviceMesh,
    optimizer: Callable[..., Optimizer],
    settings: PartitionSettings,
    *,
    units: Sequence[nn.Module] | None = None,
    parameter_groups: Sequence[Mapping[str, Any]] | None = None,
    compute_dtype: torch.dtype | None = None,
    micro_batches: int = 1,
    prefetch: int = 1,
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
    formats = formats_of(settings.gradients, levels, placement)
    feedback = frozenset(name for name, one in formats.items() if one.feedback)
    wires = {name: one.build() for name, one in formats.items()}
    gradients = GradientShard(ownership, levels, placement, wires, feedback=feedback)
    weights = WeightShard(ownership, levels, placement, build_update_wire(settings.update))
    gather = Gather(unit, levels, placement, build_gather_wire(settings.gather), queue)
    return PartitionedUnit(unit, ownership, gradients, weights, gather)
