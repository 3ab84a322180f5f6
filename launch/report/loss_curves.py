"""Loss against wall-clock time, steps and bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from thinwire.launch.report.figure import (
    byte_unit,
    colour_of,
    legend_below,
    new_figure,
    style_of,
    to_png,
    whole_steps,
)
from thinwire.launch.report.outcome import RunOutcome
from thinwire.launch.report.run import Run

_FAR_APART = 20  # of bytes that runs sent: more do not fit on a plain axis
_MANY = 400  # steps from which on the thin line is a mean over some of them


def loss_figure(runs: Sequence[Run], outcomes: Sequence[RunOutcome]) -> bytes:
    """Three plots side by side, as PNG: training (thin) and validation loss (thick) over seconds, steps and bytes."""
    sent = [_sent(run) for run in runs]
    unit, name = byte_unit(max(totals[-1] for totals in sent))
    in_all = sorted(totals[-1] for totals in sent)
    far_apart = 0 < _FAR_APART * in_all[0] < in_all[-1]
    modelled = " (link modelled)" if outcomes[0].modelled else ""
    with new_figure(1, 3, height=4.4, sharey=True) as (figure, axes):
        over = axes[0]
        for number, (run, totals) in enumerate(zip(runs, sent, strict=True)):
            losses = run.numbers("loss")
            bytes_sent = [t / unit if t or not far_apart else math.nan for t in totals]
            for plot, x in zip(over, (run.numbers("seconds"), run.numbers("step"), bytes_sent), strict=True):
                evaluated = [i for i, record in enumerate(run.records) if "val_loss" in record]
                _draw(plot, number, run.label, x, losses, evaluated, [run.records[i]["val_loss"] for i in evaluated])
        over[0].set_xlabel(f"seconds of the run{modelled}")
        over[1].set_xlabel("steps")
        whole_steps(over[1])
        over[2].set_xlabel(f"{name} sent by one rank")
        over[0].set_ylabel(f"loss, nats per {_token(runs)}")
        for plot in over[:2]:
            plot.set_xlim(left=0)
        if far_apart:
            over[2].set_xscale("log")
            over[2].xaxis.set_major_formatter("{x:g}")
        else:
            over[2].set_xlim(left=0)
        figure.suptitle("Loss (thin: training, thick: validation)", fontsize=11)
        legend_below(figure, over[0])
        return to_png(figure)


def draw_curves(outcomes: Sequence[RunOutcome], path: Path, *, title: str) -> None:
    """Save a plot of training loss (line) and validation loss (dots) against seconds as PNG."""
    with new_figure(height=5.4) as (figure, grid):
        axes = grid[0][0]
        for number, outcome in enumerate(outcomes):
            dots = [outcome.seconds.index(seconds) for seconds, _ in outcome.validation]
            label = f"{outcome.label}: {outcome.step_s_median:.2f} s per step"
            values = [loss for _, loss in outcome.validation]
            _draw(axes, number, label, outcome.seconds, outcome.losses, dots, values)
        axes.set_xlabel("seconds" + (" (link modelled)" if outcomes[0].modelled else ""))
        axes.set_ylabel("loss, nats per byte (thin: training, thick: validation)")
        axes.set_title(title)
        axes.set_xlim(left=0)
        axes.legend()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(to_png(figure))


def _draw(
    axes: Any,
    number: int,
    label: str,
    x: Sequence[float],
    losses: Sequence[float],
    evaluated: Sequence[int],
    validation: Sequence[float],
) -> None:
    colour, style = colour_of(number), style_of(number)
    width = max(1, len(losses) // _MANY)
    thin_x = [x[min(len(x) - 1, i + width // 2)] for i in range(0, len(x), width)]
    thin_y = [sum(losses[i : i + width]) / len(losses[i : i + width]) for i in range(0, len(losses), width)]
    alone = not evaluated
    dot = "o" if len(thin_x) == 1 else ""
    axes.plot(
        thin_x, thin_y, style, marker=dot, color=colour, linewidth=1.6 if alone else 0.9, alpha=1.0 if alone else 0.45,
        label=label if alone else None,
    )  # fmt: skip
    if evaluated:
        axes.plot(
            [x[i] for i in evaluated],
            validation,
            style,
            marker="o",
            markersize=4,
            color=colour,
            linewidth=2,
            label=label,
        )


def _sent(run: Run) -> list[float]:
    """Bytes sent until the end of each step; 0 until the method has sent something."""
    own, control = run.numbers("sent_bytes"), run.numbers("control_sent_bytes")
    totals = accumulate(a + b for a, b in zip(own, control, strict=True))
    return [total if so_far else 0.0 for total, so_far in zip(totals, accumulate(own), strict=True)]


def _token(runs: Sequence[Run]) -> str:
    """What a loss is the mean over."""
    if any("val_accuracy" in record for run in runs for record in run.records):
        return "example"
    tokenizers = {run.setting("data.tokenizer") for run in runs}
    return "byte" if tokenizers == {"bytes"} else "token"
