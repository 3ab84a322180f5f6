"""Claim: a quarter of the messages, denser at the end, and a merge close 90 % of the gap to full averages, for MLPs.

    python benchmarks/gossip_single_merge.py [--seeds 5] [--only mixture-16 digits-16 ...] [--keep FOLDER]
        [--json FILE] [--plot FILE]

Tasks: mixture, a two-layer MLP on ten classes of two modes, 20 local steps of SGD a round, 150 rounds, each machine's
classes drawn from Dirichlet(0.1), with 16 and 32 machines; digits, the same on scikit-learn's digits (which must be
installed: python -m pip install scikit-learn); text, a small GPT on 8 machines, each with its own part of the standard
library, 1 step of AdamW a round, 192 rounds.

Every way is D-PSGD with one global average at the end, by the same agents in the same simulation; ways differ in graph
and schedule. Local: the mean score of the machines' own models just before that average; merged: of the average. Gap
closed: (merged - merged without communication) / (merged with full averages - the same). Messages are payload bytes by
bytes of a model, of a machine, exchanges and merge together; their share is of what pairs in every round send.

For the text it is about half: a young GPT changes fast, and pairs after every step leave a part of the gap as well.
"""

from __future__ import annotations

import json
import statistics
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gossip_tasks import Digits, Mixture, Task, Text
from runner import Row, arguments, report

from thinwire.comm.gossip.agent import Agent
from thinwire.comm.gossip.algorithm import Parts
from thinwire.comm.gossip.algorithms.dpsgd import DPSGDSettings
from thinwire.comm.gossip.budget import BudgetSettings
from thinwire.comm.gossip.graphs import EachGraph, build_graph
from thinwire.comm.gossip.graphs.base_k import BaseKSettings
from thinwire.comm.gossip.graphs.random_graphs import MatchingSettings
from thinwire.comm.gossip.graphs.regular import CompleteSettings
from thinwire.comm.gossip.schedule import (
    EachSchedule,
    EverySettings,
    SingleMergeSettings,
    WindowSettings,
    build_schedule,
)
from thinwire.comm.gossip.simulation import Simulation
from thinwire.comm.two_shot import split_evenly

SHARE = 0.25  # of the messages of pairs in every round
WINDOW = 8  # rounds
CURVE_POINTS = 15
NONE, PAIRS, FULL = "no exchange", "pairs, every round", "full average, every round"
LATE = "budget, late, base-2 graph"
EARLY, SPARSE = "budget, early, base-2 graph", "pairs with p = 0.2"
FEW = (NONE, LATE, PAIRS, FULL)
COMPARED = {"mixture-32": FEW, "digits-16": (*FEW, EARLY, SPARSE), "text-8": FEW}
"""On these tasks, only these ways."""

COLORS = {
    FULL: "black",
    PAIRS: "tab:blue",
    LATE: "tab:red",
    SPARSE: "tab:green",
    NONE: "tab:gray",
}
WINDOWS = {
    "and a window early": "tab:orange",
    "and a window in the middle": "tab:olive",
    "and a window late": "tab:purple",
}

TASKS: Mapping[str, Callable[[int], Task]] = {
    "mixture-16": lambda seed: Mixture(16, seed),
    "mixture-32": lambda seed: Mixture(32, seed),
    "digits-16": lambda seed: Digits(16, seed),
    "text-8": lambda seed: Text(8, seed),
}


@dataclass(frozen=True)
class Way:
    """How machines talk."""

    graph: EachGraph
    schedule: EachSchedule


def ways(task: Task) -> dict[str, Way]:
    """All that are compared."""
    matching, base = MatchingSettings(), BaseKSettings(k=1)
    every = EverySettings(steps=task.every, merge_at="end")
    vector_bytes = 4 * task.replicas[0].numel
    total = SHARE * task.rounds * vector_bytes

    def budget(spend: Any) -> BudgetSettings:
        return BudgetSettings(total_bytes=total, spend=spend, every=task.every)

    def sparse(start: int | None) -> SingleMergeSettings:
        window = None if start is None else WindowSettings(rounds=WINDOW, start=start)
        return SingleMergeSettings(probability=0.2, every=task.every, window=window)

    return {
        NONE: Way(matching, EverySettings(steps=task.every * task.rounds + 1, merge_at="end")),
        FULL: Way(CompleteSettings(), every),
        PAIRS: Way(matching, every),
        LATE: Way(base, budget("late")),
        "budget, even, base-2 graph": Way(base, budget("even")),
        EARLY: Way(base, budget("early")),
        "budget, late, pairs": Way(matching, budget("late")),
        SPARSE: Way(matching, sparse(None)),
        "and a window early": Way(matching, sparse(0)),
        "and a window in the middle": Way(matching, sparse((task.rounds - WINDOW) // 2)),
        "and a window late": Way(matching, sparse(task.rounds - WINDOW)),
    }


def train(make: Callable[[int], Task], name: str, seed: int) -> dict[str, Any]:
    """One run, to the end."""
    task = make(seed)
    size, steps, numel = len(task.replicas), task.every * task.rounds, task.replicas[0].numel
    way = ways(task)[name]
    graph = build_graph(way.graph, size, seed)
    world = Simulation(size)
    own: dict[int, torch.Tensor] = {}
    agents = []
    for replica, port in zip(task.replicas, world.ports, strict=True):
        algorithm = DPSGDSettings().build(Parts(replica, port, graph, 60.0, seed))
        schedule = build_schedule(way.schedule, graph, steps, seed, 4 * numel)
        agent = Agent(replica, port, algorithm, schedule, steps=steps)
        agent.before_merge = lambda r=replica, rank=port.rank: own.update({rank: r.weights()})  # type: ignore[misc]
        agents.append(agent)
    curve = []
    for step in range(1, steps + 1):
        task.step()
        world.run([agent.after_step() for agent in agents])
        if step % (steps // CURVE_POINTS) == 0 and step < steps:
            present = torch.stack([replica.weights() for replica in task.replicas])
            curve.append((step // task.every, *scores(task, present)))
    local, _ = scores(task, torch.stack([own[rank] for rank in range(size)]))
    merged = {tuple(replica.weights().tolist()) for replica in task.replicas}
    assert len(merged) == 1, "a merge gives the same bits to all"
    score = task.score(task.replicas[0].weights()[None])[0]
    curve.append((task.rounds, local, score))
    payload = sum(count for port in world.ports for count in port.sent_bytes.values())
    return {"local": local, "merged": score, "messages": payload / (4 * numel) / size, "curve": curve}


def scores(task: Task, weights: torch.Tensor) -> tuple[float, float]:
    """(mean score of the models, score of their mean)."""
    found = task.score(torch.cat([weights, weights.mean(dim=0, keepdim=True)]))
    return statistics.fmean(found[:-1]), found[-1]


def rows_of(name: str, runs: Mapping[str, Sequence[Mapping[str, Any]]], task: Task) -> Iterator[Row]:
    """One row of each way: means over the seeds, and the spread of what they show."""

    def mean(way: str, what: str) -> float:
        return statistics.fmean(run[what] for run in runs[way])

    size = len(task.replicas)
    last = 2 * (task.replicas[0].numel - split_evenly(task.replicas[0].numel, size)[0]) / task.replicas[0].numel
    for way in ways(task):
        if way not in runs:
            continue
        closed = [
            (run["merged"] - none["merged"]) / (full["merged"] - none["merged"])
            for run, none, full in zip(runs[way], runs[NONE], runs[FULL], strict=True)
        ]
        gap = mean(FULL, "merged") - mean(NONE, "merged")
        yield {
            "task": name,
            "way": way,
            "seeds": len(runs[way]),
            "messages of a machine": mean(way, "messages"),
            "share of pairs": f"{mean(way, 'messages') / task.rounds:.1%}",
            "of which the merge": round(last, 2),
            f"local {task.measure}": mean(way, "local"),
            "merged": mean(way, "merged"),
            "worst, best seed": f"{min(r['merged'] for r in runs[way]):.3f}, {max(r['merged'] for r in runs[way]):.3f}",
            "gap closed": f"{(mean(way, 'merged') - mean(NONE, 'merged')) / gap:.1%}",
            "by seed": f"{min(closed):.1%} to {max(closed):.1%}",
        }


def draw(found: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]], path: Path) -> None:
    """Score of the average of all models over the rounds, one panel for each task; means over the seeds."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    windows = [(name, WINDOWS) for name in found if WINDOWS.keys() <= found[name].keys()]
    shown = [(name, COLORS) for name in found] + windows
    columns = min(3, len(shown))
    grid = (-(-len(shown) // columns), columns)
    size = (5.4 * grid[1], 4.4 * grid[0])
    figure, panels = plt.subplots(*grid, figsize=size, dpi=110, layout="constrained", squeeze=False)
    for axes in panels.flat[len(shown) :]:
        axes.set_visible(False)
    for axes, (name, colors) in zip(panels.flat, shown, strict=False):
        runs = found[name]
        for way, color in colors.items():
            if way not in runs:
                continue
            curves = [run["curve"] for run in runs[way]]
            rounds = [point[0] for point in curves[0]]
            label = f"{way} ({statistics.fmean(run['messages'] for run in runs[way]):,.0f})"
            for place, style, width in ((2, "-", 2.0), (1, ":", 1.2)):
                means = [statistics.fmean(curve[i][place] for curve in curves) for i in range(len(rounds))]
                axes.plot(rounds, means, style, color=color, linewidth=width, label=label if place == 2 else None)
        axes.set_title(
            name.replace("-", ", ") + " machines" + (f": {WINDOW} dense rounds" if colors is WINDOWS else "")
        )
        axes.set_xlabel("round")
        axes.set_ylabel(TASKS[name](0).measure)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, title="way (messages of a machine)", title_fontsize=8)
    figure.suptitle("Average of all machines' models (solid), and the machines' own models (dotted)")
    figure.savefig(path)


def kept(path: Path | None) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Runs that are already there."""
    if path is None or not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {(line["task"], line["way"], line["seed"]): line for line in lines}


def collect(options: Namespace) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """All runs: task, way, seeds in order."""
    store = None if options.keep is None else options.keep / "runs.jsonl"
    if store is not None:
        store.parent.mkdir(parents=True, exist_ok=True)
    done = kept(store)
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name in options.only:
        names = [way for way in ways(TASKS[name](0)) if way in COMPARED.get(name, (way,))]
        for seed in range(options.seeds):
            for way in names:
                if (run := done.get((name, way, seed))) is None:
                    run = {"task": name, "way": way, "seed": seed, **train(TASKS[name], way, seed)}
                    if store is not None:
                        with store.open("a") as file:
                            file.write(json.dumps(run) + "\n")
                    print(
                        f"{name} seed {seed}, {way}: local {run['local']:.4f}, merged {run['merged']:.4f}", flush=True
                    )
                found.setdefault(name, {}).setdefault(way, []).append(run)
    return found


def main() -> None:
    parser = arguments(str(__doc__).splitlines()[0])
    parser.set_defaults(device="cpu", threads=1)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=list(TASKS), default=list(TASKS), help="tasks")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="write each run there, and take up those that are")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = collect(options)
    for name, runs in found.items():
        task = TASKS[name](0)
        path = None if options.json is None else options.json.with_stem(f"{options.json.stem}_{name.replace('-', '_')}")
        report(str(__doc__).splitlines()[0], list(rows_of(name, runs, task)), device=torch.device("cpu"), path=path)
        print()
    if options.plot:
        draw(found, options.plot)


if __name__ == "__main__":
    main()
