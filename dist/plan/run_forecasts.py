"""Forecasts of runs whose method does not average gradients in buckets, and of what experts and their balance add."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from thinwire.comm.allreduce import WIRE_DTYPES, AllReduceSettings
from thinwire.comm.balance.forecast import forecast_balance
from thinwire.comm.expert_parallel.forecast import ExpertLayer, forecast_experts
from thinwire.comm.forecast import Forecast, Parameter, Seat
from thinwire.comm.gossip.forecast import forecast_gossip
from thinwire.comm.gossip.graphs.links import Link, Links
from thinwire.comm.onebyte.forecast import forecast_membership, forecast_onebyte
from thinwire.comm.partition.blocks import find_blocks
from thinwire.comm.partition.forecast import forecast_partition, gathered_bytes
from thinwire.comm.partition.settings import PartitionSettings
from thinwire.comm.partition.traffic import UnitShapes, unit_shapes
from thinwire.dist.balance_run import NEAR
from thinwire.dist.engine.fsdp2 import FSDP2Settings, paths_of_the_run
from thinwire.dist.gossip_run import GossipRunSettings
from thinwire.dist.models.moe import MoEGPT, MoESettings
from thinwire.dist.onebyte_run import OneByteRunSettings
from thinwire.dist.optimizers import SGDSettings, plan_optimizer
from thinwire.dist.plan.cluster import Cluster
from thinwire.dist.plan.gradients import statistics_of
from thinwire.dist.plan.states import replica_states

if TYPE_CHECKING:
    from thinwire.dist.plan.forecasts import Subject


def forecast_partition_run(subject: Subject, settings: PartitionSettings, seat: Seat) -> Forecast:
    """By engine fsdp2; memory also counts the weights that are whole while a step computes: `gathered`.

    Raises:
        ValueError: the levels that method names do not exist or do not nest, or one cannot have its format.
    """
    config, model = subject.config, subject.model
    assert isinstance(config.engine, FSDP2Settings), "RunConfig refuses other engines"
    _, micro_batches = config.train.share(seat.size)
    plan = plan_optimizer(config.optimizer, model)
    prefetch, compute_dtype = config.engine.prefetch, torch.bfloat16 if config.train.precision == "bf16" else None
    units = _reached_by_backward(unit_shapes(model, find_blocks(model)), subject, prefetch)
    with paths_of_the_run():
        forecast = forecast_partition(
            settings,
            units,
            seat,
            optimizer=plan.factory(plan.groups, **plan.options),
            names={id(parameter): name for name, parameter in model.named_parameters()},
            micro_batches=micro_batches,
            compute_dtype=compute_dtype,
        )
        gathered = gathered_bytes(settings, units, seat, prefetch=prefetch, compute_dtype=compute_dtype)
    return _with_memory(forecast, {"gathered": gathered})


def forecast_gossip_run(subject: Subject, settings: GossipRunSettings, seat: Seat, cluster: Cluster | None) -> Forecast:
    """Each rank is a machine with a model of its own.

    Raises:
        ValueError: settings do not fit so many machines.
    """
    machines = settings.machines
    if machines is not None and len(machines.machines) != seat.size:
        raise ValueError(
            f"method.machines.machines: {len(machines.machines)} addresses, but the cluster has {seat.size} ranks, "
            "each of which is a machine; name as many, or give method.machines=null"
        )
    algorithm, optimizer = settings.algorithm, subject.config.optimizer
    if algorithm.needs_sgd and not isinstance(optimizer, SGDSettings):
        raise ValueError(
            f"optimizer.kind: {optimizer.kind}, but method.algorithm: {algorithm.kind} corrects the step of SGD; give "
            "optimizer.kind=sgd, or method.algorithm=dpsgd"
        )
    forecast = forecast_gossip(
        settings,
        [parameter.numel for parameter in subject.parameters if parameter.trained],
        seat,
        statistics=statistics_of(subject) if settings.statistics == "mix" else 0,
        steps=subject.config.train.steps,
        links=None if cluster is None else links_of(cluster),
    )
    return _with_memory(forecast, replica_states(subject.config.optimizer, subject.parameters))


def forecast_onebyte_run(subject: Subject, settings: OneByteRunSettings, seat: Seat) -> Forecast:
    """No gradients and no optimizer states: the weights are all that is kept.

    Raises:
        ValueError: the graph is not one of so many ranks.
    """
    parameters = subject.parameters
    weights = {"params": sum(p.numel * p.dtype.itemsize for p in parameters)}
    if settings.membership is None:
        return _with_memory(forecast_onebyte(settings, parameters, seat), weights)
    schedule = subject.config.schedule
    rate_changes = schedule.kind != "constant" or bool(schedule.warmup_steps)
    return _with_memory(forecast_membership(settings, parameters, seat, rate_changes=rate_changes), weights)


def links_of(cluster: Cluster) -> Links:
    """What a job would measure between two ranks: the link of the fastest level that joins them."""
    *faster, slowest = [
        (level, Link(level.link_bps / level.ranks_per_link, level.latency_s)) for level in cluster.levels
    ]
    pairs: dict[tuple[int, int], Link] = {}
    for level, link in reversed(faster):
        for first in range(0, cluster.size, level.size):
            group = range(first, first + level.size)
            pairs |= {(a, b): link for a in group for b in group if a < b}
    return Links(slowest[1], pairs)


def without_spread_experts(subject: Subject, seat: Seat) -> Subject:
    """The run as DDP sees it, which leaves alone those experts of which each rank holds a share."""
    spread = {name for layer in _expert_layers(subject, seat) for name in layer.held}
    if not spread:
        return subject
    ready = tuple((name, share) for name, share in subject.trace.ready if name not in spread)
    return dataclasses.replace(subject, trace=dataclasses.replace(subject.trace, ready=ready))


def with_experts(forecast: Forecast, subject: Subject, seat: Seat) -> Forecast:
    """With the rows that travel and the gradients of experts, where these are spread, and the messages of balance."""
    shape, balance = subject.config.model, subject.config.balance
    if not isinstance(shape, MoESettings):
        return forecast
    micro_batch, micro_batches = subject.config.train.share(seat.size)
    parts, memory = [forecast], dict(forecast.memory_bytes)
    if layers := _expert_layers(subject, seat):
        assert shape.expert_parallel is not None
        assert isinstance(subject.config.method, AllReduceSettings), "RunConfig refuses other methods"
        memory |= replica_states(subject.config.optimizer, _held_parameters(subject, layers))
        ranks = seat.group(shape.expert_parallel)
        place = ranks.index(seat.rank)
        itemsize = 2 if subject.config.train.precision == "bf16" else 4
        parts.append(
            forecast_experts(
                layers,
                seat,
                ranks=ranks,
                replicas=[group[place] for group in seat.groups(shape.expert_parallel)],
                experts=shape.experts,
                rows=micro_batch * shape.context * shape.top_k,
                row_bytes=shape.width * itemsize,
                wire_dtype=WIRE_DTYPES[subject.config.method.dtype],
                micro_batches=micro_batches,
            )
        )
    if balance is not None:
        parts.append(
            forecast_balance(
                balance,
                layers=sum(shape.has_experts(layer) for layer in range(shape.layers)),
                num_experts=shape.experts,
                micro_batches=micro_batches,
                seat=seat,
                inner=seat.group(balance.within or NEAR) if balance.is_near else None,
            )
        )
    return Forecast(
        tuple(exchange for part in parts for exchange in part.exchanges),
        memory,
        tuple(remark for part in parts for remark in part.remarks),
    )


def _expert_layers(subject: Subject, seat: Seat) -> list[ExpertLayer]:
    """Those whose experts are spread.

    Raises:
        ValueError: there is no such level, or its groups cannot share the experts equally.
    """
    shape, model = subject.config.model, subject.model
    if not isinstance(shape, MoESettings) or shape.expert_parallel is None:
        return []
    assert isinstance(model, MoEGPT)
    try:
        parts = seat.size_of(shape.expert_parallel)
    except ValueError as error:
        raise ValueError(f"model.expert_parallel: {error}; name one of them, or give null") from None
    if shape.experts % parts:
        raise ValueError(
            f"model.experts: {shape.experts} cannot be shared equally by the {parts} ranks of a group, with "
            f"model.expert_parallel: {shape.expert_parallel}"
        )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        ExpertLayer(
            {names[id(p)]: p.numel() // parts for p in layer.experts.parameters()},
            frozenset(names[id(p)] for p in layer.experts.parameters() if p.requires_grad),
        )
        for layer in model.moe_layers
    ]


def _held_parameters(subject: Subject, layers: Sequence[ExpertLayer]) -> list[Parameter]:
    """Those of this rank, in the model's order: of experts that are spread, its share."""
    held = {name: numel for layer in layers for name, numel in layer.held.items()}
    return [
        dataclasses.replace(p, shape=torch.Size((held[p.name],))) if p.name in held else p for p in subject.parameters
    ]


def _reached_by_backward(units: Sequence[UnitShapes], subject: Subject, prefetch: int) -> list[UnitShapes]:
    """Which units a gradient goes through: those from the first use of a trained parameter on.

    FSDP2 fetches units ahead in backward too, and so some before them, in vain.
    """
    places = {name: place for place, (name, _) in enumerate(subject.trace.used)}
    first = min((places[name] for unit in units for name in unit.trained if name in places), default=-1)
    passed = [
        max((places.get(name, -1) for name in (*unit.trained, *unit.frozen)), default=-1) >= first for unit in units
    ]
    fetched = [any(passed[index : index + 1 + prefetch]) for index in range(len(units))]
    return [
        dataclasses.replace(unit, in_backward=unit.is_root or reached)
        for unit, reached in zip(units, fetched, strict=True)
    ]


def _with_memory(forecast: Forecast, states: dict[str, int]) -> Forecast:
    return dataclasses.replace(forecast, memory_bytes=dict(Counter(states) + Counter(forecast.memory_bytes)))
