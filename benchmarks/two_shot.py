"""Claim: the two-shot mean comes near the rate of any link, by having as many rounds under way as its latency asks for.

    python benchmarks/two_shot.py [--repeats 4] [--most 3] [--json FILE]

Four emulated hosts average fp32 tensors: by gloo's own ring all-reduce, and by thinwire's two-shot mean with one, two
or all three rounds under way at once, and with as many as it chooses by itself. The ratio is the time over (bytes that
a rank sends * 8 / rate + the least latency, which is two one-way delays).
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from runner import Row, arguments, report
from torch import Tensor

import thinwire
from thinwire.comm.pace import Members, Pace
from thinwire.comm.two_shot import TwoShotMean
from thinwire.dist.world import World, WorldSettings
from thinwire.launch.lab import Lab

HOSTS = 4
LINKS = [(10e6, 0.0), (100e6, 0.0), (1e9, 0.0), (100e6, 0.025)]  # (rate_bps, delay_s)
ELEMENTS = [1 << 16, 1 << 18, 1 << 20, 1 << 22]


def main() -> None:
    parser = arguments(str(__doc__).splitlines()[0])
    parser.set_defaults(device="cpu", repeats=4)
    parser.add_argument("--worker", type=int, nargs="+", metavar="ELEMENTS", help="what a rank does (the script's own)")
    parser.add_argument(
        "--most", type=float, default=3.0, help="seconds of the longest mean, where links are used fully"
    )
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.repeats)
        return
    rows = [row for link in LINKS for row in measure_link(*link, options)]
    report(str(__doc__).splitlines()[0], rows, device=torch.device("cpu"), path=options.json)


def measure_link(rate_bps: float, delay_s: float, options: Any) -> list[Row]:
    sizes = [numel for numel in ELEMENTS if ideal_s(numel, rate_bps, delay_s) < options.most]
    command = [sys.executable, __file__, "--repeats", str(options.repeats), "--worker", *map(str, sizes)]
    with tempfile.TemporaryDirectory() as folder, Lab(hosts=HOSTS, rate_bps=rate_bps, delay_s=delay_s) as lab:
        log = Path(folder) / "log"
        with log.open("w") as file:
            code = lab.start(command, {**os.environ, "OMP_NUM_THREADS": "1"}, stdout=file).wait(600)
        assert code == 0
        measured: list[dict[str, float]] = json.loads(log.read_text())
    return [
        {
            "mbit": rate_bps / 1e6,
            "delay_ms": 1e3 * delay_s,
            "MB": round(numel * 4 / 1e6, 2),
            "ideal_ms": 1e3 * ideal_s(numel, rate_bps, delay_s),
            **{name: seconds / ideal_s(numel, rate_bps, delay_s) for name, seconds in found.items()},
        }
        for numel, found in zip(sizes, measured, strict=True)
    ]


def ideal_s(numel: int, rate_bps: float, delay_s: float) -> float:
    return 2 * (HOSTS - 1) / HOSTS * numel * 4 * 8 / rate_bps + 2 * delay_s


class Always(Pace):
    """So many rounds, whatever the links."""

    def __init__(self, under_way: int) -> None:
        super().__init__(lambda members: 0.0)
        self._under_way = under_way

    def choose(self, members: Members, slice_bytes: int) -> int:
        return self._under_way


def work(sizes: list[int], repeats: int) -> None:
    with thinwire.init(WorldSettings(threads=1, device="cpu")) as world:
        paces = {
            "chosen": world.queue._pace,
            "one": Always(1),
            "two": Always(2),
            "all": Always(HOSTS - 1),
        }
        found = []
        for numel in sizes:
            tensor, mean = torch.randn(numel), TwoShotMean(torch.float32)

            def two_shot(pace: Pace, tensor: Tensor = tensor, mean: TwoShotMean = mean) -> None:
                world.queue._pace = pace
                world.queue.submit("mean", lambda channel: mean(channel, tensor)).wait()

            def ring(tensor: Tensor = tensor) -> None:
                dist.all_reduce(tensor, group=world.group)

            algorithms = {"gloo ring": ring, **{name: partial(two_shot, pace) for name, pace in paces.items()}}
            found.append({name: statistics.median(timed(run, world, repeats)) for name, run in algorithms.items()})
        if world.rank == 0:
            print(json.dumps(found))


def timed(run: Callable[[], None], world: World, repeats: int) -> list[float]:
    """In a row, as a training run would: the last frames of one exchange delay the next."""
    seconds = []
    for _ in range(repeats + 1):
        dist.barrier(world.group)
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


if __name__ == "__main__":
    main()
