"""What a method tells of itself over the steps: how far models are apart, what is left out, how experts are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from thinwire.launch.report.figure import (
    colour_of,
    legend_below,
    new_figure,
    plain_log_axis,
    style_of,
    to_png,
    whole_steps,
)
from thinwire.launch.report.run import Run


@dataclass(frozen=True)
class Measure:
    """A number of the records, by dotted key, and its plot where there are two at least. log: if all are positive."""

    key: str
    title: str
    unit: str
    log: bool = False


MEASURES = (
    Measure("method.consensus_distance", "Consensus distance", "RMS over the machines", log=True),
    Measure("own_val_loss", "Validation loss of one machine's own model", "nats"),
    Measure("method.compression_error", "Compression error", "norm left out / norm given"),
    Measure("method.error_norm", "Error feedback: norm of what is remembered", "norm", log=True),
    Measure("method.residual", "Compressed differences: norm not yet sent", "norm", log=True),
    Measure("method.pseudo_gradient_norm", "Change of the weights in a round", "norm", log=True),
    Measure("balance.max_violation", "Busiest expert over the mean, less 1 (worst layer)", "max violation"),
    Measure("balance.load_entropy", "Evenness of the experts' loads (1 = even)", "entropy / ln E"),
    Measure("val_domains.specialisation", "Specialisation of the experts", "I(expert; domain) / H(domain)"),
    Measure("method.slope", "One byte: median size of the slopes", "loss per unit", log=True),
    Measure("method.members", "Machines that took part", "machines"),
    Measure("method.lost", "Machines lost to this one", "machines"),
    Measure("grad_norm", "Norm of the gradient", "norm", log=True),
)
_BESIDES = {"method.members", "method.lost"}  # of interest only where they change


def measures_figure(runs: Sequence[Run]) -> bytes | None:
    """A plot for each measure that a run has, over steps; None if there is none."""
    shown = [measure for measure in MEASURES if any(_is_told(run, measure) for run in runs)]
    if not shown:
        return None
    rows = -(-len(shown) // 2)
    with new_figure(rows, 2, height=0.6 + 2.5 * rows) as (figure, grid):
        places = [axes for row in grid for axes in row]
        for axes, measure in zip(places, shown, strict=False):
            positive = True
            for number, run in enumerate(runs):
                steps, values = run.series(measure.key)
                positive &= all(value > 0 for value in values)
                dots = "o" if 0 < len(values) < 40 else None
                axes.plot(
                    steps, values, style_of(number), marker=dots, markersize=3, color=colour_of(number),
                    linewidth=1.3, label=run.label,
                )  # fmt: skip
            axes.set_title(measure.title, loc="left")
            axes.set_xlim(0, 1.02 * max(run.records[-1]["step"] for run in runs))
            axes.set_ylabel(measure.unit)
            axes.set_xlabel("step")
            whole_steps(axes)
            if measure.log and positive:
                plain_log_axis(axes)
        for axes in places[len(shown) :]:
            axes.set_visible(False)
        legend_below(figure, places[0])
        return to_png(figure)


def _is_told(run: Run, measure: Measure) -> bool:
    _, values = run.series(measure.key)
    return len(values) > 1 and (measure.key not in _BESIDES or len(set(values)) > 1)
