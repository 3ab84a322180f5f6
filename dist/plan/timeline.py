"""One step as a timeline: what computes, what is on the wire meanwhile, and what waits for what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from thinwire.comm.forecast import Exchange, Forecast
from thinwire.dist.plan.cluster import Cluster, CodecSpeed
from thinwire.dist.plan.trace import StepTrace


@dataclass(frozen=True)
class ComputeTime:
    """Seconds of one rank: forward and backward of one micro-batch, and the optimizer's step."""

    forward_s: float
    backward_s: float
    optimizer_s: float

    def step_s(self, micro_batches: int) -> float:
        """Of a whole step."""
        return micro_batches * (self.forward_s + self.backward_s) + self.optimizer_s


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

    spans: what is on the wire when; of exchanges that do not come every step, one is shown, and its share counted.
    """

    compute_s: float
    exposed_s: float
    spans: tuple[Span, ...]

    @property
    def step_s(self) -> float:
        """Seconds from one step to the next, in the mean."""
        return self.compute_s + self.exposed_s


def exchange_s(exchange: Exchange, cluster: Cluster) -> float:
    """Seconds of one occurrence: coding, and at each level bytes / rate + shots x latency, the slowest of them.

    The levels of one exchange send at the same time; its shots on different levels come one after another only where
    the method says so by an exchange for each.
    """
    times = [
        cluster.level(level).send_s(count, exchange.shots.get(level, 0))
        for level, count in exchange.sent_bytes.items()
        if count
    ]
    return coding_s(exchange, cluster) + max(times, default=0.0)


def coding_s(exchange: Exchange, cluster: Cluster) -> float:
    """Seconds of encoding and decoding in one occurrence; what has not been measured costs nothing."""
    speeds: Mapping[str, CodecSpeed] = cluster.measured.codecs if cluster.measured else {}
    total = 0.0
    for coding in exchange.coding:
        if (speed := speeds.get(coding.codec)) is not None:
            total += coding.encoded * speed.encode_s + coding.decoded * speed.decode_s + speed.call_s
    return total


def step_time(
    forecast: Forecast, trace: StepTrace, compute: ComputeTime, cluster: Cluster, *, micro_batches: int
) -> StepTime:
    """The timeline of a step in the steady state.

    Exchanges that wait for gradients go out one after another in the order of the forecast, as a CommQueue runs them,
    while the last backward pass goes on; the optimizer waits for the last. Gathers run one unit ahead of what computes.
    """
    ready_at = dict(trace.ready)
    compute_s = compute.step_s(micro_batches)
    before_last_backward = micro_batches * compute.forward_s + (micro_batches - 1) * compute.backward_s
    backward_end = before_last_backward + compute.backward_s
    spans: list[Span] = []
    free = 0.0
    behind = 0.0  # of the backward pass
    for exchange in forecast.exchanges:
        if exchange.when != "backward":
            continue
        share = max((ready_at.get(name, 1.0) for name in exchange.needs), default=1.0)
        ready = before_last_backward + share * compute.backward_s
        begin = max(ready, free)
        free = begin + exchange_s(exchange, cluster)
        spans.append(Span(exchange.operation, ready, begin, free))
        behind = max(0.0, free - backward_end)
    gathers = [exchange for exchange in forecast.exchanges if exchange.when == "gather"]
    waited = behind + _gather_wait_s(gathers, compute_s, cluster)
    now = backward_end + waited + compute.optimizer_s
    for exchange in forecast.exchanges:
        if exchange.when == "step":
            took = exchange_s(exchange, cluster)
            spans.append(Span(exchange.operation, now, now, now + took))
            now += took
            waited += took * exchange.per_step
    beside = sum(exchange_s(e, cluster) * e.per_step for e in forecast.exchanges if e.when == "beside")
    waited += max(0.0, beside - (compute_s + waited))
    return StepTime(compute_s, waited, tuple(spans))


def _gather_wait_s(gathers: Sequence[Exchange], compute_s: float, cluster: Cluster) -> float:
    """The first gather, and what the others together take longer than the computing that they run behind."""
    if not gathers:
        return 0.0
    times = [exchange_s(exchange, cluster) for exchange in gathers]
    total = sum(took * exchange.per_step for took, exchange in zip(times, gathers, strict=True))
    return times[0] + max(0.0, total - times[0] - compute_s)
