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
from thinwire.comm.partition.process_groups import cuts_of
from thinwire.comm.partition.settings import PartitionSettings
from thinwire.comm.partition.weight_shard import WeightShard
from thinwire.comm.partition.wires.gradients import formats_of
from thinwire.comm.partition.wires.weights import build_gather_wire, build_update_wire

State: TypeAlias = Literal["params", "grads", "optim"]
WEIGHTS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class UnitShapes:
    """What is gathered and reduced together.

    trained, frozen: shapes of its parameters, whole, by name.
    is_root: its weights stay gathered from forward to backward.
    in_backward: a gradient goes through it, so that backward needs its weights too; always, where any is trained.
    """

    trained: Mapping[str, torch.Size]
    frozen: Mapping[str, torch.Size]
    is_root: bool
    in_backward: bool = True

    def padded_numel(self, parts: int) -> int:
        """Elements of a rank's shard where so many share the unit. FSDP2 pads every shard to the largest."""
        shapes = [*self.trained.values(), *self.frozen.values()]
        return sum(chunk(shape[0] if shape else 1, parts, 0)[1] * math.prod(shape[1:]) for shape in shapes)


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

    - gather: 2 k V_l at l < p (k for the root, and where no gradient goes through), of which only the first at
      l >= secondary (none, after the first step, for a unit all of whose weights are frozen);
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
    alike = Counter(
        (tuple(unit.trained.values()), tuple(unit.frozen.values()), unit.is_root, unit.in_backward) for unit in units
    )
    total: Counter[tuple[State, str, str]] = Counter()
    exchanges: Counter[tuple[State, str, str]] = Counter()
    for (trained, frozen, is_root, in_backward), times in alike.items():
        unit = UnitShapes(_numbered(trained), _numbered(frozen), is_root, in_backward)
        for flow in flows_of(unit, levels, placement, settings, micro_batches, compute_dtype):
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


def flows_of(
    unit: UnitShapes,
    levels: Levels,
    placement: Placement,
    settings: PartitionSettings,
    micro_batches: int,
    compute_dtype: torch.dtype | None,
) -> Iterable[Flow]:
    """predict_flows() of one unit; a unit's flows over several levels are in the order of the levels."""
    dtype = WEIGHTS[settings.weights]
    calls = micro_batches * (1 if unit.is_root or not unit.in_backward else 2)
    full = calls if placement.secondary is None else 1 if unit.trained else 0
    for level, count in _gather_bytes(unit, levels, placement, settings, compute_dtype or dtype).items():
        is_slow = levels.names.index(level) >= (placement.secondary or 0)
        times = full if is_slow else calls
        yield Flow("params", "gather", level, times * count, times)
    if not unit.trained:
        return
    ownership = Ownership(unit.trained, cuts_of(levels, placement))
    gradients = gradient_shard(ownership, levels, placement, settings)
    for level, count in gradients.sent_bytes(micro_batches).items():
        depth = levels.names.index(level)
        if depth < placement.grads:
            yield Flow("grads", "reduce", level, count, micro_batches)
        else:
            yield Flow("grads", "reduce_once", level, count, 1 if depth < placement.optim else 2)
    weights = WeightShard(ownership, levels, placement, build_update_wire(settings.update))
    for level, count in weights.sent_bytes(dtype).items():
        yield Flow("optim", "update", level, count, 1)


def gradient_shard(
    ownership: Ownership, levels: Levels, placement: Placement, settings: PartitionSettings
) -> GradientShard:
    """That of the unit whose ownership is given."""
    formats = formats_of(settings.gradients, levels, placement)
    feedback = frozenset(name for name, one in formats.items() if one.feedback)
    return GradientShard(
        ownership, levels, placement, {name: one.build() for name, one in formats.items()}, feedback=feedback
    )


def shard_bytes(unit: UnitShapes, parts: int, settings: PartitionSettings, dtype: torch.dtype) -> int:
    """Payload of a rank's shard in a gather, where so many share the unit."""
    padded = unit.padded_numel(parts)
    wire = build_gather_wire(settings.gather)
    return padded * dtype.itemsize if wire is None else wire.payload_bytes(padded)


def _gather_bytes(
    unit: UnitShapes, levels: Levels, placement: Placement, settings: PartitionSettings, dtype: torch.dtype
) -> Mapping[str, int]:
    """Of one gather."""
    tree = Cascade(levels, 0, placement.params)
    return tree.all_gather_bytes([shard_bytes(unit, tree.leaves, settings, dtype)] * tree.leaves)


def _numbered(shapes: Sequence[torch.Size]) -> dict[str, torch.Size]:
    """Numbers for names: blocks of equal shapes need counting only once."""
    return {str(index): shape for index, shape in enumerate(shapes)}
