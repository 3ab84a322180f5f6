"""One rank of a peer's training run, for benchmarks/training.py: torch's own ways to train over a slow link.

    python benchmarks/peers.py PEER FOLDER CONFIG [key.path=value ...]

The same model, data, optimizer, schedule, clipping, evaluation, launcher and transport as `thinwire train` has; only
the communication is the peer's. Writes metrics.jsonl like a run of ours, with what the interface counted.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook, fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import thinwire
from thinwire.comm.allreduce import AllReduceSettings
from thinwire.dist.config import RunConfig, load_config
from thinwire.dist.data import Data, shard
from thinwire.dist.evaluate import evaluate
from thinwire.dist.models import build_model
from thinwire.dist.optimizers import build_optimizer, learning_rate
from thinwire.dist.world import World

DILOCO_EVERY, DILOCO_LR, DILOCO_MOMENTUM = 10, 0.7, 0.9
POWER_SGD_RANK = 16


class DiLoCo:
    """Plain DiLoCo (Douillard et al. 2023, 2311.08105): H local steps, fp32 mean of the differences, outer Nesterov."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = list(model.parameters())
        self.start = [p.detach().clone() for p in self.parameters]
        self.outer = torch.optim.SGD(self.start, lr=DILOCO_LR, momentum=DILOCO_MOMENTUM, nesterov=True)

    @torch.no_grad()
    def synchronise(self) -> None:
        flat = torch.cat([(s - p).flatten() for s, p in zip(self.start, self.parameters, strict=True)])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for start, delta in zip(self.start, flat.split([p.numel() for p in self.parameters]), strict=True):
            start.grad = delta.view_as(start)
        self.outer.step()
        for parameter, start in zip(self.parameters, self.start, strict=True):
            parameter.copy_(start)


def enter(peer: str, model: nn.Module, config: RunConfig, world: World) -> tuple[nn.Module, Callable[[int], None]]:
    """The model to train, and what to do after each optimizer step."""
    if peer == "diloco":
        method = DiLoCo(model)

        def after(step: int) -> None:
            if step % DILOCO_EVERY == 0 or step == config.train.steps:
                method.synchronise()

        return model, after
    # The PowerSGD hook fails on gloo with more than one bucket.
    bucket_mb = 1e6 if peer == "powersgd" else config.engine.bucket_mb
    ddp = DistributedDataParallel(
        model, process_group=world.group, bucket_cap_mb=bucket_mb, gradient_as_bucket_view=True
    )
    if peer == "ddp-bf16":
        ddp.register_comm_hook(world.group, bf16_compress_hook)
    elif peer == "ddp-fp16":
        ddp.register_comm_hook(world.group, fp16_compress_hook)
    elif peer == "powersgd":
        # 2 is the earliest that the hook allows, with error feedback and warm start as by default.
        ddp.register_comm_hook(
            PowerSGDState(world.group, matrix_approximation_rank=POWER_SGD_RANK, start_powerSGD_iter=2), powerSGD_hook
        )
    else:
        assert peer == "ddp-fp32", peer
    return ddp, lambda step: None


def main() -> None:
    peer, folder, path, *overrides = sys.argv[1:]
    config = load_config(Path(path), overrides)
    assert isinstance(config.method, AllReduceSettings), "a peer brings its own method"
    world = thinwire.init(config.world)
    data = Data(config.data, context=config.model.context, seed=config.seed)
    model = build_model(config.model, tokenizer_vocab=data.tokenizer.vocab, seed=config.seed, device=world.device)
    optimizer = build_optimizer(config.optimizer, model)
    wrapped, after_step = enter(peer, model, config, world)
    records = train(config, world, data, model, wrapped, optimizer, after_step)
    if world.rank == 0:
        lines = "".join(json.dumps(record) + "\n" for record in records)
        Path(folder, "metrics.jsonl").write_text(lines)
    world.close()


def train(
    config: RunConfig,
    world: World,
    data: Data,
    model: nn.Module,
    wrapped: nn.Module,
    optimizer: torch.optim.Optimizer,
    after_step: Callable[[int], None],
) -> list[dict[str, Any]]:
    steps, batch = config.train.steps, config.train.global_batch
    records: list[dict[str, Any]] = []
    for step in range(steps):
        sent_before = interface_sent_bytes(world)
        began = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optimizer.lr, config.schedule, step, steps)
        part = data.training_batch(shard(step, batch, world.rank, world.size), world.device)
        loss = F.cross_entropy(wrapped(part.inputs).flatten(0, 1), part.targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        after_step(step + 1)
        record = {"step": step + 1, "loss": float(loss.detach()), "step_s": time.monotonic() - began}
        record["interface_sent_bytes"] = interface_sent_bytes(world) - sent_before
        if config.train.eval_windows and ((step + 1) % config.train.eval_every == 0 or step + 1 == steps):
            result = evaluate(
                model,
                data.validation,
                count=int(config.train.eval_windows),
                batch=config.train.eval_batch,
                queue=world.queue,
                device=world.device,
                precision=nullcontext(),
            )
            record["val_loss"] = result.loss
        records.append(record)
    return records


def interface_sent_bytes(world: World) -> int:
    counters = psutil.net_io_counters(pernic=True, nowrap=False)
    return counters[world.interface.name].bytes_sent


if __name__ == "__main__":
    main()
