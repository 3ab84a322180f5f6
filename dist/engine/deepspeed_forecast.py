"""What DeepSpeed's ZeRO will send over thinwire's collectives, and keep; from shapes, as far as its rules go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from thinwire.comm.allreduce import AllReduceSettings
from thinwire.comm.forecast import Exchange, Forecast, Parameter, Seat, When
from thinwire.comm.partition.deepspeed_comm import EXACT_BELOW, OPERATION, gradient_wires
from thinwire.comm.partition.forecast import levels_of_seat
from thinwire.comm.partition.rank_order import RankOrder
from thinwire.comm.partition.wires.plain import PlainWire
from thinwire.comm.partition.wires.weights import build_gather_wire
from thinwire.dist.engine.deepspeed import DeepSpeedSettings

_BUCKET_NUMEL = 500_000_000  # DeepSpeed's reduce_bucket_size, which the engine leaves as it is
_ALIGNMENT = 2  # elements: in stages 1 and 2 each rank's part of a group is a multiple
_REMARK = "DeepSpeed chooses its collectives as it goes: their bytes are those to expect, and its memory is rough"


def forecast_deepspeed(
    settings: DeepSpeedSettings,
    method: AllReduceSettings,
    groups: Sequence[Sequence[Parameter]],
    frozen: Sequence[Parameter],
    seat: Seat,
    *,
    micro_batches: int,
) -> Forecast:
    """What the engine's collectives will send in a step, and what DeepSpeed keeps beside the optimizer's states.

    By what DeepSpeed 0.19 does with fp32 weights in modules that run in the same order in every step.

    Args:
        groups: parameters that learn, by group of the optimizer. frozen: the others.
        micro_batches: backward passes per step.
    Raises:
        ValueError: a level that the settings name does not exist, or its groups hold one rank, or all.
    """
    calls = _Calls(settings, method, seat)
    trained = [p for group in groups for p in group]
    found: list[Exchange] = []
    if settings.stage < 3:
        for numel in _in_buckets(trained):
            found += calls.all_reduce(numel, "backward", micro_batches if settings.stage == 2 else 1)
        found += calls.all_reduce(1, "step", 2 if settings.stage else 1)  # norms
        if settings.stage:
            for group in groups:
                found += calls.all_gather(_own_numel(sum(p.numel for p in group), seat.size, _ALIGNMENT), "step")
    else:
        cut = [p for p in (*trained, *frozen) if p.numel > settings.persist_below]
        ahead = sum(p.numel for p in cut)
        for p in cut:
            ahead -= p.numel
            again = 2 * ahead >= settings.keep_gathered  # forward and backward until it is needed again
            found += calls.gathers(p, micro_batches * (1 + again))
        padded = sum(seat.size * _own_numel(p.numel, seat.size) for p in trained)
        found += calls.reduce_scatter(padded, "backward", micro_batches)
        for p in (*trained, *frozen):
            if p.numel <= settings.persist_below:
                found += calls.all_gather(_own_numel(p.numel, seat.size), "step")
    return Forecast(tuple(found), _memory(settings, trained, frozen, seat.size), (_REMARK,))


class _Calls:
    """Collectives as exchanges, one for each level."""

    def __init__(self, settings: DeepSpeedSettings, method: AllReduceSettings, seat: Seat) -> None:
        levels = levels_of_seat(seat)
        self._names = levels.names
        self._fanouts = dict(zip(levels.names, levels.fanouts, strict=True))
        self._same = PlainWire(torch.float32)
        self._wires = gradient_wires(settings.gradients, {"kind": method.dtype}, levels)
        self._gather = build_gather_wire(settings.gather)
        self._world = RankOrder(levels, range(seat.size))
        copy = _ranks_of_copy(settings, seat)
        self._copy = RankOrder(levels, copy) if copy else None

    def all_reduce(self, numel: int, when: When, per_step: float = 1) -> list[Exchange]:
        sent = self._world.all_reduce_bytes(numel, self._wires_of(numel))
        return self._by_level("all_reduce", sent, when, per_step, shots=2)

    def reduce_scatter(self, numel: int, when: When, per_step: float) -> list[Exchange]:
        sent = self._world.reduce_scatter_bytes(numel, self._wires_of(numel))
        return self._by_level("reduce_scatter", sent, when, per_step, shots=1)

    def gathers(self, parameter: Parameter, times: int) -> list[Exchange]:
        """Of a weight that is cut, in a step: with a copy, all but the first after it has changed come from there."""
        own = _own_numel(parameter.numel, self._world.size)
        if self._copy is None:
            return self.all_gather(own, "gather", times, needs=(parameter.name,))
        first = self.all_gather(own, "gather", 1, needs=(parameter.name,)) if parameter.trained else []
        held, rest = own * self._world.size // self._copy.size, times - bool(first)
        copied = self.all_gather(held, "gather", rest, needs=(parameter.name,), tree=self._copy) if rest else []
        return [*first, *copied]

    def all_gather(
        self,
        own: int,
        when: When,
        per_step: float = 1,
        *,
        needs: tuple[str, ...] = (),
        tree: RankOrder | None = None,
    ) -> list[Exchange]:
        """Args: own, elements of this rank; tree, among which ranks, by default all."""
        tree = tree or self._world
        wire = self._same if self._gather is None or own * tree.size < EXACT_BELOW else self._gather
        sent = tree.all_gather_bytes(wire.payload_bytes(own))
        return self._by_level("all_gather", sent, when, per_step, shots=1, needs=needs)

    def _wires_of(self, numel: int) -> dict[str, Any]:
        exact = numel < EXACT_BELOW
        return {name: self._same if exact else self._wires.get(name, self._same) for name in self._names}

    def _by_level(
        self,
        kind: str,
        sent_bytes: dict[str, int],
        when: When,
        per_step: float,
        *,
        shots: int,
        needs: tuple[str, ...] = (),
    ) -> list[Exchange]:
        return [
            Exchange(
                f"{OPERATION}/{kind}",
                {level: count},
                messages=shots * (self._fanouts[level] - 1),
                shots={level: shots},
                when=when,
                needs=needs,
                per_step=per_step,
                exact=False,
            )
            for level, count in sent_bytes.items()
            if count
        ]


def _ranks_of_copy(settings: DeepSpeedSettings, seat: Seat) -> Sequence[int]:
    """The ranks that share a copy of all weights from one gather until the next step; empty: there is no copy."""
    if settings.secondary is None:
        return ()
    try:
        group = seat.group(settings.secondary)
    except ValueError as error:
        raise ValueError(f"engine.secondary: {error}") from None
    if len(group) in (1, seat.size):
        raise ValueError(
            f"engine.secondary: {settings.secondary} holds {len(group)} of the {seat.size} ranks, so a copy in it "
            "would be no use; name a level between, or give null"
        )
    return group


def _in_buckets(trained: Sequence[Parameter]) -> list[int]:
    """Elements that are reduced together: those of neighbours, until a bucket is full."""
    buckets = [0]
    for parameter in reversed(trained):
        if buckets[-1] and buckets[-1] + parameter.numel > _BUCKET_NUMEL:
            buckets.append(0)
        buckets[-1] += parameter.numel
    return buckets


def _own_numel(numel: int, size: int, alignment: int = 1) -> int:
    """A rank's part, padded."""
    return alignment * -(-numel // (alignment * size))


def _memory(
    settings: DeepSpeedSettings, trained: Sequence[Parameter], frozen: Sequence[Parameter], size: int
) -> dict[str, int]:
    """Weights and gradients; stages 1 to 3 keep what a rank owns once more, for the optimizer."""
    numel = sum(p.numel for p in trained)
    own = -(-numel // size)
    params = numel + sum(p.numel for p in frozen)
    if settings.stage == 3:
        whole = sum(p.numel for p in (*trained, *frozen) if p.numel <= settings.persist_below)
        params = whole + -(-(params - whole) // size)
    grads = numel if settings.stage < 2 else own
    found = {"params": 4 * params, "grads": 4 * grads}
    return found if settings.stage == 0 else {**found, "masters": 4 * own}
