"""Runs side by side: read from their folders, as a table and as curves. Imports no torch."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class RunOutcome:
    """What a finished run cost and reached. Times and bytes are those of rank 0, per step, medians or means as named.

    seconds, losses: one point per step. validation: (seconds, loss in nats) of each evaluation.
    interface_bytes_mean: what the network interface counted; None where the ranks shared an interface.
    modelled: the link's share of the times was computed from bytes and rate, not measured.
    busiest_expert: its selections over the mean, in the worst layer, at the end; None = there are no experts.
    """

    label: str
    seconds: tuple[float, ...]
    losses: tuple[float, ...]
    validation: tuple[tuple[float, float], ...]
    bits_per_byte: float
    step_s_median: float
    compute_ms_median: float
    exposed_comm_ms_median: float
    sent_bytes_mean: float
    interface_bytes_mean: float | None
    modelled: bool
    busiest_expert: float | None = None


def read_outcome(label: str, folder: Path, *, modelled_bps: float | None) -> RunOutcome:
    """Read a run folder's metrics.jsonl.

    Args:
        modelled_bps: rate of the link that the run did not have, in bits per second: sent bytes * 8 / rate takes the
            place of the communication time that was measured. None: take what was measured.
    """
    records: list[dict[str, Any]] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steady = records[1:] or records  # the first step also builds what later steps use again
    sent = [r["sent_bytes"] + r["control_sent_bytes"] for r in records]
    exposed_ms = [
        r["exposed_comm_ms"] if modelled_bps is None else 8e3 * r["sent_bytes"] / modelled_bps for r in steady
    ]
    step_s = [(r["compute_ms"] + ms) / 1e3 for r, ms in zip(steady, exposed_ms, strict=True)]
    seconds = [r["seconds"] for r in records]
    if modelled_bps is not None:
        added = 0.0
        for i, record in enumerate(records):
            added += 8 * record["sent_bytes"] / modelled_bps - record["exposed_comm_ms"] / 1e3
            seconds[i] += added
    evaluated = [i for i, r in enumerate(records) if "val_loss" in r]
    shared_interface = modelled_bps is not None
    return RunOutcome(
        label=label,
        seconds=tuple(seconds),
        losses=tuple(r["loss"] for r in records),
        validation=tuple((seconds[i], records[i]["val_loss"]) for i in evaluated),
        bits_per_byte=records[evaluated[-1]]["val_bits_per_byte"],
        step_s_median=statistics.median(step_s),
        compute_ms_median=statistics.median(r["compute_ms"] for r in steady),
        exposed_comm_ms_median=statistics.median(exposed_ms),
        sent_bytes_mean=statistics.mean(sent),
        interface_bytes_mean=None if shared_interface else statistics.mean(r["interface_sent_bytes"] for r in records),
        modelled=modelled_bps is not None,
        busiest_expert=_busiest_expert(records[-1]),
    )


def print_table(outcomes: Sequence[RunOutcome], *, title: str) -> None:
    """Print one column per run, the first being what the others are compared with."""
    wide = sys.stdout.isatty()
    console = Console() if wide else Console(width=40 + 18 * len(outcomes), color_system=None)
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for outcome in outcomes:
        table.add_column(outcome.label, justify="right")
    times = " (link modelled)" if outcomes[0].modelled else ""
    rows: list[tuple[str, Callable[[RunOutcome], str]]] = [
        ("validation loss, nats", lambda o: f"{o.validation[-1][1]:.4f}"),
        ("validation loss, bits per byte", lambda o: f"{o.bits_per_byte:.4f}"),
        (f"seconds per step{times}", lambda o: f"{o.step_s_median:.3f}"),
        ("  compute, ms", lambda o: f"{o.compute_ms_median:.0f}"),
        (f"  exposed communication, ms{times}", lambda o: f"{o.exposed_comm_ms_median:.0f}"),
        ("sent per rank and step, metered", lambda o: _bytes(o.sent_bytes_mean)),
        ("  as the interface counted", lambda o: _bytes(o.interface_bytes_mean)),
        ("  interface / metered", _overhead),
        ("steps per second, against the first", lambda o: f"{outcomes[0].step_s_median / o.step_s_median:.2f}x"),
    ]
    if any(outcome.busiest_expert is not None for outcome in outcomes):
        rows.append(
            ("busiest expert, times the mean", lambda o: f"{o.busiest_expert:.2f}" if o.busiest_expert else "-")
        )
    for name, value in rows:
        table.add_row(name, *(value(outcome) for outcome in outcomes))
    console.print(table)


def draw_curves(outcomes: Sequence[RunOutcome], path: Path, *, title: str) -> None:
    """Save a plot of training loss (line) and validation loss (dots) against seconds as PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.5), dpi=120, layout="constrained")
    for outcome in outcomes:
        (line,) = axes.plot(outcome.seconds, outcome.losses, linewidth=1.2, alpha=0.6)
        axes.plot(
            *zip(*outcome.validation, strict=True),
            "o-",
            color=line.get_color(),
            linewidth=2,
            label=f"{outcome.label}: {outcome.step_s_median:.2f} s per step",
        )
    axes.set_xlabel("seconds" + (" (link modelled)" if outcomes[0].modelled else ""))
    axes.set_ylabel("loss, nats per byte (thin: training, thick: validation)")
    axes.set_title(title)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def _busiest_expert(record: dict[str, Any]) -> float | None:
    violation = record.get("balance", {}).get("max_violation")
    return None if violation is None else 1 + violation


def _bytes(count: float | None) -> str:
    if count is None:
        return "shared"
    return f"{count / 1e6:.3f} MB" if count >= 1e5 else f"{count:.0f} bytes"


def _overhead(outcome: RunOutcome) -> str:
    return (
        "-" if outcome.interface_bytes_mean is None else f"{outcome.interface_bytes_mean / outcome.sent_bytes_mean:.4f}"
    )
