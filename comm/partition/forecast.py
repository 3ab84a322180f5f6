"""What partition() will send and keep, unit by unit, and when: from shapes and levels alone."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch.optim import Optimizer

from thinwire.comm.compress.compressors.dense import Dense
from thinwire.comm.forecast import DETECTED, Coding, Exchange, Forecast, Seat, When, codec_label
from thinwire.comm.partition.gather import OPERATION
from thinwire.comm.partition.levels import Levels, build_levels
from thinwire.comm.partition.memory import KeptUnit, states_bytes, sum_memory
from thinwire.comm.partition.micro_batches import BEYOND, INSIDE
from thinwire.comm.partition.optimizer import UPDATE
from thinwire.comm.partition.ownership import Ownership
from thinwire.comm.partition.placement import Placement, place
from thinwire.comm.partition.process_groups import cuts_of
from thinwire.comm.partition.settings import PartitionSettings
from thinwire.comm.partition.traffic import WEIGHTS, Flow, UnitShapes, flows_of, gradient_shard, shard_bytes
from thinwire.comm.partition.wires.gradients import formats_of
from thinwire.comm.partition.wires.label import wire_label
from thinwire.comm.partition.wires.weights import build_update_wire

_AS_THEY_ARE = ("same", "fp32")
_INSIDE_QUEUE = "inside"  # gathers, and the sums of every micro-batch, in the order in which they are needed


def forecast_partition(
    settings: PartitionSettings,
    units: Sequence[UnitShapes],
    seat: Seat,
    *,
    optimizer: Optimizer,
    names: Mapping[int, str],
    micro_batches: int = 1,
    compute_dtype: torch.dtype | None = None,
) -> Forecast:
    """What partition() will send in a step and keep between two, without a process.

    Each level of a gather or a sum is an exchange of its own, since one begins where the one before it has ended. What
    goes beyond the grads level is taken to leave during the last backward pass, as engine fsdp2 lets it.

    Args:
        units: in the order in which forward runs them, the root's last, as unit_shapes() gives them.
        optimizer: over the trained parameters, fp32, which may be on the meta device. names: theirs, by id().
        micro_batches: backward passes per step.
        compute_dtype: in which weights are gathered; None = that of the weights.
    Raises:
        ValueError: the levels that the settings name do not exist or do not nest, or a level cannot have its format.
    """
    levels = levels_of_seat(seat)
    placement = place(
        levels, params=settings.params, grads=settings.grads, optim=settings.optim, secondary=settings.secondary
    )
    known: dict[object, _Part] = {}  # blocks of equal shapes are looked at once
    parts = []
    for unit in units:
        shapes = (tuple(unit.trained.values()), tuple(unit.frozen.values()), unit.is_root, unit.in_backward)
        if shapes not in known:
            known[shapes] = _Part(unit, levels, placement, settings, micro_batches, compute_dtype)
        parts.append(known[shapes].named(unit))
    root_first = [*(part for part in parts if part.unit.is_root), *(part for part in parts if not part.unit.is_root)]
    exchanges = [
        *(exchange for part in root_first for exchange in part.gathers()),
        *(exchange for part in reversed(root_first) for exchange in part.sums(inside=True)),
        *(exchange for part in reversed(root_first) for exchange in part.sums(inside=False)),
        *(exchange for part in root_first for exchange in part.updates()),
    ]
    owned = {name: part.own_numel(name) for part in parts for name in part.unit.trained}
    numels = [[owned[names[id(p)]] for p in group["params"]] for group in optimizer.param_groups]
    memory = sum_memory([part.kept() for part in parts], states_bytes(optimizer, numels))
    return Forecast(tuple(exchanges), memory)


def gathered_bytes(
    settings: PartitionSettings,
    units: Sequence[UnitShapes],
    seat: Seat,
    *,
    prefetch: int,
    compute_dtype: torch.dtype | None = None,
) -> int:
    """Whole weights that a rank has while it computes, at most: the root's, and of blocks the one in use and the next.

    Args:
        units, compute_dtype: as in forecast_partition().
        prefetch: blocks gathered ahead.
    """
    levels = levels_of_seat(seat)
    parts = levels.size(levels.depth_of(settings.params))
    if parts == 1:
        return 0
    itemsize = (compute_dtype or WEIGHTS[settings.weights]).itemsize
    blocks = sorted((parts * unit.padded_numel(parts) for unit in units if not unit.is_root), reverse=True)
    roots = sum(parts * unit.padded_numel(parts) for unit in units if unit.is_root)
    return itemsize * (roots + sum(blocks[: 1 + prefetch]))


def levels_of_seat(seat: Seat) -> Levels:
    """The levels of a machine that need not exist, with all the names that settings may call them by."""
    kept = [(name, size) for name, size in seat.levels if size > 1]
    levels = build_levels([name for name, _ in kept], [size for _, size in kept], range(seat.size), rank=seat.rank)
    depths = {levels.size(depth): depth for depth in range(levels.depth + 1)}
    also = {name: depths[seat.size_of(name)] for name in (*dict(seat.levels), *DETECTED, "world")}
    return dataclasses.replace(levels, named={**levels.named, **also})


class _Part:
    """One unit."""

    def __init__(
        self,
        unit: UnitShapes,
        levels: Levels,
        placement: Placement,
        settings: PartitionSettings,
        micro_batches: int,
        compute_dtype: torch.dtype | None,
    ) -> None:
        self.unit = unit
        self._levels = levels
        self._placement = placement
        self._settings = settings
        self._micro_batches = micro_batches
        self._gather_dtype = compute_dtype or WEIGHTS[settings.weights]
        numbered = {str(number): shape for number, shape in enumerate(unit.trained.values())}
        self._ownership = Ownership(numbered, cuts_of(levels, placement))
        self._gradients = gradient_shard(self._ownership, levels, placement, settings) if unit.trained else None
        flows = flows_of(unit, levels, placement, settings, micro_batches, compute_dtype)
        self._flows = [flow for flow in flows if flow.payload_bytes]

    def named(self, unit: UnitShapes) -> _Part:
        """The same of another unit of these shapes."""
        other = copy.copy(self)
        other.unit = unit
        return other

    def gathers(self) -> Iterator[Exchange]:
        """Slowest level first."""
        flows = [flow for flow in self._flows if flow.operation == "gather"]
        leaves = self._levels.size(self._placement.params)
        own = self.unit.padded_numel(leaves)
        needs = (*self.unit.trained, *self.unit.frozen)
        for flow in reversed(flows):
            label = wire_label("gather", self._settings.gather)
            coding = self._coding(label, own * (flow is flows[-1]), own * leaves * (flow is flows[0]))
            yield self._exchange(OPERATION, flow, flow.exchanges, "gather", needs, coding, queue=_INSIDE_QUEUE)

    def sums(self, *, inside: bool) -> Iterator[Exchange]:
        """Of gradients, fastest level first: inside grads in every micro-batch, beyond it once per step."""
        formats = formats_of(self._settings.gradients, self._levels, self._placement)
        encoded = self._gradients.encoded_counts() if self._gradients else {}
        operation, queue, times = (INSIDE, _INSIDE_QUEUE, self._micro_batches) if inside else (BEYOND, "main", 1)
        for flow in self._flows:
            if flow.operation == ("reduce" if inside else "reduce_once"):
                count = encoded[flow.level]
                coding = self._coding(wire_label("gradients", formats[flow.level]), count, count)
                yield self._exchange(operation, flow, times, "backward", tuple(self.unit.trained), coding, queue=queue)

    def updates(self) -> Iterator[Exchange]:
        """Slowest level first."""
        flows = [flow for flow in self._flows if flow.operation == "update"]
        if not flows or self._gradients is None:
            return
        own, all_rows = self._gradients.own_numel, self._shard_numel()
        label = wire_label("update", self._settings.update)
        for flow in reversed(flows):
            coding = self._coding(label, own * (flow is flows[-1]), all_rows * (flow is flows[0]))
            yield self._exchange(UPDATE, flow, 1, "step", (), coding, queue="main")

    def kept(self) -> KeptUnit:
        """Between steps."""
        leaves = self._levels.size(self._placement.params)
        inside = self._placement.secondary
        copies = 0 if inside is None else leaves // self._levels.size(inside)
        is_exact = (
            self._levels.size(self._placement.params) == self._levels.size(self._placement.optim)
            or build_update_wire(self._settings.update).is_exact
        )
        return KeptUnit(
            self.unit.padded_numel(leaves) * WEIGHTS[self._settings.weights].itemsize,
            self._gradients,
            has_masters=self._settings.weights != "fp32" or not is_exact,
            secondary_bytes=copies * shard_bytes(self.unit, leaves, self._settings, self._gather_dtype),
        )

    def own_numel(self, name: str) -> int:
        """Elements of a parameter that this rank's optimizer owns."""
        owner = self._levels.number(self._levels.rank, self._placement.optim)
        return self._ownership.numel(str(list(self.unit.trained).index(name)), owner)

    def _shard_numel(self) -> int:
        """Elements of the trained parameters in this rank's shard."""
        owners = self._ownership.owners // self._levels.size(self._placement.params)
        first = self._levels.number(self._levels.rank, self._placement.params) * owners
        return self._ownership.count(first, first + owners)

    def _exchange(
        self,
        operation: str,
        flow: Flow,
        times: int,
        when: When,
        needs: tuple[str, ...],
        coding: tuple[Coding, ...],
        *,
        queue: str,
    ) -> Exchange:
        """Args: times, occurrences of the flow in a step, each of which may be several collectives."""
        each = flow.exchanges // times
        others = self._levels.fanouts[self._levels.names.index(flow.level)] - 1
        return Exchange(
            operation,
            {flow.level: flow.payload_bytes // times},
            messages=each * others,
            shots={flow.level: each},
            when=when,
            needs=needs,
            per_step=float(times),
            coding=coding,
            queue=queue,
        )

    def _coding(self, label: str, encoded: int, decoded: int) -> tuple[Coding, ...]:
        """What an exchange moves in memory takes as long as in method compress; and what its format takes besides."""
        if not encoded + decoded:
            return ()
        handling = Coding(codec_label(Dense()), 0, 0, encodes=0, decodes=0, handled=max(encoded, decoded))
        if json.loads(label)["kind"] in _AS_THEY_ARE:
            return (handling,)
        return handling, Coding(label, encoded, decoded, encodes=bool(encoded), decodes=bool(decoded))
