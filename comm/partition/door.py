"""tw.partition(): the one call by which a model and its optimizer are sharded, each state over a level of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.optim import Optimizer

from thinwire.comm.meter import TrafficMeter
from thinwire.comm.partition.blocks import choose_blocks, prefetch_blocks
from thinwire.comm.partition.first_weights import check_at_first_forward
from thinwire.comm.partition.gather import Gather
from thinwire.comm.partition.gradient_shard import GradientShard
from thinwire.comm.partition.levels import Levels, MachineMesh, levels_of
from thinwire.comm.partition.micro_batches import MicroBatches
from thinwire.comm.partition.model_checks import (
    WEIGHTS,
    check_compute_dtype,
    check_factory,
    check_model,
    check_optimizer,
    placeholders,
    try_optimizer,
)
from thinwire.comm.partition.optimizer import PartitionedOptimizer, PartitionedUnit
from thinwire.comm.partition.ownership import Ownership
from thinwire.comm.partition.parameter_groups import build_optimizer, name_groups
from thinwire.comm.partition.placement import Placement, place
from thinwire.comm.partition.process_groups import StateMeshes, cuts_of
from thinwire.comm.partition.settings import PartitionSettings
from thinwire.comm.partition.unit import Unit, find_units
from thinwire.comm.partition.weight_shard import WeightShard
from thinwire.comm.partition.wires.gradients import GradientWireSettings, formats_of
from thinwire.comm.partition.wires.weights import SameWeights, UpdateWireSettings, build_gather_wire, build_update_wire
from thinwire.comm.queue import CommQueue, open_queue
from thinwire.comm.rank_names import name_ranks
from thinwire.comm.same_weights import check_same_weights


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
    reach count as having gradient 0. On a meta device call model.to_empty() and initialise after this call. Whoever
    changes weights later does so in place on every rank, and not through .data, of which torch keeps no count.

    Args:
        model: fp32 parameters (bf16 ones with weights="bf16"), equal on all ranks; changed in place.
        mesh: the levels of the machine: world.mesh, or a DeviceMesh of all ranks with named dimensions, slowest first.
        optimizer: class or factory, called with the rows that this rank owns, fp32, and `options`: torch.optim.AdamW.
            It must work element by element. Called twice: the first time on placeholders, to refuse bad options.
        preset: zero1, zero2, zero3, hsdp, mics, hpz or frontier; params, grads, optim and secondary override it.
        params, grads, optim: level over which each is sharded, none faster than the one before; "rank" = whole on each
            rank. Default: node, node, world.
        secondary: level faster than params that keeps its share of the weights between gathers; default: none.
        units: modules that are gathered one at a time, when their forward() is called; default: the members of the
            outermost ModuleLists. What is in none of them is a unit of its own.
        parameter_groups: dicts as of torch.optim whose "params" are parameters, names or patterns such as "*.bias"; a
            parameter belongs to the first group that names it. Default: all with requires_grad, in one group.
        weights: what shards are kept in; with "bf16" owners keep fp32 masters, begun from the values before rounding.
        compute_dtype: torch.bfloat16 gathers and computes in it, inputs cast; default: the weights' dtype.
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
    check_factory(optimizer)
    check_model(model, settings.weights)
    check_compute_dtype(compute_dtype)
    _check_numbers(micro_batches=micro_batches, prefetch=prefetch)
    blocks = choose_blocks(model, units)
    groups = name_groups(model, parameter_groups)
    rank, size = _place(queue)
    levels = levels_of(mesh, rank=rank, world_size=size)
    placement = place(
        levels, params=settings.params, grads=settings.grads, optim=settings.optim, secondary=settings.secondary
    )
    formats = formats_of(settings.gradients, levels, placement)
    # What reaches no other rank is not rounded for its journey.
    gather_wire = build_gather_wire(settings.gather) if levels.size(placement.params) > 1 else None
    update = settings.update if levels.size(placement.params) < levels.size(placement.optim) else SameWeights()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    ownership = Ownership({name: parameter.shape for name, parameter in trained.items()}, cuts_of(levels, placement))
    owner = levels.number(rank, placement.optim)
    build = partial(build_optimizer, optimizer, groups, options)
    on_meta = next(model.parameters()).is_meta
    device_type = next(model.parameters()).device.type
    try_optimizer(build, placeholders(ownership, owner, "cpu" if on_meta else device_type))

    beyond = queue if queue is not None else _open_queue(levels, timeout_s)
    try:
        check_same_weights({} if on_meta else dict(model.named_parameters()), beyond, method="partition")
    except ValueError:
        if queue is None:
            beyond.close()
            beyond.monitor.close()
        raise
    number = _partitions.get(beyond, 0)
    _partitions[beyond] = number + 1
    inside = beyond.beside(f"inside{number}")
    originals = _round_weights(model, trained, ownership, owner, settings.weights)
    meshes = StateMeshes(levels, placement, _device_type(beyond) if on_meta else device_type, timeout_s)
    _shard(model, blocks, meshes, compute_dtype, prefetch)
    all_units = find_units(model)
    gathers, parts = [], []
    for unit in all_units:
        gather = Gather(unit, levels, placement, gather_wire, inside)
        unit.module.set_custom_all_gather(gather)
        gathers.append(gather)
        if unit.shapes:
            parts.append(_partition_unit(unit, gather, levels, placement, formats, update))
    frozen = [unit for unit in all_units if not unit.shapes]
    separate = settings.weights != "fp32" or not build_update_wire(update).is_exact
    for part in parts:
        part.build_masters(meshes, separate=separate)
        for name in () if on_meta else originals.keys() & part.masters.keys():
            part.own.begin_from(name, originals[name])
    masters = {name: master for part in parts for name, master in part.masters.items()}
    masters = {name: masters[name] for name in trained}
    inner = build(masters)
    check_optimizer(inner, masters)
    if on_meta:
        check_at_first_forward(model, all_units, beyond, levels, placement)
    backward = MicroBatches(parts, inside, beyond, rank=rank, seed=settings.seed, frozen=frozen)
    return PartitionedOptimizer(
        parts,
        inner,
        beyond,
        levels,
        placement,
        backward,
        clip_norm=settings.clip_norm,
        micro_batches=micro_batches,
        seed=settings.seed,
        gathers=gathers,
        owns_queue=queue is None,
    )


def _shard(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    meshes: StateMeshes,
    compute_dtype: torch.dtype | None,
    ahead: int,
) -> None:
    kept = next(model.parameters()).dtype
    # Without a param_dtype FSDP2 would not cast the inputs.
    param_dtype = compute_dtype or (None if kept == torch.float32 else kept)
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
    for module in [*blocks, model]:
        fully_shard(module, mesh=meshes.params, mp_policy=policy)
    assert isinstance(model, FSDPModule)
    model.set_gradient_divide_factor(1.0)  # sums: the mean is taken once, when all levels have been added
    model.set_force_sum_reduction_for_comms(True)
    model.set_reduce_scatter_unused_params(True)
    model.set_requires_all_reduce(False)  # step() sends what goes beyond the grads level, once
    prefetch_blocks(model, blocks, ahead)


def _partition_unit(
    unit: Unit,
    gather: Gather,
    levels: Levels,
    placement: Placement,
    formats: Mapping[str, GradientWireSettings],
    update: UpdateWireSettings,
) -> PartitionedUnit:
    ownership = Ownership(unit.shapes, cuts_of(levels, placement))
    feedback = frozenset(name for name, one in formats.items() if one.feedback)
    wires = {name: one.build() for name, one in formats.items()}
    gradients = GradientShard(ownership, levels, placement, wires, feedback=feedback)
    weights = WeightShard(ownership, levels, placement, build_update_wire(update))
    return PartitionedUnit(unit, ownership, gradients, weights, gather)


def _round_weights(
    model: nn.Module, trained: Mapping[str, nn.Parameter], ownership: Ownership, owner: int, weights: str
) -> dict[str, Tensor]:
    """Give all parameters the dtype that they are kept in; returns the owner's rows as they were before."""
    dtype = WEIGHTS[weights]
    originals = {}
    for name, parameter in model.named_parameters():
        if parameter.dtype == dtype:
            continue
        if name in trained:
            start, stop = ownership.rows(name, owner)
            originals[name] = parameter.detach()[start:stop].clone()
        parameter.data = parameter.data.to(dtype)
    return originals


_partitions: WeakKeyDictionary[CommQueue, int] = WeakKeyDictionary()  # how many models each queue serves


def _open_queue(levels: Levels, timeout_s: float) -> CommQueue:
    queue = open_queue(timeout_s=timeout_s)
    queue.meter = TrafficMeter([levels.joining(peer) for peer in range(levels.world_size)])
    return queue


def _place(queue: CommQueue | None) -> tuple[int, int]:
    """This rank, and how many there are."""
    if queue is not None:
        if list(queue.peers) != list(range(queue.size)):
            raise ValueError(
                f"queue: it joins {name_ranks(queue.peers)}, and each state is shared out among all ranks of the job; "
                "give a queue over all of them, such as world.queue"
            )
        return queue.rank, queue.size
    if not dist.is_initialized():
        raise ValueError(
            "torch.distributed is not initialised: call thinwire.init() or init_process_group() before partition()"
        )
    return dist.get_rank(), dist.get_world_size()


def _device_type(queue: CommQueue) -> str:
    """Where a model goes that is on the meta device as yet: where the group can send from."""
    found = {device.type for device in queue.group._device_types}
    return "cuda" if "cuda" in found and torch.cuda.is_available() else "cpu"


def _check_numbers(**given: int) -> None:
    for name, value in given.items():
        least = 1 if name == "micro_batches" else 0
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: {value!r}; give an integer of at least {least}")
