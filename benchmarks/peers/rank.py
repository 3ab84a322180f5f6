"""One rank of a peer's training run, for the benchmarks that compare: started by lab_runs.py in the folder above.

    python -m peers.rank PEER FOLDER CONFIG [key.path=value ...]

The same model, data, optimizer, schedule, clipping and evaluation as `thinwire train` has; only the communication is
the peer's. Rank 0 writes metrics.jsonl like a run of ours, with what the interface of its host counted.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

import thinwire
from peers.peer import Job, Peer
from thinwire.comm.allreduce import AllReduceSettings
from thinwire.dist.config import load_config
from thinwire.dist.data import Data, shard
from thinwire.dist.evaluate import evaluate, evaluate_alone
from thinwire.dist.optimizers import learning_rate
from thinwire.dist.world import World
from thinwire.launch.lab.counters import interface_bytes
from thinwire.launch.lab.spec import address

CPU = torch.device("cpu")
NAMES = (
    "alone",
    "ddp-fp32",
    "ddp-bf16",
    "ddp-fp16",
    "powersgd",
    "post-local-sgd",
    "diloco",
    "fsdp2",
    "hsdp",
    *(f"zero-{stage}" for stage in range(4)),
    "torchft-ddp",
    "torchft-local-sgd",
    "torchft-diloco",
    "hivemind",
)


def main() -> None:
    peer, folder, path, *overrides = sys.argv[1:]
    config = load_config(Path(path), overrides)
    assert isinstance(config.method, AllReduceSettings), "a peer brings its own method"
    local_size = int(os.environ["LOCAL_WORLD_SIZE"])
    rank = int(os.environ["RANK"])
    job = Job(
        config=config,
        folder=Path(folder),
        rank=rank,
        size=int(os.environ["WORLD_SIZE"]),
        local_size=local_size,
        address=address(rank // local_size),
        head=address(0),
        data=Data(config.data, context=config.model.context, seed=config.seed),
    )
    if peer == "hivemind":  # it forks, which must come before threads and groups; and it needs no other meeting place
        from peers.hivemind_way import Hivemind

        torch.set_num_threads(int(config.world.threads))
        train(job, Hivemind(job), lambda trained: _score_alone(job, trained))
        return
    world = thinwire.init(config.world)
    trained = enter(peer, job, world)
    train(job, trained, lambda trained: _score(job, trained, world))
    trained.close()
    del trained
    world.close()


def enter(peer: str, job: Job, world: World) -> Peer:
    if peer.startswith("torchft-"):
        from peers import torchft_ways

        found: dict[str, Callable[[Job, World], Peer]] = {
            "torchft-ddp": torchft_ways.ddp,
            "torchft-local-sgd": torchft_ways.local_sgd,
            "torchft-diloco": torchft_ways.diloco,
        }
    elif peer.startswith("zero-"):
        from peers import deepspeed_ways

        found = {peer: partial(deepspeed_ways.zero, stage=int(peer.removeprefix("zero-")))}
    else:
        from peers import torch_ways

        found = {
            "alone": torch_ways.alone,
            "ddp-fp32": torch_ways.ddp,
            "ddp-bf16": partial(torch_ways.ddp, hook="bf16"),
            "ddp-fp16": partial(torch_ways.ddp, hook="fp16"),
            "powersgd": partial(torch_ways.ddp, hook="powersgd"),
            "post-local-sgd": torch_ways.post_local_sgd,
            "diloco": torch_ways.diloco,
            "fsdp2": torch_ways.fsdp2,
            "hsdp": torch_ways.hsdp,
        }
    return found[peer](job, world)


def train(job: Job, peer: Peer, score: Callable[[Peer], float]) -> None:
    """All steps; each record is on disk when its step has ended."""
    config = job.config
    settings, steps = config.train, config.train.steps
    with open(job.folder / "metrics.jsonl" if job.rank == 0 else os.devnull, "w") as file:
        for step in range(steps):
            sent_before = sent_bytes()
            began = time.monotonic()
            lr = learning_rate(config.optimizer.lr, config.schedule, step, steps)
            batch = job.data.training_batch(shard(step, settings.global_batch, job.rank, job.size), CPU)
            loss = peer.step(batch, lr)
            record: dict[str, Any] = {"step": step + 1, "loss": loss, "step_s": time.monotonic() - began}
            record["interface_sent_bytes"] = sent_bytes() - sent_before
            if settings.eval_windows and ((step + 1) % settings.eval_every == 0 or step + 1 == steps):
                record["val_loss"] = score(peer)
            file.write(json.dumps(record) + "\n")
            file.flush()


def sent_bytes() -> int:
    """By this host, all of its ranks: 0 outside the lab."""
    counted = interface_bytes()
    return counted.tx_bytes if counted else 0


def _score(job: Job, peer: Peer, world: World) -> float:
    settings = job.config.train
    return evaluate(
        peer.network,
        job.data.validation,
        count=int(settings.eval_windows),
        batch=settings.eval_batch,
        queue=world.queue,
        device=CPU,
        precision=nullcontext(),
        forward_is_collective=peer.forward_is_collective,
    ).loss


def _score_alone(job: Job, peer: Peer) -> float:
    """By rank 0; the others go on, and wait for it in their next step."""
    settings = job.config.train
    if job.rank:
        return 0.0
    return evaluate_alone(
        peer.network,
        job.data.validation,
        count=int(settings.eval_windows),
        batch=settings.eval_batch,
        device=CPU,
        precision=nullcontext(),
    ).loss


if __name__ == "__main__":
    main()
