"""One host of benchmarks/gossip_straggler.py: a plain PyTorch loop that trains in one of three ways.

    python benchmarks/gossip_straggler_host.py FOLDER SETTINGS(JSON)

Writes what it holds to FOLDER every few steps, with the time, so that the average of all hosts can be scored later
without anybody waiting for it now.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import thinwire as tw
from thinwire.dist.config import RunConfig, load_config
from thinwire.dist.data import Data, shard
from thinwire.dist.models import build_model
from thinwire.dist.optimizers import build_optimizer, learning_rate

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "gpt_0.8m.yaml"
OVERRIDES = ("world.threads=1", "data.cache=/nowhere")


def build(steps: int, batch: int) -> tuple[RunConfig, Data, torch.nn.Module]:
    config = load_config(CONFIG, [*OVERRIDES, f"train.steps={steps}", f"train.global_batch={batch}"])
    data = Data(config.data, context=config.model.context, seed=config.seed)
    model = build_model(
        config.model, tokenizer_vocab=data.tokenizer.vocab, seed=config.seed, device=torch.device("cpu")
    )
    return config, data, model


def main() -> None:
    folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    steps, hosts = settings["steps"], settings["hosts"]
    config, data, model = build(steps, settings["batch"] * hosts)
    world = tw.init(config.world)
    optimizer = build_optimizer(config.optimizer, model)
    network, method = enter(settings, model, optimizer, world)
    factor = settings["slow_factor"] if world.rank == settings["slow"] else 1.0
    step_s = settings["step_s"] * factor
    keep_every = max(1, round(settings["keep_every"] / factor))  # as often by the clock
    began = time.monotonic()
    done, took_s = 0, []
    while done < min(steps, settings["stop_after"]) and not (method and method.ended):
        step_began = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optimizer.lr, config.schedule, done, steps)
        samples = shard(done, config.train.global_batch, world.rank, world.size)
        batch = data.training_batch(samples, world.device)
        F.cross_entropy(network(batch.inputs).flatten(0, 1), batch.targets.flatten()).backward()
        # What is left of a step of this host is slept: whatever was sent during backward is hidden by it.
        time.sleep(max(0.0, step_began + step_s - time.monotonic()))
        optimizer.step()
        optimizer.zero_grad()
        done += 1
        took_s.append(time.monotonic() - step_began)
        if done % keep_every == 0 and (method or world.rank == 0):
            flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
            np.save(folder / f"{world.rank}-{done}-{time.monotonic() - began:.3f}.tmp.npy", flat.numpy())
            written = next(folder.glob(f"{world.rank}-{done}-*.tmp.npy"))
            written.rename(written.with_name(written.name.replace(".tmp", "")))
    (folder / f"end-{world.rank}.json").write_text(json.dumps({"steps": done, "step_s": took_s}))
    if method is not None:
        method.remove()
    world.close()


def enter(settings: dict[str, Any], model: torch.nn.Module, optimizer: torch.optim.Optimizer, world: Any) -> Any:
    if settings["way"] == "ddp":
        return DistributedDataParallel(model, process_group=world.group, gradient_as_bucket_view=True), None
    options = {"queue": world.queue, "steps": settings["steps"], "deadline_s": 600.0, "probes": 0}
    return model, tw.gossip(optimizer, model=model, **options, **settings["gossip"])


if __name__ == "__main__":
    main()
