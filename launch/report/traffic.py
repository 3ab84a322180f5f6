"""What a run sent, by operation and level of the machine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from thinwire.launch.report.figure import bottom_to_top, byte_unit, colour_of, legend_below, new_figure, to_png
from thinwire.launch.report.run import ReportError, Run

_FIELDS = ("calls", "sent_bytes", "received_bytes", "seconds")


@dataclass(frozen=True)
class OperationTraffic:
    """Of one operation on one level, the mean over all steps of the rank that wrote the records.

    seconds: during which one of its collectives was under way; what waits for late ranks counts, and several at once
      count several times. 0 where nobody measures it, as for messages that are just handed over.
    """

    operation: str
    level: str
    calls: float
    sent_bytes: float
    received_bytes: float
    seconds: float


def traffic_of(run: Run) -> list[OperationTraffic]:
    """By operation and level, the largest first; empty of a run whose records do not tell.

    Raises:
        ReportError: they tell it in another form.
    """
    totals: dict[tuple[str, str], dict[str, float]] = defaultdict(lambda: dict.fromkeys(_FIELDS, 0.0))
    for record in run.records:
        for operation, by_level in record.get("operations", {}).items():
            for level, traffic in by_level.items():
                for field in _FIELDS:
                    if not isinstance(traffic, Mapping) or field not in traffic:
                        raise ReportError(
                            f"{run.folder}/metrics.jsonl: step {record['step']}: operations.{operation}.{level} has no "
                            f"{field!r}"
                        )
                    totals[operation, level][field] += traffic[field]
    steps = len(run.records)
    rows = [
        OperationTraffic(operation, level, *(total[field] / steps for field in _FIELDS))
        for (operation, level), total in totals.items()
    ]
    return sorted(rows, key=lambda row: (-row.sent_bytes, -row.received_bytes, row.operation))


def sent_by_level(run: Run) -> dict[str, float]:
    """Mean payload bytes of a step by level, without control messages; empty of an older run."""
    totals: dict[str, float] = defaultdict(float)
    for record in run.records:
        for level, count in record.get("sent_bytes_by_level", {}).items():
            totals[level] += count
    return {level: total / len(run.records) for level, total in totals.items() if level != "self"}


def traffic_figure(runs: Sequence[Run]) -> bytes | None:
    """A bar for each run and level: bytes sent per step, by operation; None if no run sent or tells anything."""
    bars: list[tuple[str, dict[str, float]]] = []
    for run in runs:
        by_level: dict[str, dict[str, float]] = defaultdict(dict)
        for row in traffic_of(run):
            if row.sent_bytes:
                name = "control" if row.operation.startswith("control/") else row.operation
                by_level[row.level][name] = by_level[row.level].get(name, 0.0) + row.sent_bytes
        for level, sent in by_level.items():
            bars.append((f"{run.label}: {level}", sent))
    if not bars:
        return None
    names = list(dict.fromkeys(operation for _, sent in bars for operation in sent))
    unit, unit_name = byte_unit(max(sum(sent.values()) for _, sent in bars))
    with new_figure(height=1.8 + 0.4 * len(bars)) as (figure, grid):
        axes = grid[0][0]
        longest = max(sum(sent.values()) for _, sent in bars) / unit
        for number, name in enumerate(names):
            lefts, widths = [], []
            for _, sent in bars:
                before = [sent.get(other, 0.0) for other in names[:number]]
                lefts.append(sum(before) / unit)
                widths.append(sent.get(name, 0.0) / unit)
            axes.barh(range(len(bars)), widths, left=lefts, height=0.62, color=colour_of(number), label=name)
        for place, (_, sent) in enumerate(bars):
            total = sum(sent.values())
            own_unit, own_name = byte_unit(total)
            axes.text(total / unit, place, f"  {total / own_unit:.4g} {own_name}", va="center", fontsize=8.5)
        bottom_to_top(axes, [label for label, _ in bars])
        axes.set_xlim(0, 1.18 * longest)
        axes.set_xlabel(f"{unit_name} that one rank sends per step, mean over all steps (payload, metered)")
        figure.suptitle("Bytes by level and operation", fontsize=11)
        legend_below(figure, axes)
        return to_png(figure)
