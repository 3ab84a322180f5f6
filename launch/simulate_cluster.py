"""`thinwire simulate --cluster`: a run on a described cluster in virtual time, what disturbs it, and how it scales."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.table import Table

from thinwire.comm.units import format_bytes
from thinwire.launch.complaint import complain, is_ours
from thinwire.launch.simulate import USER_ERROR, by_machine

if TYPE_CHECKING:
    from thinwire.dist.cluster_simulation.disturbances import Disturbances
    from thinwire.dist.cluster_simulation.restarts import Recovery
    from thinwire.dist.cluster_simulation.scaling import ScalingPoint
    from thinwire.dist.config import RunConfig
    from thinwire.dist.plan.cluster import Cluster

_NOTABLE = 0.05  # of a step: less is not worth a line
_WIDTH = 130  # of the table where there is no terminal
_DRAWN = (("computing", "computed_s"), ("waiting for the wire", "wire_s"), ("waiting for others", "others_s"))


@dataclass(frozen=True)
class Asked:
    """The options of the command line, as given. None: as the cluster's description says."""

    cluster: Path
    scale: str | None = None
    scaling: Literal["weak", "strong"] = "weak"
    steps: int = 100
    slow: Sequence[str] = ()
    jitter: float | None = None
    failures: float | None = None
    checkpoint_s: float = 0.0
    restart_s: float = 60.0
    seed: int = 0
    plot: Path | None = None
    output: Path | None = None


def simulate_cluster(path: Path, overrides: Sequence[str], asked: Asked) -> int:
    """Simulate the run of a file on a cluster, and print what its steps take and why; returns the exit code.

    0: done. 2: the user's mistake, told in one message.
    """
    from thinwire.dist.cluster_simulation.disturbances import Disturbances
    from thinwire.dist.cluster_simulation.restarts import Recovery
    from thinwire.dist.cluster_simulation.scaling import simulate_scaling
    from thinwire.dist.config import load_config
    from thinwire.dist.plan.cluster import load_cluster

    began = time.monotonic()
    try:
        _check(asked)
        config, cluster = load_config(path, overrides), load_cluster(asked.cluster)
        counts = counts_of(asked.scale, cluster)
        disturbances = Disturbances(
            by_machine("--slow", asked.slow, "3=10, ten times the usual time"),
            cluster.jitter if asked.jitter is None else asked.jitter,
            cluster.failures_per_device_hour if asked.failures is None else asked.failures,
            asked.seed,
        )
        recovery = Recovery(config.checkpoint.every_steps, asked.checkpoint_s, asked.restart_s)
        disturbances.check(cluster.at(max(counts)))
        points = list(
            simulate_scaling(
                config, cluster, counts, disturbances, recovery, scaling=asked.scaling, simulated=asked.steps
            )
        )
    except ValueError as error:
        if not is_ours(error):
            raise
        return complain(error, USER_ERROR)
    base = points[0].run.ranks
    subject = f"{config.name} by {config.method.kind} on {cluster.name}, {asked.scaling} scaling"
    print(
        f"{subject}, {config.train.steps} steps, "
        f"of which {len(points[0].run.step_s)} are simulated; {_told(config, disturbances, recovery)}"
    )
    _print_table(points, title=f"a step, mean over ranks; efficiency: throughput per device, {base} devices = 1")
    for line in [*remarks(points), *_left_out(disturbances.slow, counts)]:
        print(line)
    print(f"simulated in {time.monotonic() - began:.1f} s")
    if asked.output is not None:
        content = {
            "cluster": cluster.model_dump(mode="json", exclude_none=True),
            "config": config.resolved(),
            "scaling": asked.scaling,
            "jitter": disturbances.jitter,
            "slow": {str(rank): factor for rank, factor in disturbances.slow.items()},
            "failures_per_device_hour": disturbances.failures_per_device_hour,
            "points": [point.record() for point in points],
        }
        asked.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(f"{asked.output}: all figures")
    if asked.plot is not None:
        draw(points, asked.plot, title=subject)
        print(f"{asked.plot}: the curves")
    return 0


def counts_of(scale: str | None, cluster: Cluster) -> list[int]:
    """Numbers of devices, of a text such as "16,64,384"; "all": doubled from one group on; None: the whole cluster.

    Raises:
        ValueError: the text is another.
    """
    from thinwire.dist.cluster_simulation.scaling import all_counts

    if scale is None:
        return [cluster.size]
    if scale == "all":
        return all_counts(cluster)
    try:
        counts = sorted({int(number) for number in scale.replace(",", " ").split()})
    except ValueError:
        counts = []
    if not counts or counts[0] < 1:
        raise ValueError(f"--scale: {scale!r}; give numbers of devices, such as 16,64,384, or all")
    return counts


def remarks(points: Sequence[ScalingPoint]) -> list[str]:
    """What deserves a sentence."""
    lines = []
    last = points[-1].run
    rank, less_s = last.waited_for
    if less_s > _NOTABLE * last.mean_step_s:
        lines.append(
            f"waited for: rank {rank} waits for others {_duration(less_s)} less in a step than the mean rank does"
        )
    for point in points:
        run = point.run
        if not point.fits:
            total = sum(point.memory_bytes.values())
            lines.append(f"memory: {run.ranks} devices would need {format_bytes(total)} each, more than they have")
        if run.completion.failures:
            done = run.completion
            lines.append(
                f"failures: {done.failures} on {run.ranks} devices in {_duration(done.seconds)}; steps done again and "
                f"restarts cost {_duration(done.lost_s)}, checkpoints {_duration(done.checkpoints_s)}"
            )
        if run.lost_ranks:
            lines.append(f"failures: {run.lost_ranks} of {run.ranks} machines are lost; the others go on")
    return lines


def _left_out(slow: Mapping[int, float], counts: Sequence[int]) -> list[str]:
    return [
        f"--slow: {count} devices have no rank {', '.join(str(rank) for rank in sorted(slow) if rank >= count)}"
        for count in counts
        if any(rank >= count for rank in slow)
    ]


def draw(points: Sequence[ScalingPoint], path: Path, *, title: str) -> None:
    """Throughput and a step's seconds against the number of devices, as PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    counts = [point.run.ranks for point in points]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), dpi=120, layout="constrained")
    rates = [point.run.sequences_per_s for point in points]
    left.plot(counts, rates, "o-", label="simulated")
    left.plot(counts, [rates[0] / counts[0] * count for count in counts], "--", color="grey", label="ideal")
    for point in points:
        left.annotate(
            f"{point.efficiency:.2f}", (point.run.ranks, point.run.sequences_per_s), textcoords="offset points",
            xytext=(6, -12), fontsize=8,
        )  # fmt: skip
    left.set(xscale="log", yscale="log", xlabel="devices", ylabel="sequences per second", title=title)
    left.legend()
    bottoms = [0.0] * len(points)
    places = range(len(points))
    for label, name in _DRAWN:
        heights = [getattr(point.run, name) for point in points]
        right.bar(places, heights, bottom=bottoms, label=label)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    right.set(xlabel="devices", ylabel="seconds of a step, mean over ranks", title="where a step's time goes")
    right.set_xticks(places, [str(count) for count in counts])
    right.set_ylim(top=1.25 * max(bottoms))
    right.legend(loc="upper left", ncols=3, fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both", axis="y")
    left.set_xticks(counts, [str(count) for count in counts])
    left.set_xticks([], minor=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _check(asked: Asked) -> None:
    if asked.steps < 1:
        raise ValueError(f"--steps: {asked.steps}; give 1 or more steps to simulate")
    for option, file in (("--json", asked.output), ("--plot", asked.plot)):
        if file is not None and not file.parent.is_dir():
            raise ValueError(f"{option}: {file}: there is no folder {file.parent}; make it first")


def _told(config: RunConfig, disturbances: Disturbances, recovery: Recovery) -> str:
    from thinwire.dist.cluster_simulation.run import lost_after_s

    told = [f"rank {rank} {factor:g} times slower" for rank, factor in sorted(disturbances.slow.items())]
    if disturbances.jitter:
        told.append(f"computing varies by {100 * disturbances.jitter:g} %")
    if disturbances.failures_per_device_hour:
        wait_s = lost_after_s(config)
        if wait_s is not None:
            after = f"the others wait {wait_s:g} s for a lost one, and go on"
        elif recovery.every_steps:
            after = (
                f"a checkpoint of {recovery.checkpoint_s:g} s every {recovery.every_steps} steps, a restart takes "
                f"{recovery.restart_s:g} s"
            )
        else:
            after = f"no checkpoints, a restart takes {recovery.restart_s:g} s"
        told.append(f"{disturbances.failures_per_device_hour:g} failures per device and hour: {after}")
    return "; ".join(told) or "nothing disturbs it"


def _print_table(points: Sequence[ScalingPoint], *, title: str) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH, color_system=None)
    table = Table(title=title, title_justify="left")
    for name in ("devices", "step", "undisturbed", "computing", "for others", "for the wire", "sequences/s"):
        table.add_column(name, justify="right")
    for name in ("efficiency", "memory", "whole run"):
        table.add_column(name, justify="right")
    for point in points:
        run = point.run
        seconds = (run.mean_step_s, run.foretold_s, run.computed_s, run.others_s, run.wire_s)
        memory = format_bytes(sum(point.memory_bytes.values())) + ("" if point.fits else " (!)")
        table.add_row(
            f"{run.ranks:,}",
            *map(_duration, seconds),
            f"{run.sequences_per_s:.4g}",
            f"{point.efficiency:.3f}",
            memory,
            _duration(run.completion.seconds),
        )
    console.print(table)


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
