"""What a person sees while a run goes: a live bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from thinwire.dist.metrics import Record


def open_progress(total_steps: int, finished_steps: int, every_s: float, out: TextIO | None = None) -> Bar | Lines:
    """A Bar if `out` (default: standard output) is a terminal, else Lines."""
    out = out or sys.stdout
    return Bar(total_steps, finished_steps, out) if out.isatty() else Lines(total_steps, every_s, out)


class _BarAndFigures(Progress):
    """The figures below the bar: beside it they would not fit on a terminal of usual width."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield from (Text(task.fields["figures"]) for task in self.tasks)


class Bar:
    """A rich progress bar with the last step's figures; evaluations stay above it as lines."""

    def __init__(self, total_steps: int, finished_steps: int, out: TextIO) -> None:
        self._progress = _BarAndFigures(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeRemainingColumn(compact=True),
            console=Console(file=out),
        )
        self._task = self._progress.add_task("", total=total_steps, completed=finished_steps, figures="")
        self._progress.start()

    def write(self, record: Record) -> None:
        """Show one step's record."""
        self._progress.update(self._task, completed=record["step"], figures=figures(record))
        if "val_loss" in record:
            self._progress.console.print(f"step {record['step']}: {validation(record)}", highlight=False)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._progress.stop()


class Lines:
    """A line for the first step, for each evaluation, for the last step, and otherwise every `every_s` seconds."""

    def __init__(self, total_steps: int, every_s: float, out: TextIO) -> None:
        self._total_steps = total_steps
        self._every_s = every_s
        self._out = out
        self._next = 0.0

    def write(self, record: Record) -> None:
        """Print one step's record, or not."""
        now = time.monotonic()
        last = record["step"] == self._total_steps
        if now < self._next and not last and "val_loss" not in record:
            return
        self._next = now + self._every_s
        words = [f"step {record['step']}/{self._total_steps}", figures(record)]
        if "val_loss" in record:
            words.append(validation(record))
        print("  ".join(words), file=self._out, flush=True)

    def close(self) -> None:
        """Nothing is left to print."""


def figures(record: Record) -> str:
    """Loss, speed, compute and exposed communication time, bytes per step, compression ratio."""
    return (
        f"loss {record['loss']:.3f}  {_si(record['tokens_per_s'])}tok/s  "
        f"compute {record['compute_ms']:.0f} ms  exposed comm {record['exposed_comm_ms']:.0f} ms  "
        f"sent {_si(record['sent_bytes'])}B  received {_si(record['received_bytes'])}B  "
        f"ratio {record['compression_ratio']:.3g}x"
    )


def validation(record: Record) -> str:
    """Validation loss in nats, and in bits per byte of text or with the share of right classes."""
    if "val_accuracy" in record:
        return f"validation loss {record['val_loss']:.3f}  accuracy {record['val_accuracy']:.1%}"
    return f"validation loss {record['val_loss']:.3f}  {record['val_bits_per_byte']:.3f} bits/byte"


def _si(number: float) -> str:
    for prefix in ("", "k", "M", "G"):
        if abs(number) < 1000:
            break
        if prefix != "G":
            number /= 1000
    return f"{number:.3g} {prefix}"
