"""Where each step's time goes, and for whom the ranks wait, as plots."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from thinwire.launch.report.figure import (
    COMPUTE,
    EXPOSED,
    OUTSIDE,
    WAITING,
    bottom_to_top,
    legend_below,
    new_figure,
    to_png,
    whole_steps,
)
from thinwire.launch.report.run import Run
from thinwire.launch.report.step_time import RankTimes, StepTimes, outside_steps_s, rank_times, step_times, waited_for

_KINDS = (
    ("compute", COMPUTE),
    ("exposed communication", EXPOSED),
    ("waiting for slower ranks", WAITING),
)
_ON_WHITE = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
_MOST_BARS = 64  # steps, or runs of neighbouring steps, in the plot of a run


def time_figure(runs: Sequence[Run]) -> bytes:
    """One bar for each run: the mean seconds that a step takes of the run's time, by what they were spent on."""
    with new_figure(height=1.9 + 0.42 * len(runs)) as (figure, grid):
        axes = grid[0][0]
        longest = 0.0
        for number, run in enumerate(runs):
            times, steps = step_times(run), len(run.records)
            parts = [statistics.mean(values) / 1e3 for values in (times.compute, times.exposed, times.waiting)]
            parts.append(outside_steps_s(run) / steps)
            left = 0.0
            for part, (name, colour) in zip(
                parts, (*_KINDS, ("evaluations, checkpoints, start", OUTSIDE)), strict=True
            ):
                axes.barh(number, part, left=left, color=colour, height=0.62, label=name if number == 0 else None)
                left += part
            longest = max(longest, left)
            share = 100 * (parts[1] + parts[2]) / max(1e-12, sum(parts[:3]))
            axes.text(
                left, number, f"  {sum(parts[:3]):.3g} s a step, {share:.0f} % blocked", va="center", fontsize=8.5
            )
        figure.suptitle("Where the time of a step goes", fontsize=11)
        bottom_to_top(axes, [run.label for run in runs])
        axes.set_xlim(0, 1.32 * longest)
        axes.set_xlabel("seconds of the run per step, mean over all steps")
        legend_below(figure, axes)
        return to_png(figure)


def steps_figure(runs: Sequence[Run]) -> bytes:
    """One plot for each run: compute, exposed communication and waiting of its steps, stacked."""
    with new_figure(len(runs), 1, height=1.1 + 1.6 * len(runs)) as (figure, grid):
        for run, (axes,) in zip(runs, grid, strict=True):
            times, steps = step_times(run), [int(step) for step in run.numbers("step")]
            edges, parts = _bins(steps, times)
            widths = [after - before for before, after in pairwise(edges)]
            below = [0.0] * len(widths)
            for heights, (name, colour) in zip(parts, _KINDS, strict=True):
                axes.bar(edges[:-1], heights, widths, below, align="edge", color=colour, linewidth=0, label=name)
                below = [a + b for a, b in zip(below, heights, strict=True)]
            axes.set_xlim(edges[0], edges[-1])
            steady = below[1:] or below
            axes.set_ylim(0, 1.15 * min(max(steady), 6 * statistics.median(steady)))
            whole_steps(axes)
            axes.set_title(run.label, loc="left", fontsize=9.5)
            axes.set_ylabel("ms")
            if (first := below[0]) > axes.get_ylim()[1]:
                axes.text(
                    edges[0], 0.97 * axes.get_ylim()[1], f" first: {first:.0f} ms", va="top", fontsize=8, bbox=_ON_WHITE
                )
        grid[-1][0].set_xlabel("step")
        figure.suptitle("Time of the steps", fontsize=11)
        legend_below(figure, grid[0][0])
        return to_png(figure)


def ranks_figure(runs: Sequence[Run]) -> bytes | None:
    """One plot for each run that knows its ranks' times: what each computed and was blocked, and how often it was last.

    Machines of gossip know for whom they themselves have waited. None if no run knows anything.
    """
    known: list[tuple[Run, list[RankTimes], dict[int, float]]] = []
    for run in runs:
        ranks, machines = rank_times(run), waited_for(run)
        if ranks or machines:
            known.append((run, ranks, machines))
    if not known:
        return None
    heights = [max(1.5, 0.75 + 0.24 * min(24, len(ranks) or len(machines))) for _, ranks, machines in known]
    with new_figure(len(known), 1, height=1.0 + sum(heights), height_ratios=heights) as (figure, grid):
        labelled = None
        for (run, ranks, machines), (axes,) in zip(known, grid, strict=True):
            some = f": the 24 that the others waited for most, of {len(ranks)}" if len(ranks) > 24 else ""
            axes.set_title(run.label + some, loc="left", fontsize=9.5)
            if ranks:
                _draw_ranks(axes, ranks)
                labelled = labelled or axes
            else:
                rows = sorted(machines.items(), key=lambda item: -item[1])[:24]
                axes.barh(range(len(rows)), [s for _, s in rows], color=WAITING, height=0.62)
                bottom_to_top(axes, [f"machine {rank}" for rank, _ in rows])
                axes.set_xlabel("seconds that the machine which wrote the records has waited for this one")
        figure.suptitle("Waiting for whom", fontsize=11)
        if labelled is not None:
            legend_below(figure, labelled)
        return to_png(figure)


def _draw_ranks(axes: Any, ranks: Sequence[RankTimes]) -> None:
    shown = ranks if len(ranks) <= 24 else sorted(ranks, key=lambda r: -r.others_waited)[:24]
    places = range(len(shown))
    compute, blocked = [r.compute for r in shown], [r.exposed for r in shown]
    axes.barh(places, compute, color=COMPUTE, height=0.62, label="compute")
    axes.barh(places, blocked, left=compute, color=EXPOSED, height=0.62, label="blocked (communication and waiting)")
    longest = max(a + b for a, b in zip(compute, blocked, strict=True))
    for place, rank in zip(places, shown, strict=True):
        axes.text(
            rank.compute + rank.exposed,
            place,
            f"  last in {rank.last:.0%} of the steps; the others waited {rank.others_waited:.3g} ms a step for it",
            va="center",
            fontsize=8.5,
        )
    bottom_to_top(axes, [f"rank {rank.rank}" for rank in shown])
    axes.set_xlim(0, 1.9 * longest)
    axes.set_xlabel("ms of a step, mean without the first step")


def _bins(steps: Sequence[int], times: StepTimes) -> tuple[list[float], list[list[float]]]:
    """Edges in steps, and the mean of each kind of time between them."""
    width = -(-len(steps) // _MOST_BARS)
    firsts = range(0, len(steps), width)
    edges = [steps[i] - 0.5 for i in firsts] + [steps[-1] + 0.5]
    kinds = (times.compute, times.exposed, times.waiting)
    return edges, [[statistics.mean(kind[i : i + width]) for i in firsts] for kind in kinds]
