"""What all plots of a report share: colours, axes, and how a figure becomes a PNG."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

# Told apart by people who see few colours, and on paper (Okabe and Ito 2008), yellow left out: it is none on white.
RUN_COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#e69f00",
    "#000000",
    "#7a5195",
    "#8c6d31",
    "#999999",
)
COMPUTE, EXPOSED, WAITING, OUTSIDE = "#6f9ec4", "#e69f00", "#c8443c", "#d0d0d0"
_INK = "#333333"
_WIDTH_INCHES = 10.0


@contextmanager
def new_figure(rows: int = 1, columns: int = 1, *, height: float = 4.2, **options: Any) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes, always as a grid (rows, columns) of them; closed at the end.

    Args:
        height: of all of it, in inches; it is 10 inches wide.
        options: of matplotlib's subplots.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    style: dict[Any, Any] = {
        "font.size": 9.5,
        "axes.titlesize": 10.5,
        "axes.edgecolor": "#999999",
        "axes.labelcolor": _INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "axes.axisbelow": True,
        "text.color": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "legend.frameon": False,
        "text.parse_math": False,  # labels are the names of folders
    }
    with mpl.rc_context(style):
        figure, axes = plt.subplots(
            rows, columns, figsize=(_WIDTH_INCHES, height), dpi=120, layout="constrained", squeeze=False, **options
        )
        try:
            yield figure, axes
        finally:
            plt.close(figure)


def to_png(figure: Any) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def colour_of(number: int) -> str:
    """Of a run by its place; after the last colour they begin again."""
    return RUN_COLOURS[number % len(RUN_COLOURS)]


def style_of(number: int) -> str:
    """The line of a run: dashed once the colours begin again."""
    return ("-", "--", ":")[min(2, number // len(RUN_COLOURS))]


def legend_below(figure: Any, axes: Any) -> None:
    """One legend for the whole figure, under it, in as few rows as its width allows."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        widths = [0.08 * len(label) + 0.6 for label in labels]  # about, in inches
        columns = len(labels) if sum(widths) <= _WIDTH_INCHES else max(1, int(_WIDTH_INCHES / max(widths)))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def plain_log_axis(axes: Any) -> None:
    """Powers on the y axis, with numbers written out; between them too, where there are few."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    wide = high > 100 * low
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
    axes.yaxis.set_minor_formatter(NullFormatter() if wide else StrMethodFormatter("{x:g}"))


def whole_steps(axes: Any) -> None:
    """The x axis counts steps."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))


def byte_unit(largest: float) -> tuple[float, str]:
    """(bytes of the unit, its name) in which numbers up to the largest are short."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if largest >= unit:
            return unit, name
    return 1.0, "bytes"


def bottom_to_top(axes: Any, labels: Sequence[str]) -> None:
    """Horizontal bars, the first at the top, with names that fit beside them."""
    axes.set_yticks(range(len(labels)), [label if len(label) <= 28 else f"{label[:25]}..." for label in labels])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
