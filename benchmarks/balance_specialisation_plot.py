"""The plots of balance_specialisation.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib as mpl
import torch

from thinwire.comm.balance.specialisation import frequencies

mpl.use("Agg")
import matplotlib.pyplot as plt

COLORS = {
    "micro": "tab:red",
    "node": "tab:orange",
    "global": "tab:blue",
    "stale": "tab:green",
    "ema": "tab:olive",
    "shuffle": "tab:purple",
    "bias": "tab:gray",
}
SHOWN = ("micro", "node", "global", "stale", "bias")
Runs = Sequence[Mapping[str, Any]]


def draw_scores(runs: Runs, path: Path) -> None:
    """Specialisation of the last block, as it came about and at the end; loss; and the loads' unevenness."""
    ways = [way for way in COLORS if any(made["way"] == way for made in runs)]
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    trace, *others = axes.flat
    for way in ways:
        curves = [made["trace"] for made in runs if made["way"] == way]
        steps = [point[0] for point in curves[0]]
        for curve in curves:
            trace.plot(steps, [point[-1] for point in curve], color=COLORS[way], linewidth=0.6, alpha=0.5)
        average = [mean(curve[i][-1] for curve in curves) for i in range(len(steps))]
        trace.plot(steps, average, color=COLORS[way], linewidth=2, label=way)
    trace.set(xlabel="step", ylabel="I(expert; domain) / H(domain)", title="Block 2, each seed and the mean")
    trace.set_ylim(0, 1.3 * trace.get_ylim()[1])
    trace.legend(title="f counted over", fontsize="small", ncols=4, loc="upper center")
    panels = (
        (lambda made: made["by_layer"]["specialisation"][-1], "I(expert; domain) / H(domain)", "Block 2, at the end"),
        (lambda made: made["val_loss"], "nats per byte", "Held-out loss"),
        (lambda made: made["unit_max_violation"], "MaxVio", "Unevenness of experts within a micro-batch"),
    )
    for axis, (value, label, title) in zip(others, panels, strict=True):
        for place, way in enumerate(ways):
            values = [value(made) for made in runs if made["way"] == way]
            axis.scatter([place] * len(values), values, color=COLORS[way], s=25, zorder=3)
            axis.hlines(mean(values), place - 0.3, place + 0.3, color=COLORS[way])
        axis.set_xticks(range(len(ways)), ways)
        axis.set(ylabel=label, title=title)
        axis.grid(axis="y", alpha=0.3)
    for axis in (others[0], others[2]):
        axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_use(runs: Runs, path: Path, seed: int | None = None) -> None:
    """Of each domain's selections the share of each expert, by way and block.

    Args:
        seed: of the runs that are drawn; default: the first.
    """
    seed = min(made["seed"] for made in runs) if seed is None else seed
    chosen = {made["way"]: made for made in runs if made["seed"] == seed and made["way"] in SHOWN}
    ways = [way for way in SHOWN if way in chosen]
    layers = len(chosen[ways[0]]["counts"])
    figure, axes = plt.subplots(
        layers, len(ways), figsize=(3.1 * len(ways), 2.3 * layers), squeeze=False, layout="constrained"
    )
    for column, way in enumerate(ways):
        shares = frequencies(torch.tensor(chosen[way]["counts"]))
        names = list(chosen[way]["perplexity"])
        for layer in range(layers):
            axis = axes[layer, column]
            share = shares[layer][:, by_domain(shares[layer])]
            image = axis.imshow(share, aspect="auto", cmap="viridis", vmin=0, vmax=0.4)
            axis.set_yticks(range(len(names)), names if column == 0 else [""] * len(names))
            axis.set_xticks([])
            value = chosen[way]["by_layer"]["specialisation"][layer]
            axis.set_title(f"{way}, block {layer + 1}: MI/H {value:.2f}", fontsize="small")
    figure.supxlabel("experts, by the domain that selects them most")
    figure.colorbar(image, ax=axes, label="share of the domain's selections", shrink=0.8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def by_domain(shares: torch.Tensor) -> list[int]:
    """The experts, ordered by the domain in which each is selected most, and there by how much."""
    return sorted(range(shares.shape[1]), key=lambda e: (int(shares[:, e].argmax()), -float(shares[:, e].max())))
