"""Claim: with one host ten times slower than the rest, gossip reaches DDP's loss at least 3 times sooner than DDP.

    python benchmarks/gossip_straggler.py [--hosts 4 8] [--rate 100mbit] [--delay 20ms] [--json FILE] [--plot FILE]

Trains the 0.8 M GPT on hosts in the lab, by torch's DDP in fp32; by synchronous neighbour averaging on the static
exponential graph, combine then adapt, as BlueFog does it by default; and by asynchronous gossip. A step of a host takes
--step seconds (the slow one's ten times as many): what its computing leaves of them is slept after the backward pass,
so that many hosts fit on one machine, and DDP's exchange is hidden by the sleep as far as it can be.

What is scored is the average of all hosts' weights at a moment, as a merge then would give it (for DDP, its weights),
from what the hosts have written to disk; nobody waits for that. The target is DDP's loss after its last step. The first
two ways learn by steps, not by seconds: all their steps are taken without a slow host and link, some are timed with
them, and their seconds are steps times the median step. Asynchronous gossip runs as it is, against the clock; its fast
hosts take more steps than DDP, in far less time, and its learning rate falls over as many.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from gossip_straggler_host import build
from runner import Row, arguments, report

from thinwire.comm.units import parse_delay, parse_rate
from thinwire.launch.lab import Lab

HOST = Path(__file__).resolve().parent / "gossip_straggler_host.py"
SLOW_FACTOR = 10.0
KEEP_EVERY = 10
WINDOWS = 48
NEIGHBOURS = {"graph": "exponential", "algorithm": {"kind": "dpsgd", "overlap": True}}
ASYNCHRONOUS = {
    "AD-PSGD": {"graph": "complete", "algorithm": "ad_psgd"},
    "A2CiD2": {"graph": "ring", "algorithm": "acid"},
}


def main() -> None:
    parser = arguments(str(__doc__).splitlines()[0])
    parser.add_argument("--hosts", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--rate", default="100mbit")
    parser.add_argument("--delay", default="20ms", help="of each link, one way: a path has that too")
    parser.add_argument("--steps", type=int, default=100, help="of DDP and of neighbour averaging")
    parser.add_argument("--gossip-steps", type=int, default=250, help="of the fast hosts in asynchronous gossip")
    parser.add_argument("--timed", type=int, default=6, help="steps that are timed with the slow host, beyond a first")
    parser.add_argument("--step", type=float, default=0.5, help="seconds that a step of a fast host takes")
    parser.add_argument("--batch", type=int, default=4, help="sequences of 128 bytes per host and step")
    parser.add_argument("--only", nargs="*", default=list(ASYNCHRONOUS), help="asynchronous algorithms")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw loss against seconds there")
    options = parser.parse_args()
    if options.steps < KEEP_EVERY:
        parser.error(f"--steps: {options.steps}; at least {KEEP_EVERY}, since each {KEEP_EVERY} steps have a loss")
    if unknown := set(options.only) - set(ASYNCHRONOUS):
        parser.error(f"--only: {min(unknown)!r} is none of {', '.join(ASYNCHRONOUS)}")
    rows: list[Row] = []
    curves: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for hosts in options.hosts:
        found = compare(hosts, options, curves)
        rows.extend(found)
        report(str(__doc__).splitlines()[0], rows, device=torch.device("cpu"), path=options.json)
    if options.plot:
        draw(curves, options)


def compare(hosts: int, options: Any, curves: dict[tuple[int, str], list[tuple[float, float]]]) -> list[Row]:
    by_steps = {}
    for label, way in (("DDP fp32", {"way": "ddp"}), ("neighbour averaging", {"way": "gossip", "gossip": NEIGHBOURS})):
        alone = run(hosts, way, options, steps=options.steps, slow=-1, lab={"rate_bps": 10e9}, step_s=0.0)
        timed = run(hosts, way, options, steps=options.steps, stop_after=options.timed + 1)
        by_steps[label] = [(step, loss) for step, _, loss in alone["scores"]], timed["step_s"]
    target = by_steps["DDP fp32"][0][-1][1]
    rows = []
    for label, (scores, step_s) in by_steps.items():
        curves[hosts, label] = [(step * step_s, loss) for step, loss in scores]
    for label in options.only:
        way = {"way": "gossip", "gossip": ASYNCHRONOUS[label]}
        free = run(hosts, way, options, steps=options.gossip_steps)
        curves[hosts, label] = [(seconds, loss) for _, seconds, loss in free["scores"]]
        by_steps[label] = [], free["step_s"]
    ddp_s = seconds_to(curves[hosts, "DDP fp32"], target)
    for label, (_, step_s) in by_steps.items():
        curve = curves[hosts, label]
        seconds = seconds_to(curve, target)
        reached = math.isfinite(seconds)
        rows.append(
            {
                "hosts": hosts,
                "way": label,
                "s per step": step_s,
                "final loss": curve[-1][1],
                "against DDP": curve[-1][1] / target,
                "s to DDP's loss": f"{seconds:.0f}" if reached else "-",
                "times sooner": f"{ddp_s / seconds:.1f}" if reached else "-",
            }
        )
    return rows


def run(
    hosts: int,
    way: dict[str, Any],
    options: Any,
    *,
    steps: int,
    slow: int | None = None,
    stop_after: int | None = None,
    lab: dict[str, Any] | None = None,
    step_s: float | None = None,
) -> dict[str, Any]:
    """Train in the lab: (steps of host 0, seconds, loss of the average) as they went, and host 0's seconds per step."""
    folder = Path(tempfile.mkdtemp())
    settings = {
        **way,
        "hosts": hosts,
        "steps": steps,
        "stop_after": stop_after or steps,
        "batch": options.batch,
        "slow": hosts - 1 if slow is None else slow,
        "slow_factor": SLOW_FACTOR,
        "step_s": options.step if step_s is None else step_s,
        "keep_every": KEEP_EVERY,
    }
    links = lab or {"rate_bps": parse_rate(options.rate), "delay_s": parse_delay(options.delay)}
    print(f"\n--- {hosts} hosts, {way}, {settings['stop_after']} steps", flush=True)
    with Lab(hosts=hosts, **links) as cluster:
        code = cluster.start([sys.executable, str(HOST), str(folder), json.dumps(settings)], output="all").wait()
    if code:
        raise SystemExit(f"{way} on {hosts} hosts failed with exit code {code}")
    ended = json.loads((folder / "end-0.json").read_text())
    outcome = {"scores": score(folder, steps, options.batch * hosts), "step_s": statistics.median(ended["step_s"][1:])}
    shutil.rmtree(folder)
    return outcome


@torch.no_grad()
def score(folder: Path, steps: int, batch: int) -> list[tuple[int, float, float]]:
    """At every moment when host 0 wrote its weights: its steps, the seconds, the loss of the newest of all hosts'."""
    kept: dict[int, list[tuple[float, int, Path]]] = defaultdict(list)
    for path in folder.glob("*-*.npy"):
        rank, step, seconds = path.stem.split("-")
        kept[int(rank)].append((float(seconds), int(step), path))
    _, data, model = build(steps, batch)
    numbers = [round(i * data.validation.count / WINDOWS) for i in range(WINDOWS)]
    windows = data.validation.batch(numbers, torch.device("cpu"))
    scores = []
    for seconds, step, _ in sorted(kept[0]):
        newest = [max((item for item in of_host if item[0] <= seconds), default=None) for of_host in kept.values()]
        vectors = [np.load(item[2]).astype(np.float64) for item in newest if item is not None]
        torch.nn.utils.vector_to_parameters(torch.from_numpy(np.mean(vectors, axis=0)).float(), model.parameters())
        loss = F.cross_entropy(model(windows.inputs).flatten(0, 1), windows.targets.flatten())
        scores.append((step, seconds, float(loss)))
    return scores


def seconds_to(curve: list[tuple[float, float]], target: float) -> float:
    """Seconds until the loss reaches the target, on the line between two moments."""
    before = (0.0, math.inf)
    for seconds, loss in curve:
        if loss <= target:
            if math.isinf(before[1]):
                return seconds
            return before[0] + (seconds - before[0]) * (before[1] - target) / (before[1] - loss)
        before = (seconds, loss)
    return math.inf


def draw(curves: dict[tuple[int, str], list[tuple[float, float]]], options: Any) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1, len(options.hosts), figsize=(6.5 * len(options.hosts), 4.5), dpi=120, layout="constrained", squeeze=False
    )
    for axes, hosts in zip(panels[0], options.hosts, strict=True):
        for (of, label), curve in curves.items():
            if of == hosts:
                axes.plot(*zip(*curve, strict=True), "o-", markersize=3, label=label)  # a short run has one point
        axes.set_xscale("log")
        axes.set_xlabel("seconds of training")
        axes.set_ylabel("validation loss of the average, nats per byte")
        axes.set_title(f"{hosts} hosts, one ten times slower; {options.rate}, {options.delay}")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    options.plot.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.plot)


if __name__ == "__main__":
    main()
