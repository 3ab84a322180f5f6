"""What partitioning will send, from shapes and levels alone: before there are processes, groups or weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import nn

from thinwire.comm.partition.cascade import Cascade
from thinwire.comm.partition.gradient_shard import GradientShard
from thinwire.comm.partition.levels import Levels
from thinwire.comm.partition.ownership import Ownership, chunk
from thinwire.comm.partition.placement import Placement, place
from thinwire.comm.partition.settings import PartitionSettings
from thinwire.comm.partition.weight_shard import WeightShard
from thinwire.comm.partition.wires.gradients import formats_of
from thinwire.comm.partition.wires.weights import build_gather_wire, build_update_wire

State: TypeAlias = Literal["params", "grads", "optim"]
_WEIGHTS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class UnitShapes:
    """What is gathered and reduced together.

    trained, frozen: shapes of its parameters, whole, by name.
    is_root: its weights stay gathered from forward to backward.
    """

    trained: Mapping[str, torch.Size]
    frozen: Mapping[str, torch.Size]
    is_root: bool


@dataclass(frozen=True)
class Flow:
    """What one rank sends over one level in one optimizer step, for one purpose.

    state: whose place makes it necessary: params (gathers), grads (sums of gradients) or optim (new weights).
    operation: partition/OPERATION is its name in the meter's table.
    level: name of the level.
    payload_bytes: sent by this rank.
    exchanges: collectives, each of which waits for the slowest of the level's ranks.
    """

    state: State
    operation: str
    level: str
    payload_bytes: int
    exchanges: int


def predict_flows(
    units: Iterable[UnitShapes],
    levels: Levels,
    settings: PartitionSettings,
    *,
    micro_batches: int = 1,
    compute_dtype: torch.dtype | None = None,
) -> list[Flow]:
    """What the rank `levels.rank` sends in a step.

    Where rows divide evenly, a full pass over levels of L_0, L_1, ... ranks sends at level l, for n elements,
    V_l = n / (L_0 ... L_{l-1}) * (L_l - 1) / L_l elements, in either direction. With p, g and o levels for params,
    grads and optim, and k micro-batches:

    - gather: 2 k V_l at l < p (k for the root), of which only the first at l >= secondary (none, after the first step,
      for a unit all of whose weights are frozen);
    - reduce: k V_l at l < g;
    - reduce_once: V_l at g <= l < o, and 2 V_l at l >= o, where owners have replicas;
    - update: V_l at p <= l < o.

    Uneven rows are counted as they are cut. The gradient norm's few bytes are not in it: the meter has them under
    control/.

    Args:
        units: from unit_shapes(), or made up: no tensor is needed.
        micro_batches: backward passes per step.
        compute_dtype: in which weights are gathered; None = that of the weights.
    Raises:
        ValueError: the levels that the settings name do not exist or do not nest, or a level cannot have its format.
    """
    placement = place(
        levels, params=settings.params, grads=settings.grads, optim=settings.optim, secondary=settings.secondary
    )
    alike = Counter((tuple(unit.trained.values()), tuple(unit.frozen.values()), unit.is_root) for unit in units)
    total: Counter[tuple[State, str, str]] = Counter()
    exchanges: Counter[tuple[State, str, str]] = Counter()
    for (trained, frozen, is_root), times in alike.items():
        unit = UnitShapes(_numbered(trained), _numbered(frozen), is_root)
        for flow in _flows_of(unit, levels, placement, settings, micro_batches, compute_dtype):
            key = (flow.state, flow.operation, flow.level)
            total[key] += times * flow.payload_bytes
            exchanges[key] += times * flow.exchanges
    return [Flow(*key, payload_bytes=count, exchanges=exchanges[key]) for key, count in total.items() if count]


def predict_bytes(
    units: Iterable[UnitShapes],
    levels: Levels,
    settings: PartitionSettings,
    *,
    micro_batches: int = 1,
    compute_dtype: torch.dtype | None = None,
) -> dict[str, int]:
    """predict_flows() by level: what PartitionedOptimizer.predicted_bytes() will say."""
    flows = predict_flows(units, levels, settings, micro_batches=micro_batches, compute_dtype=compute_dtype)
    sent: Counter[str] = Counter()
    for flow in flows:
        sent[flow.level] += flow.payload_bytes
    return dict(sent)


def unit_shapes(model: nn.Module, blocks: Sequence[nn.Module]) -> list[UnitShapes]:
    """The units of a model that is not sharded yet; it may be on the meta device.

    Args:
        blocks: modules that are gathered one by one, inner ones before those around them; the rest is the root's.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    taken: set[int] = set()
    found = []
    for module in [*blocks, model]:
        trained: dict[str, torch.Size] = {}
        frozen: dict[str, torch.Size] = {}
        for parameter in module.parameters():
            if id(parameter) not in taken:
                taken.add(id(parameter))
                (trained if parameter.requires_grad else frozen)[names[id(parameter)]] = parameter.shape
        if trained or frozen:
            found.append(UnitShapes(trained, frozen, is_root=module is model))
    return found


def _flows_of(
    unit: UnitShapes,
    levels: Levels,
    placement: Placement,
    settings: PartitionSettings,
    micro_batches: int,
    compute_dtype: torch.dtype | None,
) -> Iterable[Flow]:
    dtype = _WEIGHTS[settings.weights]
    calls = micro_batches * (1 if unit.is_root else 2)
    full = calls if placement.secondary is None else 1 if unit.trained else 0
    for level, count in _gather_bytes(unit, levels, placement, settings, compute_dtype or dtype).items():
        is_slow = levels.names.index(level) >= (placement.secondary or 0)
        times = full if is_slow else calls
        yield Flow("params", "gather", level, times * count, times)
    if not unit.trained:
        return
    size = {"params": levels.size(placement.params), "grads": levels.size(placement.grads)}
    cuts = (size["params"], size["grads"] // size["params"], levels.size(placement.optim) // size["grads"])
    ownership = Ownership(unit.trained, cuts)
    wires = {name: one.build() for name, one in formats_of(settings.gradients, levels, placement).items()}
    gradients = GradientShard(ownership, levels, placement, wires)
    for level, count in gradients.sent_bytes(micro_batches).items():
        depth = levels.names.index(level)
        if depth < placement.grads:
            yield Flow("grads", "reduce", level, count, micro_batches)
        else:
            yield Flow("grads", "reduce_once", level, count, 1 if depth < placement.optim else 2)
    weights = WeightShard(ownership, levels, placement, build_update_wire(settings.update))
    for level, count in weights.sent_bytes(dtype).items():
        yield Flow("optim", "update", level, count, 1)


def _gather_bytes(
    unit: UnitShapes, levels: Levels, placement: Placement, settings: PartitionSettings, dtype: torch.dtype
) -> Mapping[str, int]:
    """Of one gather. FSDP2 pads every shard to the largest."""
    parts = levels.size(placement.params)
    shapes = [*unit.trained.values(), *unit.frozen.values()]
    padded = sum(chunk(shape[0] if shape else 1, parts, 0)[1] * math.prod(shape[1:]) for shape in shapes)
    wire = build_gather_wire(settings.gather)
    payload = padded * dtype.itemsize if wire is None else wire.payload_bytes(padded)
    tree = Cascade(levels, 0, placement.params)
    return tree.all_gather_bytes([payload] * tree.leaves)


def _numbered(shapes: Sequence[torch.Size]) -> dict[str, torch.Size]:
    """Numbers for names: blocks of equal shapes need counting only once."""
    return {str(index): shape for index, shape in enumerate(shapes)}
