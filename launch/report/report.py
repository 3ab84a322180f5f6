"""What a report says: sections, made of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thinwire.comm.units import format_bytes
from thinwire.launch.report.comparable import differences, settings_that_differ
from thinwire.launch.report.loss_curves import loss_figure
from thinwire.launch.report.method_plots import measures_figure
from thinwire.launch.report.outcome import outcome_of, rows_of
from thinwire.launch.report.page import Link, Note, Picture, Section, Table, page
from thinwire.launch.report.run import ReportError, Run
from thinwire.launch.report.time_plots import ranks_figure, steps_figure, time_figure
from thinwire.launch.report.trace import merge_traces, read_trace, timeline_figure
from thinwire.launch.report.traffic import sent_by_level, traffic_figure, traffic_of

PAGE = "report.html"


@dataclass(frozen=True)
class Written:
    """page: the HTML file. files: all that were written, it included. notes: what a reader must know."""

    page: Path
    files: tuple[Path, ...]
    notes: tuple[str, ...]


def write_report(runs: Sequence[Run], folder: Path, *, anyway: bool = False) -> Written:
    """Write the page, its pictures and the merged traces into a folder, which is made.

    Args:
        runs: at least one; the first is what the others are compared with.
        anyway: put side by side what cannot be compared, with a note in red.
    Raises:
        ReportError: the runs cannot be compared, with every reason; or a record lacks what it must have.
    """
    labels = [run.label for run in runs]
    found = differences(runs)
    if (forbidding := [d for d in found if d.forbids]) and not anyway:
        reasons = "\n".join(f"  {d.sentence(labels)}" for d in forbidding)
        raise ReportError(
            f"these runs cannot be compared, since their losses mean other things:\n{reasons}\n"
            "Report each alone, or give --anyway to put them side by side with these sentences above them"
        )
    notes = [Note(d.sentence(labels), d.forbids) for d in found]
    notes += [
        Note(
            f"{run.label}: the communication's share of all its times is computed for a link of {run.modelled_bps:g} "
            "bit/s, without overlap; it was not measured"
        )
        for run in runs
        if run.modelled_bps is not None
    ]
    outcomes = [outcome_of(run) for run in runs]
    pictures: dict[str, bytes] = {"loss": loss_figure(runs, outcomes), "time": time_figure(runs)}
    pictures["steps"] = steps_figure(runs)
    for name, png in (
        ("ranks", ranks_figure(runs)),
        ("traffic", traffic_figure(runs)),
        ("method", measures_figure(runs)),
    ):
        if png is not None:
            pictures[name] = png
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.png" for name in pictures]
    for path, png in zip(files, pictures.values(), strict=True):
        path.write_bytes(png)
    sections = [
        Section("Table", [Table(["", *labels], [[name, *map(cell, outcomes)] for name, cell in rows_of(outcomes)])]),
        *_pictured(pictures, runs),
    ]
    for number, run in enumerate(runs):
        if run.traces:
            section, written = _traced(run, number, folder)
            sections.append(section)
            files += written
    sections += [_traffic_table(runs), *_facts(runs)]
    lead = f"{len(runs)} runs, compared with the first" if len(runs) > 1 else _one_line(runs[0])
    title = f"thinwire report: {', '.join(labels)}" if len(labels) < 5 else f"thinwire report: {len(labels)} runs"
    footer = f"Written by thinwire report {' '.join(str(run.folder) for run in runs)}."
    path = folder / PAGE
    path.write_text(page(title, lead, notes, sections, footer), encoding="utf-8")
    return Written(path, (path, *files), tuple(note.text for note in notes))


def _pictured(pictures: Mapping[str, bytes], runs: Sequence[Run]) -> list[Section]:
    gossip = any(run.setting("method.kind") == "gossip" for run in runs)
    own = " A run of gossip tells of the machine that wrote its records." if gossip else ""
    waits = any("exposed_comm_ms_by_rank" in record for run in runs for record in run.records)
    not_told = "" if waits else " No run here tells of each rank's time, so waiting is a part of the communication."
    texts = {
        "loss": (
            "Loss",
            "Training loss is the mean over the ranks' losses of a step, validation loss that of the text kept for "
            f"validation.{own} Bytes are payload as metered at one rank, control messages included.",
        ),
        "time": (
            "Where the time goes",
            "Exposed communication: the program was blocked by it, and so were all ranks. Waiting: it was blocked "
            f"while the rank that waited least still computed.{not_told} What is hidden behind computation costs "
            "nothing and is not shown.",
        ),
        "steps": ("Step by step", "The first step also builds what later ones use again."),
        "ranks": (
            "Waiting for whom",
            "The rank that waits least in a step is the one that the others wait for. Ranks that are last equally "
            "often are equally fast; one that is last nearly always is a straggler.",
        ),
        "traffic": (
            "Bytes by level and operation",
            "Payload of one rank as the meter counted it where bytes were handed to the transport; headers are not in "
            "it. Control is what the ranks tell each other beside the method.",
        ),
        "method": ("What the methods tell of themselves", ""),
    }
    return [
        Section(title, [Picture(pictures[name], title)], caption)
        for name, (title, caption) in texts.items()
        if name in pictures
    ]


def _traced(run: Run, number: int, folder: Path) -> tuple[Section, list[Path]]:
    traces = [read_trace(path) for path in run.traces]
    merged = folder / f"trace_{number}_{_file_name(run.label)}.json.gz"
    merge_traces(traces, merged)
    files = [merged]
    link = Link(merged.name, f"{merged.name}: traces of {len(traces)} ranks, to be opened in ui.perfetto.dev")
    parts: list[Table | Picture | Link] = [link]
    drawn = timeline_figure(traces)
    if drawn is not None:
        step, png = drawn
        path = folder / f"timeline_{number}_{_file_name(run.label)}.png"
        path.write_bytes(png)
        files.append(path)
        parts.insert(0, Picture(png, f"Step {step} of {run.label}, by rank"))
    told = run.facts.get("ranks")
    missing = told - len(traces) if isinstance(told, int) else 0
    few = f" Traces of {missing} ranks are missing: they lie on their own hosts." if missing > 0 else ""
    caption = f"Hosts' clocks may differ by milliseconds. The profiler slows a traced step down.{few} Red: blocked."
    return Section(f"One step of {run.label}", parts, caption), files


def _traffic_table(runs: Sequence[Run]) -> Section:
    rows = []
    for run in runs:
        predicted = run.facts.get("predicted_bytes") or {}
        by_level = sent_by_level(run)
        for level in dict.fromkeys([*by_level, *predicted]):
            told = f"{predicted[level]:,} bytes" if level in predicted else "-"
            metered = f"{by_level.get(level, 0.0):,.0f} bytes"
            rows.append([run.label, f"all but control, {level}", "-", metered, "-", "-", told])
        rows += [
            [
                run.label,
                f"{row.operation}, {row.level}",
                f"{row.calls:.3g}",
                f"{row.sent_bytes:,.0f} bytes",
                f"{row.received_bytes:,.0f} bytes",
                f"{1e3 * row.seconds:.1f}" if row.seconds else "-",
                "-",
            ]
            for row in traffic_of(run)
        ]
    head = ["run", "operation, level", "calls", "sent", "received", "ms under way", "predicted"]
    caption = (
        "Means of a step. The ms under way count from the hand-over of a collective to its end, waiting for late ranks "
        "included, whether it was hidden behind computation or not. Predicted is what the method said before the "
        "first step that it would send in that step."
    )
    return Section("Traffic by operation", [Table(head, rows)], caption)


def _facts(runs: Sequence[Run]) -> list[Section]:
    labels = [run.label for run in runs]
    keys = ("thinwire", "torch", "python", "ranks", "hosts", "levels", "device", "interface", "threads", "launcher")
    rows = [[key, *(_fact(run, key) for run in runs)] for key in keys]
    rows += [
        ["parameters", *(_count(run.facts.get("parameters")) for run in runs)],
        ["tokens per step", *(_count(run.facts.get("tokens_per_step")) for run in runs)],
        ["steps", *(str(run.records[-1]["step"]) for run in runs)],
        ["seconds of the run", *(f"{run.records[-1]['seconds']:.1f}" for run in runs)],
        ["sent in all", *(format_bytes(sum(run.numbers("sent_bytes"))) for run in runs)],
        ["folder", *(str(run.folder) for run in runs)],
    ]
    sections = [Section("What ran where", [Table(["", *labels], rows, text_from=1)])]
    if len(runs) > 1:
        differing = [[path, *map(_short, values)] for path, values in settings_that_differ(runs)]
        sections.append(Section("Settings that differ", [Table(["", *labels], differing, text_from=1)]))
    return sections


def _fact(run: Run, key: str) -> str:
    value = run.facts.get(key)
    if value is None:
        return "not recorded"
    if key == "hosts":
        return ", ".join(dict.fromkeys(value))
    if key == "levels":
        return ", ".join(f"{level['name']} of {level['size']}" for level in value) or "none"
    return str(value)


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "not recorded"


def _one_line(run: Run) -> str:
    method = run.setting("method.kind") or "unknown method"
    ranks = run.facts.get("ranks")
    among = f" on {ranks} rank{'s' * (ranks != 1)}" if isinstance(ranks, int) else ""
    return f"{run.records[-1]['step']} steps of {method}{among}, {run.records[-1]['seconds']:.1f} s"


def _short(value: str) -> str:
    return value if len(value) <= 200 else f"{value[:190]} ..."


def _file_name(label: str) -> str:
    return "".join(c if c.isalnum() or c in "-." else "-" for c in label)
