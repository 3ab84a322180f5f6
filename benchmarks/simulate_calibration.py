"""Simulated steps take what they take on emulated hosts: with a slow rank, with jitter, by all-reduce and by gossip.

    python benchmarks/simulate_calibration.py [--rate 100mbit] [--steps 10] [--json FILE] [--plot FILE]

Four hosts in the lab. Their computing is slept, as many seconds in each layer's forward and backward pass as the case
says, so that two cores are enough for all of them and what disturbs them is known. What they send is real: DDP's
buckets by `tw.allreduce`, which leave behind the backward pass, or the weights, to two neighbours, by `tw.gossip`.
Random factors are drawn as the simulation draws them, so single steps can be compared, not only their mean.

The link's rate and latency are measured first, on undisturbed hosts, by the all-reduce of one large and one small
tensor. Nothing else is fitted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from runner import Row, arguments, report
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import thinwire as tw
from thinwire.comm.allreduce import AllReduceSettings, forecast_allreduce
from thinwire.comm.forecast import Forecast, Parameter
from thinwire.comm.gossip.forecast import forecast_gossip
from thinwire.comm.gossip.settings import GossipSettings
from thinwire.comm.two_shot import TwoShotMean
from thinwire.comm.units import format_rate, parse_rate
from thinwire.dist.cluster_simulation.disturbances import Disturbances
from thinwire.dist.cluster_simulation.neighbours import sources_of_settings, with_neighbours
from thinwire.dist.cluster_simulation.ranks import every_rank
from thinwire.dist.cluster_simulation.steps import Steps
from thinwire.dist.plan.cluster import Cluster
from thinwire.dist.plan.exchange_time import ComputeTime
from thinwire.dist.plan.program import build_program
from thinwire.dist.plan.trace import StepTrace
from thinwire.launch.lab import Lab

HOSTS = 4
LAYERS, WIDTH = 6, 400  # 640 kB a layer, a bucket each
BUCKET_MIB = 0.6
WARM_UP = 2  # steps: DDP arranges its buckets anew after the first
FORWARD_S, BACKWARD_S = 0.3, 0.6
GOSSIP = {"graph": "ring", "probes": 0, "deadline_s": 600.0}


@dataclass(frozen=True)
class Case:
    """slow: factors by rank."""

    name: str
    method: str
    slow: dict[int, float]
    jitter: float = 0.0

    @property
    def disturbances(self) -> Disturbances:
        return Disturbances(slow=self.slow, jitter=self.jitter, seed=5)


CASES = (
    Case("nothing", "allreduce", {}),
    Case("rank 2 twice as slow", "allreduce", {2: 2.0}),
    Case("jitter 30 %", "allreduce", {}, 0.3),
    Case("both", "allreduce", {2: 2.0}, 0.3),
    Case("nothing", "gossip", {}),
    Case("rank 2 three times as slow", "gossip", {2: 3.0}),
    Case("jitter 30 %", "gossip", {}, 0.3),
)


def main() -> None:
    parser = arguments(str(__doc__).splitlines()[0])
    parser.set_defaults(device="cpu")
    parser.add_argument("--rate", default="100mbit", help="link of each host")
    parser.add_argument("--steps", type=int, default=10, help="of each case")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the steps of every rank there")
    parser.add_argument("--worker", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(Path(options.worker), options.steps)
        return
    measured = run(parse_rate(options.rate), options.steps)
    cluster = described(measured[0]["links"])
    rows: list[Row] = []
    ends: list[tuple[Case, Any, Any]] = []
    for index, case in enumerate(CASES):
        real = np.array([rank["ends"][index] for rank in measured]).T  # by step and rank
        told = simulated(case, cluster, options.steps)
        ends.append((case, real, told))
        rows.append(
            {
                "method": case.method,
                "disturbed by": case.name,
                "link": format_rate(parse_rate(options.rate)),
                "measured s per step": float(real[-1].max()) / options.steps,
                "simulated": float(told[-1].max()) / options.steps,
                "ratio": float(real[-1].max() / told[-1].max()),
                "worst rank and step": float(np.abs(real / told - 1).max()),
            }
        )
    report(str(__doc__).splitlines()[0], rows, device=torch.device("cpu"), path=options.json)
    level = cluster.levels[-1]
    print(f"links as measured: {format_rate(level.link_bps)}, {1e3 * level.latency_s:.2f} ms")
    if options.plot:
        draw(ends, options.plot)


def run(rate_bps: float, steps: int) -> list[Any]:
    """What every rank wrote."""
    with tempfile.TemporaryDirectory() as folder, Lab(hosts=HOSTS, rate_bps=rate_bps) as lab:
        command = [sys.executable, __file__, "--worker", folder, "--steps", str(steps)]
        if code := lab.start(command, output="rank0").wait(900):
            raise SystemExit(f"the hosts failed with exit code {code}")
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(HOSTS)]


def described(links: dict[str, float]) -> Cluster:
    """The lab, with rate and latency from the seconds of a large and a small all-reduce: two shots each."""
    latency_s = links["small_s"] / 2
    link_bps = 8 * links["sent_bytes"] / (links["large_s"] - links["small_s"])
    level = {"name": "world", "size": HOSTS, "link_bps": link_bps, "latency_s": latency_s}
    return Cluster.model_validate({"levels": [level], "device": {"memory_bytes": 1e9, "peak_flops": 1e9}})


def simulated(case: Case, cluster: Cluster, steps: int) -> Any:
    """Seconds at which each rank ends each step."""
    names = [f"{layer}.weight" for layer in range(LAYERS)]
    ready = tuple((name, (place + 1) / LAYERS) for place, name in enumerate(reversed(names)))
    trace = StepTrace(1, 1, ready, 0)
    shape = torch.Size([WIDTH, WIDTH])
    parameters = [Parameter(name, shape, torch.float32) for name in names]
    sources = None
    if case.method == "allreduce":
        buckets = [[parameter] for parameter in reversed(parameters)]
        forecast: Forecast = forecast_allreduce(AllReduceSettings(), buckets, cluster.seat())
    else:
        settings = GossipSettings.model_validate(GOSSIP)
        sizes = [parameter.numel for parameter in parameters]
        forecast = forecast_gossip(settings, sizes, cluster.seat(), steps=WARM_UP + steps)
        sources = sources_of_settings(settings, HOSTS, sum(sizes), steps=WARM_UP + steps)
    compute = ComputeTime(FORWARD_S, BACKWARD_S, 0.0)
    program = build_program(forecast, trace, compute, cluster, micro_batches=1)
    if sources is not None:
        program = with_neighbours(program)
    player = Steps(program, every_rank(cluster), case.disturbances, sources=sources)
    return np.array([player.next().ended_s for _ in range(steps)])


class Slow(torch.autograd.Function):
    """Sleeps, forward and backward."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        time.sleep(factor * FORWARD_S / LAYERS)
        return inputs.view_as(inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.factor * BACKWARD_S / LAYERS)
        return gradient, None


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))
        self.factor = 1.0

    def forward(self, inputs: Tensor) -> Tensor:
        for layer in self.layers:
            inputs = Slow.apply(layer(inputs), self.factor)
        return inputs


def work(folder: Path, steps: int) -> None:
    """What a rank does."""
    torch.set_num_threads(1)
    world = tw.init()
    links = measure_links(world)
    ends = [rank_case(case, world, steps) for case in CASES]
    (folder / f"{world.rank}.json").write_text(json.dumps({"links": links, "ends": ends}))
    world.close()


def measure_links(world: Any, repeats: int = 7) -> dict[str, float]:
    mean, seconds = TwoShotMean(torch.float32), {}
    numels = {"small": HOSTS, "large": WIDTH * WIDTH}
    for name, numel in numels.items():
        took = []
        for _ in range(repeats):
            dist.barrier(world.group)
            began = time.monotonic()
            world.queue.submit("calibration", lambda channel, n=numel: mean(channel, torch.ones(n))).wait()
            took.append(time.monotonic() - began)
        seconds[f"{name}_s"] = statistics.median(took)
    return {**seconds, "sent_bytes": float(sum(mean.sent_bytes(numels["large"], 0, HOSTS).values()))}


def rank_case(case: Case, world: Any, steps: int) -> list[float]:
    """When this rank ends each step, since all began."""
    model = Stack()
    network: nn.Module = model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    if case.method == "allreduce":
        network = DistributedDataParallel(model, process_group=world.group, bucket_cap_mb=BUCKET_MIB)
        handle = tw.allreduce(network, queue=world.queue)
    else:
        handle = tw.gossip(optimizer, model=model, queue=world.queue, steps=WARM_UP + steps, **GOSSIP)
    ranks = every_rank(described({"small_s": 0.0, "large_s": 1.0, "sent_bytes": 1.0}))
    ends = []
    began = 0.0
    for step in range(-WARM_UP, steps):
        if step == 0:
            dist.barrier(world.group)
            began = time.monotonic()
        model.factor = float(case.disturbances.factors(ranks, step)[world.rank]) if step >= 0 else 0.1
        network(torch.ones(1, WIDTH)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        ends.append(time.monotonic() - began)
    handle.remove()
    dist.barrier(world.group)
    return ends[WARM_UP:]


def draw(ends: list[tuple[Case, Any, Any]], path: Path) -> None:
    """When each rank ends each step, measured and simulated."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 4, figsize=(18, 8), dpi=90, layout="constrained")
    for axes in panels.flat[len(ends) :]:
        axes.axis("off")
    for axes, (case, real, told) in zip(panels.flat, ends, strict=False):
        for rank in range(HOSTS):
            steps = range(1, len(real) + 1)
            (line,) = axes.plot(steps, real[:, rank], "o", label=f"rank {rank}, measured")
            axes.plot(steps, told[:, rank], color=line.get_color(), label="simulated" if not rank else None)
        axes.set(title=f"{case.method}, disturbed by: {case.name}", xlabel="step", ylabel="ended, seconds")
        axes.grid(alpha=0.3)
    panels.flat[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    main()
