"""Claim: DDP through thinwire's CommQueue is as fast as through torch's own all-reduce on an unlimited loopback.

    python benchmarks/queue_overhead.py [--ranks 2] [--config configs/gpt_3m.yaml] [--json FILE]

Starts its ranks itself, with torchrun. Times forward and backward of one GPT, wrapped three times: with torch's own
all-reduce, with torch's fp16 hook, and with thinwire's methods. All in turns in one run, so that they share whatever
else the machine does.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from runner import arguments, measure, report
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

import thinwire
from thinwire.dist.config import load_config
from thinwire.dist.engine.ddp import wrap_ddp
from thinwire.dist.models import build_model
from thinwire.dist.world import WorldSettings

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "gpt_3m.yaml"


def main() -> None:
    parser = arguments(str(__doc__).splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2, help="processes on this machine")
    parser.add_argument("--config", type=Path, default=CONFIG, help="whose model and buckets")
    parser.add_argument("--sequences", type=int, default=8, help="batch of one rank")
    parser.set_defaults(threads=1)
    options = parser.parse_args()
    if "RANK" not in os.environ:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.ranks}"]
        os.execv(sys.executable, [sys.executable, *launcher, __file__, *sys.argv[1:]])

    config = load_config(options.config, [])
    world = thinwire.init(WorldSettings(threads=options.threads, device=options.device))
    tokens = torch.randint(256, (options.sequences, config.model.context + 1), device=world.device)

    def wrapped(enter: Callable[[DistributedDataParallel], object]) -> Callable[[], None]:
        model = build_model(config.model, tokenizer_vocab=256, seed=0, device=world.device)
        ddp = wrap_ddp(model, config.engine, world.group)
        enter(ddp)

        def step() -> None:
            logits = ddp(tokens[:, :-1])
            F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()

        return step

    works = {
        "torch all-reduce fp32": wrapped(lambda ddp: None),
        "thinwire all-reduce fp32": wrapped(lambda ddp: thinwire.allreduce(ddp, dtype="fp32", queue=world.queue)),
        "torch fp16 hook": wrapped(lambda ddp: ddp.register_comm_hook(world.group, fp16_compress_hook)),
        "thinwire all-reduce fp16": wrapped(lambda ddp: thinwire.allreduce(ddp, dtype="fp16", queue=world.queue)),
    }
    together = {name: _after_barrier(work, world.group) for name, work in works.items()}
    timings = measure(together, device=world.device, repeats=options.repeats)
    if world.rank == 0:
        first = next(iter(timings.values()))
        rows = [
            {
                "method": name,
                "ranks": world.size,
                "step median ms": 1e3 * timing.median_s,
                "fastest ms": 1e3 * timing.fastest_s,
                "ratio of medians": timing.median_s / first.median_s,
                "ratio of fastest": timing.fastest_s / first.fastest_s,
            }
            for name, timing in timings.items()
        ]
        report(str(__doc__).splitlines()[0], rows, device=world.device, path=options.json)
    world.close()


def _after_barrier(work: Callable[[], None], group: dist.ProcessGroup) -> Callable[[], None]:
    def together() -> None:
        dist.barrier(group)
        work()

    return together


if __name__ == "__main__":
    main()
