"""Claim: where dense traffic takes 10 times the computing, partition trains 2.5 times as fast as the best of its peers.

    python benchmarks/partition_throughput.py [--rates 10gbit ... 10mbit] [--json FILE] [--plot FILE]

Times steps of the 3 M-parameter GPT of configs/demo.yaml on two hosts of two ranks in the lab, sharded by thinwire,
parameters and gradients over the host and the optimizer over the world, with 4-bit and with fp32 wires between hosts;
by torch's FSDP2 over all ranks and over the host (HSDP); and by DeepSpeed's ZeRO-3, all of them in fp32 with the same
losses. `computing` is a step of ranks that send nothing; `dense`, how many times that HSDP's traffic takes there:
its step without computing. A step's seconds are those of the slowest rank, the median of several.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from partition_lab import Machine, run
from runner import Row, arguments, report

from thinwire.comm.units import format_rate, parse_rate

HOSTS, RANKS_PER_HOST = 2, 2
TRIPLE = {"params": "node", "grads": "node", "optim": "world"}
WAYS: Mapping[str, dict[str, Any]] = {
    "thinwire, 4 bits": {
        "way": "partition",
        "partition": {**TRIPLE, "update": "difference", "gradients": {"world": "int4"}},
    },
    "thinwire, fp32": {"way": "partition", "partition": TRIPLE},
    "HSDP": {"way": "hsdp"},
    "FSDP2": {"way": "fsdp2"},
    "DeepSpeed ZeRO-3": {"way": "deepspeed"},
}
PEERS = ("HSDP", "FSDP2", "DeepSpeed ZeRO-3")
SAME_LOSS = 1e-5  # relative, of the first two steps: the second shows that the first update was the same
LIGHT_STEPS_S = 1.0  # of steps shorter than this, four times as many are timed


def main() -> None:
    parser = arguments(str(__doc__).splitlines()[0])
    parser.add_argument("--rates", nargs="+", default=["10gbit", "1gbit", "100mbit", "30mbit", "10mbit"])
    parser.add_argument("--timed", type=int, default=3, help="steps that are timed, beyond two")
    parser.add_argument("--batch", type=int, default=2, help="sequences of a rank in a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--only", nargs="*", help="ways whose label contains one of these, besides HSDP")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw seconds per step against the rate there")
    options = parser.parse_args()
    rates = [parse_rate(rate) for rate in options.rates]
    ways = [w for w in WAYS if w == "HSDP" or not options.only or any(part in w for part in options.only)]
    computing_s = measure({"way": "alone"}, rates[0], options)[0]
    rows: list[Row] = []
    for rate_bps in rates:
        found = {label: measure(WAYS[label], rate_bps, options) for label in ways}
        check_losses({label: losses for label, (_, losses) in found.items()})
        rows += compare(rate_bps, computing_s, {label: seconds for label, (seconds, _) in found.items()}, options)
        report(str(__doc__).splitlines()[0], rows, device=torch.device("cpu"), path=options.json)
    if options.plot:
        draw(rows, rates, computing_s, options.plot)


def measure(way: Mapping[str, Any], rate_bps: float, options: Any) -> tuple[float, list[float]]:
    """Seconds per step, and the losses of rank 0."""
    size = HOSTS * RANKS_PER_HOST
    machine = Machine(HOSTS, RANKS_PER_HOST, rate_bps, (("node", RANKS_PER_HOST), ("world", size)))
    shape = {"layers": options.layers, "heads": 8, "width": options.width, "context": options.context}
    settings = {"model": shape, "batch": options.batch, "micro_batches": options.micro_batches, **way}
    for steps in (2 + options.timed, 2 + 4 * options.timed):
        ranks = run(machine, {**settings, "steps": steps}, timeout_s=1800.0)
        each_s = [max(at) for at in zip(*(rank["step_s"] for rank in ranks), strict=True)]
        step_s = statistics.median(each_s[2:])
        if step_s > LIGHT_STEPS_S:
            break
    return step_s, ranks[0]["losses"]


def check_losses(losses: Mapping[str, list[float]]) -> None:
    """Raises SystemExit where a way in fp32 trains another model than HSDP does."""
    for label, of_way in losses.items():
        if "4 bits" not in label:
            for mine, theirs in zip(of_way[:2], losses["HSDP"][:2], strict=True):
                if not math.isclose(mine, theirs, rel_tol=SAME_LOSS):
                    raise SystemExit(f"the losses of {label} are {of_way[:2]}, those of HSDP {losses['HSDP'][:2]}")


def compare(rate_bps: float, computing_s: float, seconds: Mapping[str, float], options: Any) -> list[Row]:
    best_s = min(seconds[peer] for peer in PEERS if peer in seconds)
    sequences = HOSTS * RANKS_PER_HOST * options.batch * options.micro_batches
    return [
        {
            "link": format_rate(rate_bps),
            "way": label,
            "computing": computing_s,
            "dense": (seconds["HSDP"] - computing_s) / computing_s,
            "s per step": step_s,
            "sequences/s": sequences / step_s,
            "against HSDP": seconds["HSDP"] / step_s,
            "against best peer": best_s / step_s,
        }
        for label, step_s in seconds.items()
    ]


def draw(rows: list[Row], rates: list[float], computing_s: float, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 5), dpi=120, layout="constrained")
    for label in dict.fromkeys(str(row["way"]) for row in rows):
        steps = [row["s per step"] for row in rows if row["way"] == label]
        axes.plot([rate / 1e6 for rate in rates], steps, "--" if label in PEERS else "-", marker="o", label=label)
    axes.axhline(computing_s, color="grey", linewidth=0.8, label="computing alone")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("link of each host, Mbit/s")
    axes.set_ylabel("seconds per step")
    axes.set_title("two hosts x 2 ranks")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    main()
