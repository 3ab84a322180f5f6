"""What every rank does in a step, as a list: compute, hand an exchange to a queue, wait for one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from thinwire.comm.forecast import Exchange, Forecast
from thinwire.dist.plan.cluster import Cluster
from thinwire.dist.plan.exchange_time import ComputeTime, exchange_s, taken_s
from thinwire.dist.plan.trace import StepTrace

_ROUNDING = 1e-9  # of per_step, a fraction such as 0.1


@dataclass(frozen=True)
class Work:
    """Compute for so many seconds."""

    seconds: float


@dataclass(frozen=True)
class Send:
    """Hand an exchange to its queue, which begins it when it is free.

    slot: its number in the step. level: the slowest that it uses, whose groups take part together; None: nobody else.
    after: slots that must have ended. per_step: 1, or the share of the steps in which it comes.
    taken_s: see exchange_time. beside: whether it goes on behind the next step.
    """

    slot: int
    operation: str
    queue: str
    seconds: float
    level: str | None
    taken_s: float
    after: tuple[int, ...] = ()
    per_step: float = 1.0
    beside: bool = False

    def comes(self, step: int) -> bool:
        """Whether it does in this step, where steps count from 0: at the end of each period."""
        done, before = ((n * self.per_step + _ROUNDING) // 1 for n in (step + 1, step))
        return done > before


@dataclass(frozen=True)
class Wait:
    """Until the exchange of that slot has ended; of one beside the step, until that of the step before has."""

    slot: int


@dataclass(frozen=True)
class Meet:
    """What ranks lose in a step in which they have waited for one another, whatever was sent: see ComputeSpeed."""

    seconds: float


Operation: TypeAlias = Work | Send | Wait | Meet


@dataclass(frozen=True)
class Program:
    """A step. compute_s: seconds of all its work."""

    operations: tuple[Operation, ...]
    compute_s: float


def build_program(
    forecast: Forecast,
    trace: StepTrace,
    compute: ComputeTime,
    cluster: Cluster,
    *,
    micro_batches: int,
    prefetch: int = 0,
) -> Program:
    """Lay out a step as comm/forecast.py describes when exchanges begin and who waits for them.

    Args:
        trace: when gradients are complete and weights first used.
        prefetch: units that are gathered ahead of the one that computes, in the same pass.
    """
    builder = _Builder(forecast, trace, compute, cluster, micro_batches, prefetch)
    return Program(tuple(_merged(builder.step())), compute.step_s(micro_batches))


class _Builder:
    def __init__(
        self,
        forecast: Forecast,
        trace: StepTrace,
        compute: ComputeTime,
        cluster: Cluster,
        micro_batches: int,
        prefetch: int,
    ) -> None:
        self._ready = dict(trace.ready)
        self._used = {name: (place, share) for place, (name, share) in enumerate(trace.used)}
        self._compute = compute
        self._cluster = cluster
        self._micro_batches = micro_batches
        self._prefetch = prefetch
        self._slots = itertools.count()
        self._gradients = _grouped(e for e in forecast.exchanges if e.when == "backward")
        self._units = self._in_forward_order(_grouped(e for e in forecast.exchanges if e.when == "gather"))
        self._after = [e for e in forecast.exchanges if e.when == "step"]
        self._beside = [e for e in forecast.exchanges if e.when == "beside"]

    def step(self) -> Iterator[Operation]:
        most = self._micro_batches
        pending: list[Send] = []
        for micro_batch in range(most):
            units = [(begin, self._chain(unit, micro_batch, 2 * most)) for begin, _, unit in self._units]
            yield from self._pass(self._compute.forward_s, units, [])
            units = [
                (1.0 - end, self._chain(unit, most + micro_batch, 2 * most)) for _, end, unit in reversed(self._units)
            ]
            gradients = [
                (self._ready_at(needs), self._chain(sums, most - 1 - micro_batch, most))
                for needs, sums in self._gradients
            ]
            yield from self._pass(self._compute.backward_s, units, gradients)
            pending += [send for _, chain in gradients for send in chain]
        yield from (Wait(send.slot) for send in pending)
        yield Work(self._compute.optimizer_s)
        after = [self._send(exchange, exchange.per_step) for exchange in self._after]
        yield from after
        yield from (Wait(send.slot) for send in after)
        if self._compute.coupled_s:
            yield Meet(self._compute.coupled_s)
        beside = [self._send(exchange, exchange.per_step) for exchange in self._beside]
        yield from (Wait(send.slot) for send in beside)  # of the step before
        yield from beside

    def _pass(
        self, seconds: float, units: Sequence[tuple[float, list[Send]]], gradients: Sequence[tuple[float, list[Send]]]
    ) -> Iterator[Operation]:
        """A forward or backward pass.

        Args:
            units: share of the pass at which each begins, and its gathers; in the order of the pass.
            gradients: share of the pass at which they are there, and what then goes out.
        """
        asked = 0
        done = 0.0
        # Of one share, gradients first: a unit hands its gradients on before the next one asks for weights.
        events = [(at, 0, index) for index, (at, _) in enumerate(gradients)]
        events += [(at, 1, index) for index, (at, _) in enumerate(units)]
        for at, is_unit, index in sorted(events):
            yield Work((at - done) * seconds)
            done = at
            if not is_unit:
                yield from gradients[index][1]
                continue
            for _, gathers in units[asked : index + 1]:
                yield from gathers
            yield from (Wait(send.slot) for send in units[index][1])
            asked = max(asked, index + 1)
            for _, gathers in units[asked : index + 1 + self._prefetch]:
                yield from gathers
            asked = max(asked, min(index + 1 + self._prefetch, len(units)))
        yield Work((1.0 - done) * seconds)

    def _chain(self, exchanges: Sequence[Exchange], occasion: int, most: int) -> list[Send]:
        """Those that come at this of `most` occasions in a step, each after the one before."""
        chain: list[Send] = []
        for exchange in exchanges:
            times = min(most, max(1, math.ceil(exchange.per_step)))
            if occasion < times:
                after = tuple(send.slot for send in chain[-1:])
                chain.append(self._send(exchange, exchange.per_step / times, after))
        return chain

    def _send(self, exchange: Exchange, per_occasion: float, after: tuple[int, ...] = ()) -> Send:
        names = [level.name for level in self._cluster.levels]
        used = [names.index(level) for level, count in exchange.sent_bytes.items() if count]
        # One that comes oftener than its occasions, or not a whole number of times, is as much longer or shorter.
        share = per_occasion if exchange.per_step > 1 else 1.0
        return Send(
            next(self._slots),
            exchange.operation,
            f"beside/{exchange.queue}" if exchange.when == "beside" else exchange.queue,
            share * exchange_s(exchange, self._cluster),
            names[max(used)] if used else None,
            share * taken_s(exchange, self._cluster),
            after,
            min(1.0, exchange.per_step),
            exchange.when == "beside",
        )

    def _in_forward_order(
        self, groups: Sequence[tuple[tuple[str, ...], list[Exchange]]]
    ) -> list[tuple[float, float, list[Exchange]]]:
        """Shares of the forward pass at which units begin and end, and their gathers; in the order of the pass."""
        unknown = (-1, 0.0)
        found = [
            (min((self._used.get(name, unknown) for name in needs), default=unknown), gathers)
            for needs, gathers in groups
        ]
        found.sort(key=lambda unit: unit[0])
        begins = [begin for (_, begin), _ in found]
        return [
            (begin, end, gathers) for begin, end, (_, gathers) in zip(begins, [*begins, 1.0][1:], found, strict=True)
        ]

    def _ready_at(self, needs: Sequence[str]) -> float:
        return max((self._ready.get(name, 1.0) for name in needs), default=1.0)


def _grouped(exchanges: Iterable[Exchange]) -> list[tuple[tuple[str, ...], list[Exchange]]]:
    """Those with the same needs together, which follow one another."""
    groups: dict[tuple[str, ...], list[Exchange]] = {}
    for exchange in exchanges:
        groups.setdefault(exchange.needs, []).append(exchange)
    return list(groups.items())


def _merged(operations: Iterable[Operation]) -> Iterator[Operation]:
    """Work in a row as one piece; what takes no time, left out."""
    seconds = 0.0
    for operation in operations:
        if isinstance(operation, Work):
            seconds += operation.seconds
            continue
        if seconds:
            yield Work(seconds)
            seconds = 0.0
        yield operation
    if seconds:
        yield Work(seconds)
