"""Claim: a step of onebyte sends a millionth of what DDP sends, and spends nearly all of its time in forward passes.

    python benchmarks/onebyte_step.py [--repeats 20] [--json FILE]

Four emulated hosts at 100 Mbit/s, the 3.2 M GPT: torch DDP with fp32 gradients and SGD, and OneByteSPSA with one
direction per host. On each host and in each step 4 sequences of 128 tokens, as `make demo` has, or 8 of 256, as
configs/gpt_3m.yaml has. Per host and step: payload bytes as metered (for DDP, by our fp32 all-reduce, which sends as
much as a ring), and all bytes that the host's interface sent, acknowledgements included. `weights_share` is the share
of the step's time in which the weights are perturbed, restored and updated.
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
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from runner import Row, arguments, report
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import thinwire
from thinwire.dist.models.gpt import GPT, GPTSettings
from thinwire.dist.world import World, WorldSettings
from thinwire.launch.lab import Lab
from thinwire.launch.lab.counters import interface_bytes

HOSTS = 4
RATE_BPS = 100e6
VOCABULARY = 256
CONTEXT = 256


class Way(NamedTuple):
    label: str
    sequences: int
    tokens: int


WAYS = {
    "ddp": Way("torch DDP, fp32", 4, 128),
    "allreduce": Way("thinwire all-reduce, fp32", 4, 128),
    "onebyte": Way("thinwire onebyte", 4, 128),
    "onebyte-more": Way("thinwire onebyte", 8, 256),
}


def main() -> None:
    parser = arguments(str(__doc__).splitlines()[0])
    parser.set_defaults(device="cpu", repeats=20)
    parser.add_argument("--worker", choices=WAYS, help="what a rank does (used by the script itself)")
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.repeats)
        return
    found = {way: measure_way(way, options.repeats) for way in WAYS}
    payload = found["allreduce"]["payload_bytes"]
    rows: list[Row] = [
        {
            "way": WAYS[way].label,
            "tokens": f"{WAYS[way].sequences} x {WAYS[way].tokens}",
            "payload_bytes": int(row["payload_bytes"] or payload),
            "fewer": payload / (row["payload_bytes"] or payload),
            "interface_bytes": int(row["interface_bytes"]),
            "fewer_there": found["ddp"]["interface_bytes"] / row["interface_bytes"],
            "step_s": row["step_s"],
            "weights_share": f"{row['weights_share']:.1%}" if way.startswith("onebyte") else "-",
        }
        for way, row in found.items()
    ]
    report(str(__doc__).splitlines()[0], rows, device=torch.device("cpu"), path=options.json)


def measure_way(way: str, repeats: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--worker", way, "--repeats", str(repeats)]
    with tempfile.TemporaryDirectory() as folder, Lab(hosts=HOSTS, rate_bps=RATE_BPS) as lab:
        log = Path(folder) / "log"
        with log.open("w") as file:
            code = lab.start(command, {**os.environ, "OMP_NUM_THREADS": "1"}, stdout=file).wait(900)
        assert code == 0, f"{way} failed with exit code {code}"
        measured: dict[str, float] = json.loads(log.read_text())
        return measured


def work(way: str, repeats: int) -> None:
    with thinwire.init(WorldSettings(threads=1, device="cpu")) as world:
        with torch.device("meta"):
            model = GPT(GPTSettings(layers=4, heads=8, width=256, context=CONTEXT), VOCABULARY)
        model.to_empty(device="cpu")
        model.initialise(0)
        chance = torch.Generator().manual_seed(world.rank)
        tokens = torch.randint(VOCABULARY, (WAYS[way].sequences, WAYS[way].tokens + 1), generator=chance)

        def loss_of(network: Callable[[Tensor], Tensor]) -> Tensor:
            return F.cross_entropy(network(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

        in_weights: list[float] = []
        if way.startswith("onebyte"):
            step = onebyte_step(model, world, loss_of, in_weights)
        else:
            step = ddp_step(way, model, world, loss_of)
        for _ in range(3):
            step()
        in_weights.clear()
        payload, frames, seconds = sum(world.meter.sent_bytes().values()), [], []
        for _ in range(repeats):
            dist.barrier(world.group)
            before, began = interface_bytes(), time.perf_counter()
            step()
            seconds.append(time.perf_counter() - began)
            after = interface_bytes()
            assert before is not None
            assert after is not None
            frames.append(after.tx_bytes - before.tx_bytes)
        if world.rank == 0:
            found = {
                "payload_bytes": (sum(world.meter.sent_bytes().values()) - payload) / repeats,
                "interface_bytes": statistics.mean(frames),
                "step_s": statistics.median(seconds),
                "weights_share": sum(in_weights) / sum(seconds),
            }
            print(json.dumps(found))


def ddp_step(
    way: str, model: GPT, world: World, loss_of: Callable[[Callable[[Tensor], Tensor]], Tensor]
) -> Callable[[], None]:
    ddp = DistributedDataParallel(model, process_group=world.group, bucket_cap_mb=4, gradient_as_bucket_view=True)
    if way == "allreduce":
        thinwire.allreduce(ddp, dtype="fp32", queue=world.queue)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        loss_of(ddp).backward()
        optimizer.step()

    return step


def onebyte_step(
    model: GPT, world: World, loss_of: Callable[[Callable[[Tensor], Tensor]], Tensor], in_weights: list[float]
) -> Callable[[], None]:
    """Also notes the seconds that go into the weights: changing them is all that the replica does."""
    optimizer = thinwire.OneByteSPSA(model.named_parameters(), lr=1e-6, model=model, queue=world.queue)
    replica, inside = optimizer.replica, [False]

    def timed(change: Callable[..., None]) -> Callable[..., None]:
        def run(*arguments: object) -> None:
            if inside[0]:  # a change that is a part of another
                change(*arguments)
                return
            inside[0], began = True, time.perf_counter()
            change(*arguments)
            inside[0] = False
            in_weights.append(time.perf_counter() - began)

        return run

    for name in ("perturb", "restore", "carry_out"):
        setattr(replica, name, timed(getattr(replica, name)))

    def step() -> None:
        optimizer.step(lambda: loss_of(model))

    return step


if __name__ == "__main__":
    main()
