"""Traces of all ranks of a run: read, put into one file for Perfetto, and one of their steps as a picture."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thinwire.launch.report.figure import COMPUTE, EXPOSED, WAITING, bottom_to_top, legend_below, new_figure, to_png
from thinwire.launch.report.run import ReportError

_PHASES = {"forward": COMPUTE, "backward": "#3f6f98", "optimizer": "#a9c7df"}
_EXCHANGES = (EXPOSED, "#009e73", "#cc79a7", "#7a5195", "#8c6d31", "#000000")
_EXCHANGE, _WAIT = "thinwire::", "wait: "
_STEP = re.compile(r"step (\d+)")
_MOST_RANKS = 12


@dataclass(frozen=True)
class Span:
    """A named range of one thread; begin and end in seconds, of the clock that the hosts' traces were written by."""

    name: str
    begin_s: float
    end_s: float


@dataclass(frozen=True)
class RankTrace:
    """What one rank has traced. events: as in the file, times in microseconds after base_s."""

    rank: int
    host: str
    base_s: float
    events: Sequence[Mapping[str, Any]]
    spans: Sequence[Span]

    def step(self, number: int) -> Span | None:
        """The range of a step."""
        return next((span for span in self.spans if span.name == f"step {number}"), None)

    @property
    def steps(self) -> list[int]:
        """Numbers of those that were traced."""
        return sorted(int(match[1]) for span in self.spans if (match := _STEP.fullmatch(span.name)))


def read_trace(path: Path) -> RankTrace:
    """Read a rank's file.

    Raises:
        ReportError: it is no trace, or none of thinwire's.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        facts, events = content["thinwire"], content["traceEvents"]
        base_s = float(content.get("baseTimeNanoseconds", 0)) / 1e9
        spans = [
            Span(event["name"], base_s + event["ts"] / 1e6, base_s + (event["ts"] + event.get("dur", 0)) / 1e6)
            for event in events
            if event.get("ph") == "X"
            and event.get("cat") != "gpu_user_annotation"  # the same once more, as the device saw it
            and _is_ours(str(event.get("name")))
        ]
        return RankTrace(int(facts["rank"]), str(facts["host"]), base_s, events, spans)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise ReportError(f"{path}: it is no trace that `thinwire train` has written: {error!r}; remove it") from None


def merge_traces(traces: Sequence[RankTrace], path: Path) -> None:
    """Write one trace of all ranks, gzipped: each rank's process under its name, on one axis of time."""
    base_s = min(trace.base_s for trace in traces)
    merged: list[dict[str, Any]] = []
    for trace in sorted(traces, key=lambda t: t.rank):
        shift_us = (trace.base_s - base_s) * 1e6
        numbers: dict[str, int] = {}
        for event in trace.events:
            known = str(event.get("pid"))
            number = numbers.setdefault(known, 1000 * trace.rank + len(numbers))
            moved = {**event, "pid": number}
            if "ts" in event:
                moved["ts"] = event["ts"] + shift_us
            if "id" in event:  # of arrows, which would else join events of two ranks
                moved["id"] = f"{trace.rank}/{event['id']}"
            if event.get("ph") == "M" and event.get("name") == "process_name":
                moved["args"] = {"name": f"rank {trace.rank} on {trace.host}: {event.get('args', {}).get('name', '')}"}
            if event.get("ph") == "M" and event.get("name") == "process_sort_index":
                moved["args"] = {"sort_index": number}
            merged.append(moved)
    content = {"displayTimeUnit": "ms", "traceEvents": merged}
    with gzip.GzipFile(path, "wb", mtime=0) as file:
        file.write(json.dumps(content).encode())


def timeline_figure(traces: Sequence[RankTrace]) -> tuple[int, bytes] | None:
    """(number of a step in the middle of the traced ones, its picture as PNG): two lines for each rank.

    The upper one is what its program did, with what it was blocked by in red; the lower one what its queues carried.
    None if no step was traced to its end.
    """
    steps = traces[0].steps
    if not steps:
        return None
    number = steps[len(steps) // 2]
    shown = [(trace, step) for trace in traces if (step := trace.step(number)) is not None][:_MOST_RANKS]
    began, ended = min(step.begin_s for _, step in shown), max(step.end_s for _, step in shown)
    kinds: dict[str, str] = {}
    with new_figure(height=1.7 + 0.62 * len(shown)) as (figure, grid):
        axes = grid[0][0]
        labels: list[str] = []
        for trace, _ in shown:
            inside = [span for span in trace.spans if span.end_s > began and span.begin_s < ended]
            above, below = len(labels), len(labels) + 1
            exchanges = any(span.name.startswith(_EXCHANGE) for span in inside)
            labels += [f"rank {trace.rank}", *(["its exchanges"] if exchanges else [])]
            for span in sorted(inside, key=lambda s: s.begin_s):
                colour, place, height = _look(span.name, kinds)
                if colour is None:
                    continue
                left, width = 1e3 * (span.begin_s - began), 1e3 * (span.end_s - span.begin_s)
                axes.barh(below if place else above, width, left=left, height=height, color=colour, linewidth=0)
        for name, colour in {**_PHASES, "blocked": WAITING, **kinds}.items():
            axes.barh(0, 0, color=colour, label=name)
        axes.set_ylim(-0.6, len(labels) - 0.4)
        bottom_to_top(axes, labels)
        axes.set_xlim(0, 1e3 * (ended - began))
        axes.set_xlabel(f"ms of step {number}, by the hosts' own clocks")
        figure.suptitle(f"Step {number}, by rank", fontsize=11)
        legend_below(figure, axes)
        return number, to_png(figure)


def _look(name: str, kinds: dict[str, str]) -> tuple[str | None, bool, float]:
    """(colour, whether it belongs to the queues, height of its bar); new kinds of exchanges get colours."""
    if name in _PHASES:
        return _PHASES[name], False, 0.8
    if name.startswith(_WAIT):
        return WAITING, False, 0.36
    if name.startswith(_EXCHANGE):
        kind = re.sub(r"\d+$", "", name.removeprefix(_EXCHANGE))
        colour = kinds.setdefault(kind, _EXCHANGES[len(kinds) % len(_EXCHANGES)])
        return colour, True, 0.8
    return None, False, 0.0


def _is_ours(name: str) -> bool:
    return name in _PHASES or name.startswith((_WAIT, _EXCHANGE)) or _STEP.fullmatch(name) is not None
