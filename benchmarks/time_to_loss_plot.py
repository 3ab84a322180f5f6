"""The plot of time_to_loss.py: seconds to the target against link speed, thinwire's methods and the peers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runner import Row
from time_to_loss_ways import DDP

from thinwire.comm.units import parse_rate

NAMES = {"thinwire": "thinwire's methods", "peers": "other systems"}


def draw(rows: Sequence[Row], failed: Mapping[str, str], target: float, path: Path) -> None:
    """Two panels with one scale; in each, the best of the other side as a grey line."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    lines: dict[str, dict[float, float]] = {}
    for row in rows:
        if not isinstance(row["s to target"], str):
            rate_mbit = parse_rate(str(row["link"])) / 1e6
            lines.setdefault(str(row["way"]), {})[rate_mbit] = float(row["s to target"])
    sides = {
        "thinwire": {label: line for label, line in lines.items() if label.startswith("thinwire")},
        "peers": {label: line for label, line in lines.items() if not label.startswith("thinwire")},
    }
    figure, panels = plt.subplots(1, 2, figsize=(15, 5.6), dpi=120, layout="constrained", sharey=True, sharex=True)
    colors = mpl.colormaps["tab20"].colors
    for axes, (side, own), other in zip(panels, sides.items(), ("peers", "thinwire"), strict=True):
        best = best_of(sides[other])
        if best:  # with a mark, since one rate alone makes no line
            band = {"color": "0.75", "linewidth": 7, "marker": "o", "markersize": 11, "zorder": 0}
            axes.plot(*zip(*best, strict=True), label=f"best of {NAMES[other]}", **band)
        if side == "thinwire" and DDP in lines:
            axes.plot(*zip(*sorted(lines[DDP].items()), strict=True), "--_", color="0.3", markersize=9, label=DDP)
        slowest_mbit = min((min(line) for line in own.values()), default=0.0)
        order = sorted(own, key=lambda label: -own[label].get(slowest_mbit, 0.0))
        for number, label in enumerate(order):
            points: list[tuple[float, Any]] = sorted(own[label].items())
            marker = "osv^D*XP"[number % 8]
            axes.plot(
                *zip(*points, strict=True),
                marker=marker,
                markersize=5,
                linewidth=1.8,
                color=colors[(2 * number) % 20 + (number >= 10)],
                label=label.removeprefix("thinwire "),
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("link of each host, Mbit/s")
        axes.set_title(NAMES[side])
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
        rates = sorted({rate for line in lines.values() for rate in line})
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    never = sorted({str(row["way"]) for row in rows} - set(lines))
    panels[0].set_ylabel("seconds until the loss is reached")
    notes = [f"validation loss {target:.3f}, four hosts"]
    if never:
        notes.append(f"never there: {', '.join(never)}")
    if failed:
        notes.append(f"without a result here: {', '.join(failed)}")
    figure.supxlabel("; ".join(notes), fontsize=8, color="0.3")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def best_of(lines: Mapping[str, Mapping[float, float]]) -> list[tuple[float, float]]:
    """The least seconds of any line at each rate."""
    rates = sorted({rate for line in lines.values() for rate in line})
    return [(rate, min(line[rate] for line in lines.values() if rate in line)) for rate in rates]
