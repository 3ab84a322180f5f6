"""A probe as a picture: who sends how fast to whom, how long a message takes, and how collectives use the links."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thinwire.dist.plan.cluster import Cluster

_WRITTEN = 12  # ranks up to which each field of a heat map has its number


def draw(cluster: Cluster, path: Path) -> None:
    """Save heat maps of bandwidth and latency, and the sweep of collectives, as PNG (or what the suffix says)."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    measured = cluster.measured
    assert measured is not None
    assert measured.pairs is not None
    figure, (rates, delays, sweep) = plt.subplots(1, 3, figsize=(16, 4.8), dpi=120, layout="constrained")
    _heat_map(
        rates, [[_times(v, 1e-6) for v in row] for row in measured.pairs.bps], "bandwidth, Mbit/s", "to rank", "viridis"
    )
    _heat_map(
        delays,
        [[_times(v, 1e3) for v in row] for row in measured.pairs.latency_s],
        "latency one way, ms",
        "and rank",
        "viridis_r",
    )
    for level in cluster.levels:
        for operation in dict.fromkeys(time.operation for time in measured.collectives):
            times = [t for t in measured.collectives if (t.operation, t.level) == (operation, level.name)]
            if times:
                sizes, speeds = [t.size_bytes for t in times], [t.bus_bps / 1e6 for t in times]
                label = operation if len(cluster.levels) == 1 else f"{operation}, {level.name}"
                sweep.plot(sizes, speeds, "o-", markersize=4, label=label)
    sweep.set_xscale("log")
    sweep.set_yscale("log")
    sweep.set_xlabel("bytes")
    sweep.set_title("bus bandwidth of collectives, Mbit/s a rank")
    sweep.grid(alpha=0.3, which="both")
    sweep.legend(fontsize=8)
    figure.suptitle(f"{cluster.name}: {cluster.size} ranks")
    figure.savefig(path)
    plt.close(figure)


def _heat_map(axes: Any, matrix: Sequence[Sequence[float]], title: str, across: str, colours: str) -> None:
    """One field for each pair of ranks; a rank with itself stays white."""
    image = axes.imshow(matrix, cmap=colours)
    axes.figure.colorbar(image, ax=axes, shrink=0.8)
    axes.set_title(title)
    axes.set_xlabel(across)
    axes.set_ylabel("from rank" if across == "to rank" else "between rank")
    ticks = range(0, len(matrix), max(1, len(matrix) // _WRITTEN))
    axes.set_xticks(ticks)
    axes.set_yticks(ticks)
    if len(matrix) > _WRITTEN:
        return
    known = [value for row in matrix for value in row if not math.isnan(value)]
    middle = (min(known) + max(known)) / 2
    dark_is_low = colours == "viridis"
    for a, row in enumerate(matrix):
        for b, value in enumerate(row):
            if not math.isnan(value):
                colour = "white" if (value <= middle) == dark_is_low else "black"
                text = f"{value:.0f}" if value >= 100 else f"{value:.3g}"
                axes.text(b, a, text, ha="center", va="center", fontsize=8, color=colour)


def _times(value: float | None, factor: float) -> float:
    return math.nan if value is None else value * factor
