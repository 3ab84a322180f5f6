"""Claim: `thinwire plan` foretells the seconds of a step within 15 %, from a probe of each link, for every method.

    python benchmarks/plan_accuracy.py [--rates 10mbit 100mbit 1gbit] [--ranks-per-host 1 2] [--only PART ...]

Four emulated hosts. For each link `thinwire probe` measures, of the demo's model: links, compressors, computing. From
that and each method's settings comes the foretold step; the measured one is the median of the steady steps of a run in
the lab, on the same machine, each rank with processors of its own. The ratio is foretold / measured.

This machine's speed changes by a fifth within minutes. So every four methods are run between two probes, and the
foretold step is the mean of what these two foretell; how far they differ is told beside it. A probe or a run that is
there is not made again: both belong to the same minutes.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lab_machine import Machine
from lab_runs import CONFIGS, LabRuns, Timing, Way
from runner import Row, arguments, report
from time_to_loss import STEPS
from time_to_loss_ways import DDP, OURS, Contender

from thinwire.comm.units import format_rate, parse_rate
from thinwire.dist.config import load_config
from thinwire.dist.plan.cluster import Cluster, load_cluster
from thinwire.dist.plan.prediction import predict

HOSTS = 4
WITHIN = 0.15
BETWEEN_PROBES = 4  # ways
WAYS = (
    Contender("thinwire all-reduce, fp32", trains_as=DDP),
    *OURS,
    Contender("thinwire one byte", config="demo_onebyte.yaml"),
)
OF_TWO_LEVELS = tuple(
    Contender(
        f"thinwire all-reduce, {dtype} between nodes",
        (f"method={{kind: allreduce, dtype: {dtype}, exact_within: node}}",),
    )
    for dtype in ("fp32", "bf16")
)
"""Ways that are others only where hosts have several ranks."""
RESULTS = Path(__file__).resolve().parent / "results"
PROBES = RESULTS / "probes"
KEPT = RESULTS / "plan_runs.json"
"""Runs of the same hours as the probes: a machine's speed changes from day to day, and with it what is foretold."""


@dataclass(frozen=True)
class Foretold:
    """Of a step: its seconds, and its computing, as a plan foretells them."""

    step_s: float
    compute_s: float


def main() -> None:
    parser = arguments(str(__doc__).splitlines()[0])
    parser.set_defaults(device="cpu")
    parser.add_argument("--rates", nargs="+", default=["10mbit", "100mbit", "1gbit"], help="link of each host")
    parser.add_argument("--ranks-per-host", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--only", nargs="*", help="methods whose label contains one of these")
    parser.add_argument("--keep", type=Path, metavar="FILE", default=KEPT, help="file of the runs that are there")
    parser.add_argument("--probes", type=Path, metavar="FOLDER", default=PROBES, help="where the probes are")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw foretold against measured there")
    options = parser.parse_args()
    rates = [parse_rate(rate) for rate in options.rates]
    runs = LabRuns(options.keep)
    rows: list[Row] = []
    for ranks_per_host in options.ranks_per_host:
        machine = Machine(HOSTS, ranks_per_host)
        ways = (*WAYS, *(OF_TWO_LEVELS if ranks_per_host > 1 else ()))
        for number, first in enumerate(range(0, len(ways), BETWEEN_PROBES)):
            together = ways[first : first + BETWEEN_PROBES]
            wanted = [way for way in together if not options.only or any(part in way.label for part in options.only)]
            if not wanted:
                continue
            before = {rate: probed(options.probes, machine, rate, number) for rate in rates}
            timings = [run(way, machine, rates, runs) for way in wanted]
            after = {rate: probed(options.probes, machine, rate, number + 1) for rate in rates}
            for way, measured in zip(wanted, timings, strict=True):
                rows += compare(way, machine, before, after, measured)
    report(str(__doc__).splitlines()[0], rows, device=torch.device("cpu"), path=options.json)
    print(f"\n{summary(rows)}")
    if options.plot:
        draw(rows, options.plot)


def probed(folder: Path, machine: Machine, rate_bps: float, number: int = 0) -> Cluster:
    """The probe of these links after so many groups of ways, from the folder if it is there."""
    path = folder / f"{machine.hosts}x{machine.ranks_per_host}_{format_rate(rate_bps)}_{number}.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        print(f"--- probe of {machine.hosts} hosts x {machine.ranks_per_host} at {format_rate(rate_bps)}", flush=True)
        settings = ["world.threads=1", "world.timeout_s=300", "--json", str(path)]
        command = [sys.executable, "-m", "thinwire", "probe", str(CONFIGS / "demo.yaml"), *settings]
        with machine.lab(rate_bps) as lab, Path(os.devnull).open("w") as nowhere:
            run = lab.start(command, output="rank0", stdout=nowhere)
            if code := run.wait(300):
                raise SystemExit("\n".join([f"the probe failed with exit code {code}", *run.report()]))
    return load_cluster(path)


def run(way: Way, machine: Machine, rates: Sequence[float], runs: LabRuns) -> Mapping[float, Timing]:
    """Its steps at each rate."""
    outcome = runs.get(way, machine, STEPS, rates)
    if outcome.error:
        raise SystemExit(f"{way.label} failed: {outcome.error}")
    return outcome.timings


def compare(
    way: Way,
    machine: Machine,
    before: Mapping[float, Cluster],
    after: Mapping[float, Cluster],
    timings: Mapping[float, Timing],
) -> list[Row]:
    """A row for each link of one method."""
    rows: list[Row] = []
    for rate_bps, cluster in before.items():
        timing, first, last = timings[rate_bps], foretell(way, cluster), foretell(way, after[rate_bps])
        foretold_s = (first.step_s + last.step_s) / 2
        rows.append(
            {
                "ranks per host": machine.ranks_per_host,
                "link": format_rate(rate_bps),
                "method": way.label,
                "steps timed": len(timing.step_s),
                "measured s": timing.seconds,
                "foretold s": foretold_s,
                "of it computing s": (first.compute_s + last.compute_s) / 2,
                "last probe / first": last.step_s / first.step_s,
                "ratio": foretold_s / timing.seconds,
                "sent MB": sum(timing.sent_bytes.values()) / 1e6,
            }
        )
    return rows


def foretell(way: Way, cluster: Cluster) -> Foretold:
    """As `thinwire plan` does."""
    overrides = [f"train.steps={STEPS}", "world.threads=1", *way.overrides]
    time = predict(load_config(CONFIGS / way.config, overrides), cluster).time
    return Foretold(time.step_s, time.compute_s)


def summary(rows: Sequence[Row]) -> str:
    """How many are within the promise, and the one that is furthest from it."""
    ratios = [float(row["ratio"]) for row in rows]
    near = sum(abs(ratio - 1) <= WITHIN for ratio in ratios)
    far = max(rows, key=lambda row: abs(float(row["ratio"]) - 1))
    return (
        f"{near} of {len(rows)} within {WITHIN:.0%}; median error {statistics.median(abs(r - 1) for r in ratios):.1%}; "
        f"furthest: {far['method']}, {far['link']}, {far['ranks per host']} a host: {far['ratio']:.3f}"
    )


def draw(rows: Sequence[Row], path: Path) -> None:
    """Foretold against measured seconds, one mark for each method and link, and the band of the promise."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 6.5), dpi=120, layout="constrained")
    methods = dict.fromkeys(str(row["method"]) for row in rows)
    shades = plt.get_cmap("tab20")  # dark and light of ten colours, in turns
    colours = {method: shades(2 * (i % 10) + i // 10) for i, method in enumerate(methods)}
    marks = {
        count: mark for count, mark in zip(dict.fromkeys(row["ranks per host"] for row in rows), "os^v", strict=False)
    }
    for method, colour in colours.items():
        for count, mark in marks.items():
            mine = [row for row in rows if (row["method"], row["ranks per host"]) == (method, count)]
            label = method if count == next(iter(marks)) else None
            axes.plot(
                [row["measured s"] for row in mine],
                [row["foretold s"] for row in mine],
                mark,
                color=colour,
                markersize=6,
                markerfacecolor=colour if count == next(iter(marks)) else "none",
                label=label,
            )
    seconds = [float(row[key]) for row in rows for key in ("measured s", "foretold s")]
    ends = [min(seconds) / 1.3, max(seconds) * 1.3]
    axes.plot(ends, ends, color="grey", linewidth=0.8)
    axes.fill_between(
        ends, [(1 - WITHIN) * end for end in ends], [(1 + WITHIN) * end for end in ends], color="grey", alpha=0.15
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(*ends)
    axes.set_ylim(*ends)
    axes.set_xlabel("seconds of a step, measured in the lab")
    axes.set_ylabel("seconds of a step, foretold from a probe")
    axes.set_title(f"{HOSTS} emulated hosts, filled: one rank each, open: two; band: {WITHIN:.0%}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7, loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    main()
