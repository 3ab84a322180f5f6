"""What a run cost and reached, in a few numbers: the rows of the table in which runs are compared."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from thinwire.comm.units import format_bytes
from thinwire.launch.report.run import Run
from thinwire.launch.report.step_time import outside_steps_s, step_times


@dataclass(frozen=True)
class RunOutcome:
    """Times and bytes are those of the rank that wrote the records, per step, medians or means as named.

    seconds, losses: one point per step. validation: (seconds, loss in nats) of each evaluation; may be empty.
    own_validation: of gossip, the loss of the machine that wrote, before it took the mean of all at the end.
    bits_per_byte, accuracy: of the last evaluation, where the data have them.
    compute_ms, exposed_ms, waiting_ms: medians of StepTimes; step_s_median: of their sum, without the first step, which
      also builds what later steps use again. step_s_mean: with it, and with steps in which a round ends.
    outside_s: seconds of the run that belong to no step.
    interface_bytes_mean: what the network interface counted; None where the ranks shared an interface.
    modelled: the link's share of the times was computed from bytes and rate, not measured.
    busiest_expert: its selections over the mean, in the worst layer, at the end; None = there are no experts.
    """

    label: str
    seconds: tuple[float, ...]
    losses: tuple[float, ...]
    validation: tuple[tuple[float, float], ...]
    own_validation: float | None
    bits_per_byte: float | None
    accuracy: float | None
    step_s_median: float
    step_s_mean: float
    compute_ms_median: float
    exposed_comm_ms_median: float
    waiting_ms_median: float | None
    outside_s: float
    sent_bytes_mean: float
    interface_bytes_mean: float | None
    modelled: bool
    busiest_expert: float | None = None


Row = tuple[str, Callable[[RunOutcome], str]]


def outcome_of(run: Run) -> RunOutcome:
    """The numbers of a run.

    Raises:
        ReportError: a record lacks one that it must have.
    """
    times = step_times(run)
    first = min(1, len(run.records) - 1)
    sent = [a + b for a, b in zip(run.numbers("sent_bytes"), run.numbers("control_sent_bytes"), strict=True)]
    evaluated = [record for record in run.records if "val_loss" in record]
    told_of_ranks = any("exposed_comm_ms_by_rank" in record for record in run.records)
    own_interface = all("interface_sent_bytes" in record for record in run.records)
    violation = run.records[-1].get("balance", {}).get("max_violation")
    return RunOutcome(
        label=run.label,
        seconds=tuple(run.numbers("seconds")),
        losses=tuple(run.numbers("loss")),
        validation=tuple((r["seconds"], r["val_loss"]) for r in evaluated),
        own_validation=evaluated[-1].get("own_val_loss") if evaluated else None,
        bits_per_byte=evaluated[-1].get("val_bits_per_byte") if evaluated else None,
        accuracy=evaluated[-1].get("val_accuracy") if evaluated else None,
        step_s_median=statistics.median(times.total[first:]) / 1e3,
        step_s_mean=statistics.mean(times.total) / 1e3,
        compute_ms_median=statistics.median(times.compute[first:]),
        exposed_comm_ms_median=statistics.median(times.exposed[first:]),
        waiting_ms_median=statistics.median(times.waiting[first:]) if told_of_ranks else None,
        outside_s=outside_steps_s(run),
        sent_bytes_mean=statistics.mean(sent),
        interface_bytes_mean=statistics.mean(run.numbers("interface_sent_bytes")) if own_interface else None,
        modelled=run.modelled_bps is not None,
        busiest_expert=None if violation is None else 1 + violation,
    )


def rows_of(outcomes: Sequence[RunOutcome]) -> list[Row]:
    """The rows of the table: a name, and the cell of an outcome. Rows that no run could fill are left out."""
    first = outcomes[0]
    times = " (link modelled)" if first.modelled else ""
    rows: list[Row] = []
    if any(o.validation for o in outcomes):
        rows.append(("validation loss, nats", lambda o: f"{o.validation[-1][1]:.4f}" if o.validation else "-"))
    if any(o.own_validation is not None for o in outcomes):
        rows.append(("  of one machine, before the merge", lambda o: _number(o.own_validation, "{:.4f}")))
    if any(o.bits_per_byte is not None for o in outcomes):
        rows.append(("validation loss, bits per byte", lambda o: _number(o.bits_per_byte, "{:.4f}")))
    if any(o.accuracy is not None for o in outcomes):
        rows.append(("validation accuracy", lambda o: _number(o.accuracy, "{:.1%}")))
    rows += [
        ("training loss, last step", lambda o: f"{o.losses[-1]:.4f}"),
        (f"seconds per step{times}", lambda o: f"{o.step_s_median:.3f}"),
        ("  compute, ms", lambda o: f"{o.compute_ms_median:.0f}"),
        (f"  exposed communication, ms{times}", lambda o: f"{o.exposed_comm_ms_median:.0f}"),
    ]
    if any(o.waiting_ms_median is not None for o in outcomes):
        rows.append(("  waiting for slower ranks, ms", lambda o: _number(o.waiting_ms_median, "{:.0f}")))
    rows += [
        ("  mean of all steps, the first too", lambda o: f"{o.step_s_mean:.3f}"),
        ("sent per rank and step, metered", lambda o: bytes_cell(o.sent_bytes_mean)),
        ("  as the interface counted", lambda o: bytes_cell(o.interface_bytes_mean)),
        ("  interface / metered", _overhead),
        ("steps per second, against the first", lambda o: f"{first.step_s_median / o.step_s_median:.2f}x"),
    ]
    if any(o.busiest_expert is not None for o in outcomes):
        rows.append(("busiest expert, times the mean", lambda o: _number(o.busiest_expert, "{:.2f}")))
    return rows


def bytes_cell(count: float | None) -> str:
    """A mean number of bytes for a table; None: ranks shared what would have counted it."""
    if count is None:
        return "shared"
    return (
        f"{count / 1e6:.3f} MB" if 1e5 <= count < 1e9 else f"{count:.0f} bytes" if count < 1e5 else format_bytes(count)
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _overhead(outcome: RunOutcome) -> str:
    if outcome.interface_bytes_mean is None or not outcome.sent_bytes_mean:
        return "-"
    return f"{outcome.interface_bytes_mean / outcome.sent_bytes_mean:.4f}"
