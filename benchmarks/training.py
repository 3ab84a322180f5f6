"""Claim: over a slow link, thinwire reaches fp32 DDP's loss many times sooner, and sooner than any peer that runs here.

    python benchmarks/training.py [--rates 10gbit 100mbit 20mbit] [--keep FOLDER] [--json FILE] [--plot FILE]

Trains the 3 M-parameter GPT of configs/demo.yaml (four hosts in the lab, batch 4 x 128 per rank) in each way, and asks
after how many seconds of training, evaluation not counted, it has the validation loss that torch's fp32 DDP has after
all its steps.

What a run learns does not depend on the link, so each way is trained to the end once, at the first rate; at the other
rates its first steps are timed, and their losses must be those of the full run. Only `auto` chooses by the link, and is
trained to the end at every rate. A way whose loss is still too high at its last step has no time to the target.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from runner import Row, arguments, report

from thinwire.comm.units import format_rate, parse_rate
from thinwire.launch.lab import Lab

HERE = Path(__file__).resolve().parent
CONFIG = HERE.parent / "configs" / "demo.yaml"
HOSTS = 4


@dataclass(frozen=True)
class Way:
    """A way to train: thinwire's (settings of `thinwire train`) or a peer's (a name that benchmarks/peers.py knows).

    warm_up_steps: dense or otherwise unlike the others, so not part of the time per step; they are charged separately.
    """

    label: str
    overrides: tuple[str, ...] = ()
    peer: str = ""
    warm_up_steps: int = 1
    period: int = 1  # steps from one synchronisation to the next
    adapts: bool = False  # what it learns depends on the link


def compress(compressor: str) -> tuple[str, ...]:
    """Settings of `method: compress`. The trainer clips the mean, as torch's DDP does, so that sending can overlap."""
    return (f"method={{kind: compress, compressor: {compressor}, clip: after}}",)


SPARSELOCO = (
    "method={kind: local_sgd, every: 10, outer: {kind: sgd, lr: 1.0}, feedback: {kind: ef, decay: 0.95}, "
    "compressor: {kind: topk, k: 64, chunk: 4096, values: 2bit}, collective: contributor_mean}"
)
WAYS = (
    Way("torch DDP fp32", peer="ddp-fp32", warm_up_steps=2),
    Way("torch DDP, bf16 hook", peer="ddp-bf16", warm_up_steps=2),  # gloo has no bf16 reduction
    Way("torch DDP, fp16 hook", peer="ddp-fp16", warm_up_steps=2),
    Way("torch DDP, PowerSGD hook rank 16", peer="powersgd", warm_up_steps=4),
    Way("plain DiLoCo, every 10 steps", peer="diloco", period=10),
    Way("thinwire lowrank 16, ef", compress("{kind: lowrank, rank: 16, dtype: bf16}"), warm_up_steps=2),
    Way("thinwire auto, ef", compress("auto"), warm_up_steps=4, adapts=True),
    Way("thinwire topk 1 %, int8 values, ef", compress("{kind: topk, density: 0.01, values: int8}"), warm_up_steps=2),
    Way("thinwire SparseLoCo, every 10 steps", (SPARSELOCO,), period=10),
)


@dataclass(frozen=True)
class Curve:
    """One run: training seconds after each step, training losses, and (step, validation loss)."""

    step_s: tuple[float, ...]
    losses: tuple[float, ...]
    validation: tuple[tuple[int, float], ...]
    sent_bytes: float


def main() -> None:
    parser = arguments(str(__doc__).splitlines()[0])
    parser.add_argument("--rates", nargs="+", default=["10gbit", "100mbit", "20mbit"], help="link of each host")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--timed", type=int, default=12, help="steps that are timed at the other rates, at least")
    parser.add_argument("--only", nargs="*", help="ways whose label contains one of these, besides fp32 DDP")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep each run's curve there, and use what it has")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves there")
    options = parser.parse_args()
    ways = [w for w in WAYS if w is WAYS[0] or not options.only or any(part in w.label for part in options.only)]
    rates = [parse_rate(rate) for rate in options.rates]
    curves: dict[tuple[str, float], Curve] = {}
    for way in ways:
        for rate_bps in rates:
            whole = way.adapts or rate_bps == rates[0]
            steps = options.steps if whole else max(options.timed, 1 + 2 * way.period)
            curve = kept(options.keep, way, rate_bps, options.steps, steps)
            if curve is None:
                break
            curves[way.label, rate_bps] = curve
            if not whole and curve.losses != curves[way.label, rates[0]].losses[: len(curve.losses)]:
                raise SystemExit(f"{way.label}: the losses at {format_rate(rate_bps)} are not those of the full run")
    ways = [way for way in ways if (way.label, rates[-1]) in curves]
    full = {(w.label, rate): curves[w.label, rate if w.adapts else rates[0]] for w in ways for rate in rates}
    target = full[WAYS[0].label, rates[0]].validation[-1][1]
    rows: list[Row] = []
    for rate_bps in rates:
        baseline_s = seconds_at(options.steps, WAYS[0], curves[WAYS[0].label, rate_bps])
        for way in ways:
            place = way.label, rate_bps
            rows.append(row(way, rate_bps, full[place], curves[place], target, baseline_s))
    report(str(__doc__).splitlines()[0], rows, device=torch.device("cpu"), path=options.json)
    if options.plot:
        draw(ways, rates, full, curves, target, options.plot)


def kept(folder: Path | None, way: Way, rate_bps: float, schedule_steps: int, steps: int) -> Curve | None:
    """The curve of this run, from the folder if it is there, otherwise from training."""
    name = re.sub(r"\W+", "-", f"{way.label} {format_rate(rate_bps)} {steps} of {schedule_steps}") + ".json"
    if folder is not None and (folder / name).exists():
        content = json.loads((folder / name).read_text())
        return Curve(
            step_s=tuple(content["step_s"]),
            losses=tuple(content["losses"]),
            validation=tuple((step, loss) for step, loss in content["validation"]),
            sent_bytes=content["sent_bytes"],
        )
    curve = train(way, rate_bps, schedule_steps, steps)
    if folder is not None and curve is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(vars(curve)))
    return curve


def train(way: Way, rate_bps: float, schedule_steps: int, steps: int) -> Curve | None:
    """Run it in the lab and read what rank 0 wrote; None if a peer cannot run here, and has said why."""
    folder = Path(tempfile.mkdtemp())
    settings = [
        f"train.steps={schedule_steps}",
        "train.eval_every=5",
        "world.threads=1",
        f"output.folder={folder}",
        "name=run",
        *way.overrides,
    ]
    if steps < schedule_steps:
        settings += [f"train.steps={steps}", f"schedule.decay_steps={schedule_steps}", "train.eval_windows=0"]
    if way.peer:
        run_folder = folder
        command = [sys.executable, str(HERE / "peers.py"), way.peer, str(folder), str(CONFIG), *settings]
    else:
        run_folder = folder / "run"
        command = [sys.executable, "-m", "thinwire", "train", str(CONFIG), *settings]
    print(f"\n--- {way.label}, {format_rate(rate_bps)}, {steps} steps", flush=True)
    with Lab(hosts=HOSTS, rate_bps=rate_bps) as lab:
        code = lab.start(command, output="rank0").wait()
    if code and way.peer:
        print(f"{way.label} does not run here", flush=True)
        return None
    if code:
        raise SystemExit(f"{way.label} failed with exit code {code}")
    records = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(folder)
    return Curve(
        step_s=tuple(r["step_s"] for r in records),
        losses=tuple(r["loss"] for r in records),
        validation=tuple((r["step"], r["val_loss"]) for r in records if "val_loss" in r),
        sent_bytes=statistics.mean(r["interface_sent_bytes"] for r in records),
    )


def way_steps(curve: Curve, target: float) -> float:
    """Steps until the validation loss reaches the target, between two evaluations on the line that joins them."""
    previous = (0, math.inf)
    for step, loss in curve.validation:
        if loss <= target:
            if math.isinf(previous[1]):
                return step
            return previous[0] + (step - previous[0]) * (previous[1] - target) / (previous[1] - loss)
        previous = (step, loss)
    return math.inf


def seconds_at(steps: float, way: Way, timed: Curve) -> float:
    """Training seconds of so many steps: the warm-up as it was, then the mean of whole periods."""
    warm_up_s = sum(timed.step_s[: way.warm_up_steps])
    return warm_up_s + (steps - way.warm_up_steps) * steady_step_s(way, timed)


def steady_step_s(way: Way, timed: Curve) -> float:
    """Seconds per step after the warm-up: the median of the means of whole periods."""
    rest = timed.step_s[way.warm_up_steps :]
    first = -way.warm_up_steps % way.period  # so that each slice holds one synchronisation
    periods = [rest[i : i + way.period] for i in range(first, len(rest) - way.period + 1, way.period)]
    return statistics.median(statistics.mean(period) for period in periods)


def row(way: Way, rate_bps: float, full: Curve, timed: Curve, target: float, baseline_s: float) -> Row:
    steps = way_steps(full, target)
    seconds = seconds_at(steps, way, timed) if math.isfinite(steps) else math.inf
    reached = math.isfinite(seconds)
    return {
        "link": format_rate(rate_bps),
        "way": way.label,
        "final loss": full.validation[-1][1],
        "against fp32": full.validation[-1][1] / target,
        "s per step": steady_step_s(way, timed),
        "sent MB per step": full.sent_bytes / 1e6,
        "s for all steps": f"{seconds_at(full.validation[-1][0], way, timed):.0f}",
        "steps to target": f"{steps:.0f}" if reached else "-",
        "s to target": f"{seconds:.0f}" if reached else "-",
        "times sooner": f"{baseline_s / seconds:.1f}" if reached else "-",
    }


def draw(
    ways: Sequence[Way],
    rates: Sequence[float],
    full: dict[tuple[str, float], Curve],
    timed: dict[tuple[str, float], Curve],
    target: float,
    path: Path,
) -> None:
    """Validation loss against training seconds, one panel for each rate."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1, len(rates), figsize=(6.5 * len(rates), 5), dpi=120, layout="constrained", sharey=True
    )
    for axes, rate_bps in zip([panels] if len(rates) == 1 else panels, rates, strict=True):
        for way in ways:
            points: list[tuple[float, Any]] = [
                (seconds_at(step, way, timed[way.label, rate_bps]), loss)
                for step, loss in full[way.label, rate_bps].validation
            ]
            style = "--" if way.peer else "-"
            axes.plot(*zip(*points, strict=True), style, linewidth=1.5 if way.peer else 2.2, label=way.label)
        axes.axhline(target, color="grey", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_xlabel("seconds of training")
        axes.set_title(f"four hosts at {format_rate(rate_bps)}")
        axes.grid(alpha=0.3, which="both")
    figure.axes[0].set_ylabel("validation loss, nats per byte")
    figure.axes[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    main()
