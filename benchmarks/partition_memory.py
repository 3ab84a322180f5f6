"""Claim: what a rank keeps for parameters, gradients and optimizer state is within 3 % of its triple's formula.

    python benchmarks/partition_memory.py [--triples A,B,C ...] [--json FILE] [--plot FILE]

Trains a GPT on eight ranks, levels pair 2, node 4, world 8, with AdamW and 16-bit computing on fp32 weights, in every
legal triple and some secondary copies, and counts the storages of all tensors that stay between steps. `formula`: 4
bytes per parameter / s_p for weights, 4 / s_g for gradients, 8 / s_o for two moments (the fp32 weights that a rank owns
are its masters too), and, for a copy of the gathered weights, 2 / s_2. `off` is the largest share by which a state of
any rank differs from it. `grown` is how far the resident memory of the process rose above what it was with the whole
model just built: its weights are then let go, and torch, libraries and activations are included.
"""

from __future__ import annotations

from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import torch
from partition_bytes import numel
from partition_lab import Machine, run
from runner import Row, arguments, report

SIZES = {"rank": 1, "pair": 2, "node": 4, "world": 8}
LEVELS = tuple((name, size) for name, size in SIZES.items() if size > 1)
SECONDARY = (
    ("world", "world", "world", "node"),
    ("world", "world", "world", "pair"),
    ("node", "node", "world", "pair"),
)


def main() -> None:
    parser = arguments(str(__doc__).splitlines()[0])
    parser.add_argument("--triples", nargs="*", help="only these: levels of params, grads, optim, and maybe secondary")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw bytes by state there")
    options = parser.parse_args()
    legal = [(*triple, "") for triple in combinations_with_replacement(SIZES, 3)] + list(SECONDARY)
    chosen = [tuple((triple + ",").split(",")[:4]) for triple in options.triples or ()] or legal
    shape = {"layers": options.layers, "heads": 4, "width": options.width, "context": 32}
    rows: list[Row] = []
    for params, grads, optim, secondary in chosen:
        states = {"params": params, "grads": grads, "optim": optim, "secondary": secondary or None}
        rows.append(measure(states, shape))
        report(str(__doc__).splitlines()[0], rows, device=torch.device("cpu"), path=options.json)
    if options.plot:
        draw(rows, options.plot)


def measure(states: dict[str, Any], shape: dict[str, Any]) -> Row:
    """Of the rank that keeps most. Raises SystemExit where a rank keeps other bytes than it predicted."""
    machine = Machine(hosts=2, ranks_per_host=4, rate_bps=None, levels=LEVELS)
    way = {"way": "partition", "partition": states, "bf16": True}
    ranks = run(machine, {"model": shape, "batch": 1, "micro_batches": 1, "steps": 2, **way})
    count = numel(shape)
    expected = {
        "params": 4 * count / SIZES[states["params"]],
        "grads": 4 * count / SIZES[states["grads"]],
        "optim": 8 * count / SIZES[states["optim"]],
        "secondary": 2 * count / SIZES[states["secondary"]] if states["secondary"] else 0.0,
    }
    off = 0.0
    for rank in ranks:
        found = rank["memory"]["measured"]
        # The copy is let go by the step.
        if any(found[state] != rank["memory"]["predicted"][state] for state in ("params", "grads", "optim")):
            raise SystemExit(f"{states}: {rank['memory']}")
        off = max(off, *(abs(found[state] / expected[state] - 1) for state in ("params", "grads", "optim")))
    most = max(ranks, key=lambda rank: sum(rank["memory"]["measured"].values()))["memory"]["predicted"]
    return {
        "triple": ", ".join(str(states[state]) for state in ("params", "grads", "optim")),
        "copy": states["secondary"] or "-",
        **{f"{state} MB": most[state] / 1e6 for state in expected},
        "all MB": sum(most.values()) / 1e6,
        "formula MB": sum(expected.values()) / 1e6,
        "off": f"{off:.2%}",
        "grown MB": max(rank["rss_growth_bytes"] for rank in ranks) / 1e6,
    }


def draw(rows: list[Row], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.3 * len(rows) + 1.5), dpi=120, layout="constrained")
    labels = [f"{row['triple']}" + ("" if row["copy"] == "-" else f"; copy: {row['copy']}") for row in rows]
    left = [0.0] * len(rows)
    for state in ("params", "grads", "optim", "secondary"):
        widths = [float(row[f"{state} MB"]) for row in rows]
        axes.barh(labels, widths, left=left, label=state)
        left = [before + width for before, width in zip(left, widths, strict=True)]
    axes.plot([float(row["formula MB"]) for row in rows], labels, "k|", markersize=12, label="formula")
    axes.invert_yaxis()
    axes.set_xlabel("MB that the fullest of eight ranks keeps between steps")
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    main()
