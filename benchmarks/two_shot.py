"""Claim: the two-shot mean uses a thin link better than an all-to-all of all peers at once, which leaves much idle.

    python benchmarks/two_shot.py [--repeats 5] [--json FILE]

Four emulated hosts average one fp32 tensor: by gloo's own ring all-reduce, and by thinwire's two-shot mean with a peer
at a time (what it does with large slices) and with all peers at once (with small ones). The ratio is the time over
(bytes that a rank sends * 8 / rate + the least latency, which is two one-way delays).
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from runner import Row, arguments, report

import thinwire
from thinwire.comm import two_shot
from thinwire.dist.world import WorldSettings
from thinwire.launch.lab import Lab

HOSTS = 4
CASES = [  # (rate_bps, delay_s, elements)
    (100e6, 0.0, 2_500_000),
    (1e9, 0.0, 2_500_000),
    (100e6, 0.02, 2_500_000),
    (100e6, 0.02, 250_000),
    (100e6, 0.02, 10_000),
]


def main() -> None:
    parser = arguments(str(__doc__).splitlines()[0])
    parser.set_defaults(device="cpu", repeats=5)
    parser.add_argument("--worker", type=int, metavar="ELEMENTS", help="what a rank does (used by the script itself)")
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.repeats)
        return
    rows = [row for case in CASES for row in measure_case(*case, options.repeats)]
    report(str(__doc__).splitlines()[0], rows, device=torch.device("cpu"), path=options.json)


def measure_case(rate_bps: float, delay_s: float, elements: int, repeats: int) -> list[Row]:
    command = [sys.executable, __file__, "--worker", str(elements), "--repeats", str(repeats)]
    with tempfile.TemporaryDirectory() as folder, Lab(hosts=HOSTS, rate_bps=rate_bps, delay_s=delay_s) as lab:
        log = Path(folder) / "log"
        with log.open("w") as file:
            code = lab.start(command, {**os.environ, "OMP_NUM_THREADS": "1"}, stdout=file).wait(600)
        assert code == 0
        measured: dict[str, float] = json.loads(log.read_text())
    ideal_s = 2 * (HOSTS - 1) / HOSTS * elements * 4 * 8 / rate_bps + 2 * delay_s
    return [
        {
            "algorithm": name,
            "mbit": rate_bps / 1e6,
            "delay_ms": 1e3 * delay_s,
            "MB": elements * 4 / 1e6,
            "measured_ms": 1e3 * seconds,
            "ideal_ms": 1e3 * ideal_s,
            "ratio": seconds / ideal_s,
        }
        for name, seconds in measured.items()
    ]


def work(elements: int, repeats: int) -> None:
    with thinwire.init(WorldSettings(threads=1, device="cpu")) as world:
        tensor = torch.randn(elements)
        mean = two_shot.TwoShotMean(torch.float32)

        def by_two_shot(rounds_from_bytes: int) -> Callable[[], None]:
            def run() -> None:
                two_shot._ROUNDS_FROM_BYTES = rounds_from_bytes
                world.queue.submit("mean", lambda channel: mean(channel, tensor)).wait()

            return run

        algorithms = {
            "gloo ring": lambda: dist.all_reduce(tensor, group=world.group),
            "two-shot in rounds": by_two_shot(0),
            "two-shot at once": by_two_shot(1 << 62),
        }
        seconds: dict[str, list[float]] = {name: [] for name in algorithms}
        for _ in range(repeats + 1):
            for name, run in algorithms.items():
                dist.barrier(world.group)
                began = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - began)
        if world.rank == 0:
            print(json.dumps({name: statistics.median(taken[1:]) for name, taken in seconds.items()}))


if __name__ == "__main__":
    main()
