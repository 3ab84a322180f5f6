"""Bytes and calls as the meter has counted them, and as a forecast says, in one shape."""

from __future__ import annotations

from collections import Counter

from thinwire.comm.forecast import Forecast
from thinwire.comm.meter import TrafficMeter

Sent = dict[str, dict[str, float]]
"""Bytes by operation and level."""


def bytes_of(forecast: Forecast, steps: int) -> Sent:
    """What so many steps will send."""
    found: dict[str, Counter[str]] = {}
    for exchange in forecast.exchanges:
        for level, count in exchange.sent_bytes.items():
            found.setdefault(exchange.operation, Counter())[level] += count * exchange.per_step * steps  # type: ignore[assignment]
    return {operation: dict(levels) for operation, levels in found.items()}


def metered(meter: TrafficMeter) -> Sent:
    """What the methods' own operations have sent; those of control are not foretold."""
    return {
        operation: {level: float(entry["sent_bytes"]) for level, entry in levels.items() if entry["sent_bytes"]}
        for operation, levels in meter.snapshot()["operations"].items()
        if not operation.startswith("control/")
    }


def calls(meter: TrafficMeter) -> Sent:
    """How often each operation has waited for others, by level."""
    return {
        operation: {level: float(entry["calls"]) for level, entry in levels.items()}
        for operation, levels in meter.snapshot()["operations"].items()
        if not operation.startswith("control/")
    }


def shots_of(forecast: Forecast, steps: int) -> Sent:
    """What calls() will have counted after so many steps."""
    found: dict[str, Counter[str]] = {}
    for exchange in forecast.exchanges:
        for level, count in exchange.shots.items():
            found.setdefault(exchange.operation, Counter())[level] += count * exchange.per_step * steps  # type: ignore[assignment]
    return {operation: dict(levels) for operation, levels in found.items()}


def since(after: Sent, before: Sent) -> Sent:
    found = {
        operation: {level: count - before.get(operation, {}).get(level, 0.0) for level, count in levels.items()}
        for operation, levels in after.items()
    }
    spent = {operation: {k: v for k, v in levels.items() if v} for operation, levels in found.items()}
    return {operation: levels for operation, levels in spent.items() if levels}


def total(sent: Sent) -> dict[str, float]:
    return dict(sum((Counter(levels) for levels in sent.values()), Counter()))
