"""One step as a timeline: what computes, what is on the wire meanwhile, and what waits for what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from thinwire.comm.forecast import Forecast
from thinwire.dist.plan.cluster import Cluster
from thinwire.dist.plan.exchange_time import ComputeTime, coding_s, exchange_s
from thinwire.dist.plan.program import Meet, Program, Send, Wait, Work, build_program
from thinwire.dist.plan.trace import StepTrace

__all__ = ["ComputeTime", "Span", "StepTime", "coding_s", "exchange_s", "step_time"]

_STEADY = 1e-12  # relative
_MOST_ROUNDS = 10
_NONE: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Span:
    """An exchange on the timeline. Seconds from the start of the step: submitted, begun, ended."""

    operation: str
    ready_s: float
    begin_s: float
    end_s: float


@dataclass(frozen=True)
class StepTime:
    """A foretold step. exposed_s: in which the rank waits for others; step_s = compute_s + exposed_s.

    spans: what is on the wire when, in a step in which all exchanges come, also those that do not come every step.
    sending_s: of all exchanges, hidden or not, in the mean.
    program: what was played.
    """

    compute_s: float
    exposed_s: float
    spans: tuple[Span, ...]
    sending_s: float = 0.0
    program: Program = field(default=Program((), 0.0))

    @property
    def step_s(self) -> float:
        """Seconds from one step to the next, in the mean."""
        return self.compute_s + self.exposed_s


def step_time(
    forecast: Forecast,
    trace: StepTrace,
    compute: ComputeTime,
    cluster: Cluster,
    *,
    micro_batches: int,
    prefetch: int = 0,
) -> StepTime:
    """A step in the steady state, found by playing build_program() on one rank, all others being like it.

    Of exchanges that do not come every step, those beside a step are taken to be alternatives, each in steps of its
    own, and the others to come together: the rarer ones in some of the steps that have the more frequent ones.

    Args:
        trace: when gradients are complete and weights first used.
        prefetch: units that are gathered ahead.
    """
    program = build_program(forecast, trace, compute, cluster, micro_batches=micro_batches, prefetch=prefetch)
    sends = [operation for operation in program.operations if isinstance(operation, Send)]
    steady, usual_s = _settle(program)
    mean_s, spans = usual_s, _play(program, steady, _NONE).spans
    for share, slots in _rare(sends):
        played = _play(program, steady, slots)
        spans = max(spans, played.spans, key=len)
        after = played.moment
        for _ in range(2):  # what was begun beside the next step is over after it
            after = _play(program, after, _NONE).moment
        mean_s += share * (after.now - steady.now - 3 * usual_s)
    sending_s = sum(send.seconds * send.per_step for send in sends)
    return StepTime(program.compute_s, max(0.0, mean_s - program.compute_s), spans, sending_s, program)


def _rare(sends: Sequence[Send]) -> list[tuple[float, frozenset[int]]]:
    """Kinds of steps with more than what every step has: the share of such steps, and the slots that come in them."""
    rare = [send for send in sends if 0 < send.per_step < 1]
    together = [send for send in rare if not send.beside]
    shares = sorted({send.per_step for send in together}, reverse=True)
    return [
        *((send.per_step, frozenset([send.slot])) for send in rare if send.beside),
        *(
            (share - rarer, frozenset(send.slot for send in together if send.per_step >= share))
            for share, rarer in zip(shares, [*shares, 0.0][1:], strict=True)
        ),
    ]


@dataclass(frozen=True)
class _Moment:
    """now; when each queue is free again; when what was sent and not waited for ends, by slot."""

    now: float = 0.0
    free: dict[str, float] = field(default_factory=dict)
    ends: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Played:
    moment: _Moment
    spans: tuple[Span, ...]


def _settle(program: Program) -> tuple[_Moment, float]:
    """The moment after a step that is like the one before, and its seconds; of what comes every step."""
    moment = _play(program, _Moment(), _NONE).moment
    took = moment.now
    if not moment.ends:  # nothing is left over from a step
        return _Moment(), took
    for _ in range(_MOST_ROUNDS):
        before, last = moment.now, took
        moment = _play(program, moment, _NONE).moment
        took = moment.now - before
        if abs(took - last) <= _STEADY * took:
            break
    return moment, took


def _play(program: Program, start: _Moment, rare: frozenset[int]) -> _Played:
    """One step from a moment on.

    Args:
        rare: slots that come in it of those that do not come every step.
    """
    now, free, ends = start.now, dict(start.free), dict(start.ends)
    spans: list[Span] = []
    met = False
    busy: list[tuple[float, float, float]] = []  # begin, end, share of the processor
    for operation in program.operations:
        match operation:
            case Work(seconds):
                now = computed(now, seconds, busy)
            case Send() if operation.per_step >= 1 or operation.slot in rare:
                begin = max([now, free.get(operation.queue, 0.0), *(ends.get(slot, 0.0) for slot in operation.after)])
                end = begin + operation.seconds
                free[operation.queue] = ends[operation.slot] = end
                spans.append(Span(operation.operation, now - start.now, begin - start.now, end - start.now))
                met |= not operation.beside
                if operation.taken_s and end > begin:
                    busy.append((begin, end, min(1.0, operation.taken_s / (end - begin))))
            case Wait(slot) if slot in ends:
                now = max(now, ends.pop(slot))
            case Meet(seconds) if met:
                now += seconds
    return _Played(_Moment(now, free, ends), tuple(spans))


def computed(now: float, seconds: float, busy: list[tuple[float, float, float]]) -> float:
    """When so many seconds of computing are done, where exchanges take a share of the processor meanwhile."""
    edges = sorted({edge for begin, end, _ in busy for edge in (begin, end) if edge > now})
    for edge in edges:
        speed = _speed(now, busy)
        if speed > 0 and seconds <= speed * (edge - now):
            return now + seconds / speed
        seconds -= speed * (edge - now)
        now = edge
    return now + seconds


def _speed(now: float, busy: list[tuple[float, float, float]]) -> float:
    return max(0.0, 1.0 - sum(share for begin, end, share in busy if begin <= now < end))
