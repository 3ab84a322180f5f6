"""Bytes and calls as the meter has counted them, and as a forecast says, in one shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from thinwire.comm.forecast import Exchange, Forecast
from thinwire.comm.meter import TrafficMeter

Sent = dict[str, dict[str, float]]
"""Bytes by operation and level."""


def bytes_of(forecast: Forecast, steps: int) -> Sent:
    """What so many steps will send."""
    return _in_steps(steps, ((one, one.sent_bytes) for one in forecast.exchanges))


def metered(meter: TrafficMeter) -> Sent:
    """What the methods' own operations have sent; those of control are not foretold."""
    told = _told(meter, "sent_bytes")
    return {operation: {level: n for level, n in levels.items() if n} for operation, levels in told.items()}


def shots_of(forecast: Forecast, steps: int) -> Sent:
    """What calls() will have counted after so many steps."""
    return _in_steps(steps, ((one, one.shots) for one in forecast.exchanges))


def calls(meter: TrafficMeter) -> Sent:
    """How often each operation has waited for others, by level."""
    return _told(meter, "calls")


def foretold(forecast: Forecast, steps: int) -> dict[str, int]:
    """By level, in so many steps from the beginning; what comes every n steps comes with the last of them."""
    total: Counter[str] = Counter()
    for exchange in forecast.exchanges:
        for level, count in exchange.sent_bytes.items():
            total[level] += count * int(steps * exchange.per_step + 1e-9)
    return {level: count for level, count in total.items() if count}


def since(after: Sent, before: Sent) -> Sent:
    found = {
        operation: {level: count - before.get(operation, {}).get(level, 0.0) for level, count in levels.items()}
        for operation, levels in after.items()
    }
    spent = {operation: {k: v for k, v in levels.items() if v} for operation, levels in found.items()}
    return {operation: levels for operation, levels in spent.items() if levels}


def total(sent: Sent) -> dict[str, float]:
    return dict(sum((Counter(levels) for levels in sent.values()), Counter()))


def _in_steps(steps: int, counts: Iterable[tuple[Exchange, Mapping[str, float]]]) -> Sent:
    found: Sent = {}
    for exchange, by_level in counts:
        levels = found.setdefault(exchange.operation, {})
        for level, count in by_level.items():
            levels[level] = levels.get(level, 0.0) + count * exchange.per_step * steps
    return found


def _told(meter: TrafficMeter, what: str) -> Sent:
    return {
        operation: {level: float(entry[what]) for level, entry in levels.items()}
        for operation, levels in meter.snapshot()["operations"].items()
        if not operation.startswith("control/")
    }
