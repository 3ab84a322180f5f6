"""Question: what share of its speed does a host keep as more join over thin links, and does a plan foretell it?

    python benchmarks/scaling.py [--hosts 1 2 4 8] [--rate 100mbit] [--json FILE] [--plot FILE]

Times steps of the GPT of configs/demo.yaml on so many emulated hosts: weak, with 4 sequences per host, and strong, with
16 in all. Each host has an equal part of this machine's processors, however many there are. The ideal is as many hosts
that train models of their own and send nothing. Efficiency = the ideal's seconds per step / the way's. `predicted` is
what a plan says from one `thinwire probe` of these hosts and the ideal's seconds.

Runs are kept in --keep and probes beside it: what is there is not made again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lab_machine import Machine
from lab_runs import CONFIGS, LabRuns, Outcome, Way
from runner import Row, arguments, report

from thinwire.comm.units import format_rate, parse_rate
from thinwire.dist.config import RunConfig, load_config
from thinwire.dist.plan.cluster import Cluster, load_cluster
from thinwire.dist.plan.prediction import compute_digest, predict

HOSTS = (1, 2, 4, 8)
PER_HOST, IN_ALL = 4, 16
STEPS = 60
EVERY = 5
KEPT = Path(__file__).resolve().parent.parent / "build" / "benchmarks" / "scaling_runs.json"
ALONE = Way("alone", peer="alone")
WAYS = (
    Way("all-reduce fp32", ("method.dtype=fp32",)),
    Way("low rank 16", ("method={kind: compress, compressor: {kind: lowrank, rank: 16, dtype: bf16}, clip: after}",)),
    Way(
        f"SparseLoCo, every {EVERY}",
        (
            f"method={{kind: local_sgd, every: {EVERY}, outer: {{kind: sgd, lr: 1.0}}, feedback: {{kind: ef, decay: "
            "0.95}, compressor: {kind: topk, k: 64, chunk: 4096, values: 2bit}, collective: contributor_mean}",
        ),
        period=EVERY,
    ),
)


def main() -> None:
    parser = arguments(str(__doc__).splitlines()[0])
    parser.add_argument("--hosts", type=int, nargs="+", default=list(HOSTS), help=f"up to {max(HOSTS)}")
    parser.add_argument("--rate", default="100mbit", help="link of each host")
    parser.add_argument("--timed", type=int, default=4, help="steps to time; fewer where they are long")
    parser.add_argument("--only", nargs="*", help="ways whose label contains one of these")
    parser.add_argument("--keep", type=Path, metavar="FILE", default=KEPT)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw efficiency against hosts there")
    options = parser.parse_args()
    rate_bps = parse_rate(options.rate)
    ways = [way for way in WAYS if not options.only or any(part in way.label for part in options.only)]
    runs = LabRuns(options.keep, timed_steps=options.timed)
    rows: list[Row] = []
    for hosts in options.hosts:
        # One host sends nothing, whatever the way.
        cluster = probe(options.keep.parent, hosts, rate_bps) if hosts > 1 else None
        for scaling, batch in (("weak", PER_HOST * hosts), ("strong", IN_ALL)):
            ideal = timed(runs, ALONE, hosts, batch, rate_bps)
            for way in ways:
                step_s = timed(runs, way, hosts, batch, rate_bps) if hosts > 1 else ideal
                foretold_s = predicted(way, batch, ideal, cluster) if cluster else ideal
                rows.append(row(way, scaling, hosts, batch, rate_bps, (ideal, step_s, foretold_s)))
        report(str(__doc__).splitlines()[0], rows, device=torch.device("cpu"), path=options.json)
    if options.plot:
        draw(rows, options.hosts, options.rate, options.plot)


def machine(hosts: int) -> Machine:
    """Of which each host is as fast as any other number of them."""
    return Machine(hosts=hosts, places=max(HOSTS))


def timed(runs: LabRuns, way: Way, hosts: int, batch: int, rate_bps: float) -> float:
    """Seconds per step. Raises SystemExit where a run fails."""
    sized = Way(**{**vars(way), "overrides": (*way.overrides, f"train.global_batch={batch}")})
    outcome: Outcome = runs.get(sized, machine(hosts), STEPS, [rate_bps])
    if outcome.error:
        raise SystemExit(f"{way.label} on {hosts} hosts: {outcome.error}")
    return outcome.timings[rate_bps].seconds


def row(way: Way, scaling: str, hosts: int, batch: int, rate_bps: float, seconds: tuple[float, float, float]) -> Row:
    """seconds: ideal, measured and predicted, per step."""
    ideal_s, step_s, predicted_s = seconds
    return {
        "scaling": scaling,
        "hosts": hosts,
        "link": format_rate(rate_bps),
        "way": way.label,
        "ideal s": ideal_s,
        "s per step": step_s,
        "predicted s": predicted_s,
        "efficiency": ideal_s / step_s,
        "predicted": ideal_s / predicted_s,
        "sequences/s": batch / step_s,
    }


def predicted(way: Way, batch: int, ideal_s: float, cluster: Cluster) -> float:
    """What the plan says, knowing what computing alone takes here."""
    config = load_config(CONFIGS / way.config, [f"train.global_batch={batch}", "world.threads=1", *way.overrides])
    return predict(config, with_compute(cluster, config, ideal_s)).time.step_s


def with_compute(cluster: Cluster, config: RunConfig, ideal_s: float) -> Cluster:
    """The cluster with the seconds of a step that sends nothing, shared out as the probe has found for its batch."""
    assert cluster.measured is not None
    probed = cluster.measured.computes[0]
    whole_s = probed.forward_s + probed.backward_s + probed.optimizer_s
    micro_batch, _ = config.train.share(cluster.size)
    seconds = {
        name: ideal_s / whole_s * getattr(probed, name)
        for name in ("forward_s", "backward_s", "optimizer_s", "coupled_s", "forward_alone_s")
    }
    update = {"config": compute_digest(config, micro_batch), "micro_batch": micro_batch, **seconds}
    compute = probed.model_copy(update=update)
    measured = cluster.measured.model_copy(update={"computes": (compute,)})
    return cluster.model_copy(update={"measured": measured})


def probe(folder: Path, hosts: int, rate_bps: float) -> Cluster:
    """What `thinwire probe` says of so many hosts, from the folder if it is there."""
    path = folder / f"scaling_probe_{hosts}_{format_rate(rate_bps)}.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        print(f"--- probe of {hosts} hosts at {format_rate(rate_bps)}", flush=True)
        settings = [f"train.global_batch={PER_HOST * hosts}", "world.threads=1", "--json", str(path)]
        command = [sys.executable, "-m", "thinwire", "probe", str(CONFIGS / "demo.yaml"), *settings]
        with machine(hosts).lab(rate_bps) as lab, path.with_suffix(".txt").open("w") as said:
            run = lab.start(command, output="rank0", stdout=said)
            if code := run.wait(300):
                raise SystemExit("\n".join([f"the probe failed with exit code {code}", *run.report()]))
    return load_cluster(path)


def draw(rows: Sequence[Row], hosts: Sequence[int], rate: str, path: Path) -> None:
    """Efficiency against hosts; dotted what was predicted."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), dpi=120, layout="constrained", sharey=True)
    for axes, scaling in zip(panels, ("weak", "strong"), strict=True):
        axes.axhline(1.0, color="0.6", linewidth=1)
        for way in dict.fromkeys(str(row["way"]) for row in rows):
            mine: list[dict[str, Any]] = [dict(r) for r in rows if r["way"] == way and r["scaling"] == scaling]
            places = [row["hosts"] for row in mine]
            (line,) = axes.plot(places, [row["efficiency"] for row in mine], "o-", linewidth=2, label=way)
            axes.plot(places, [row["predicted"] for row in mine], ":", color=line.get_color(), linewidth=1.5)
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(hosts), [str(count) for count in hosts])
        axes.set_xlabel("hosts")
        axes.set_title(
            f"weak: {PER_HOST} sequences per host" if scaling == "weak" else f"strong: {IN_ALL} sequences in all"
        )
        axes.grid(alpha=0.3)
    panels[0].set_ylim(0, 1.1)
    panels[0].set_ylabel(f"efficiency at {rate} (dotted: predicted)")
    panels[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    main()
