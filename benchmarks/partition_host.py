"""One rank of the partition benchmarks: a plain PyTorch loop over a GPT that is sharded in one of several ways.

    python benchmarks/partition_host.py FOLDER SETTINGS(JSON)

Writes FOLDER/RANK.json: seconds, losses and the bytes of the interface for each step; for thinwire's ways also what the
meter counted and what was predicted. The text is random: what is learned does not matter, but the losses of all ways
must be the same.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

import thinwire as tw
from thinwire.comm.partition.blocks import find_blocks
from thinwire.comm.partition.door import enter
from thinwire.comm.partition.peak_memory import PeakMemory
from thinwire.comm.partition.settings import PartitionSettings
from thinwire.dist.mesh import MeshSettings
from thinwire.dist.models import build_model
from thinwire.dist.models.gpt import GPTSettings
from thinwire.dist.world import World, WorldSettings
from thinwire.launch.lab.counters import interface_bytes

VOCAB = 256
LR = 1e-3
CPU = torch.device("cpu")


class Way(ABC):
    """How to train: one micro-batch backward, then one step. `handle` is thinwire's."""

    handle: Any = None

    def __init__(self, model: nn.Module, micro_batches: int) -> None:
        self.model = model
        self.micro_batches = micro_batches

    @abstractmethod
    def backward(self, loss: Tensor, *, is_last: bool) -> None: ...

    @abstractmethod
    def step(self) -> None: ...


class Alone(Way):
    """Every rank trains a model of its own: what computing takes while all of them compute."""

    def __init__(self, model: nn.Module, settings: dict[str, Any]) -> None:
        super().__init__(model, settings["micro_batches"])
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        loss.backward()

    def step(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad()


class Partition(Way):
    """thinwire's own; what crosses the slow links once per step overlaps with the last backward."""

    def __init__(self, model: nn.Module, world: World, settings: dict[str, Any]) -> None:
        super().__init__(model, settings["micro_batches"])
        own = PartitionSettings.model_validate(settings["partition"])
        self.handle = enter(
            model,
            world.mesh,
            torch.optim.AdamW,
            own,
            micro_batches=self.micro_batches,
            queue=world.queue,
            timeout_s=settings["timeout_s"],
            compute_dtype=torch.bfloat16 if settings["bf16"] else None,
            lr=LR,
            fused=True,
        )

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_all_reduce(is_last)
        loss.backward()

    def step(self) -> None:
        self.handle.step()


class FSDP2(Way):
    """torch's fully_shard on all ranks, or on each host with replicas between hosts (HSDP), as its manual has it.

    HSDP sums inside the host for every micro-batch, and between hosts in the last.
    """

    def __init__(self, model: nn.Module, mesh: DeviceMesh, settings: dict[str, Any]) -> None:
        super().__init__(model, settings["micro_batches"])
        dtype = torch.bfloat16 if settings["bf16"] else None
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype)
        for module in [*find_blocks(model), model]:
            fully_shard(module, mesh=mesh, mp_policy=policy)
        self._is_hybrid = mesh.ndim == 2
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        assert isinstance(self.model, FSDPModule)
        if self._is_hybrid:
            self.model.set_requires_all_reduce(is_last)
        loss.backward()

    def step(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad()


class DeepSpeed(Way):
    """DeepSpeed's ZeRO-3 with its defaults."""

    def __init__(self, model: nn.Module, settings: dict[str, Any]) -> None:
        super().__init__(model, settings["micro_batches"])
        os.environ["DS_ACCELERATOR"] = "cpu"
        warnings.filterwarnings("ignore", message=".*is deprecated")  # what it calls in torch
        import deepspeed

        options = {"lr": LR, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2, "torch_adam": True}
        self._engine, *_ = deepspeed.initialize(
            model=model,
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": settings["batch"],
                "gradient_accumulation_steps": self.micro_batches,
                "optimizer": {"type": "AdamW", "params": options},
                "zero_optimization": {"stage": 3},
                "bf16": {"enabled": settings["bf16"]},
            },
        )
        self.model = self._engine

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        self._engine.backward(loss * self.micro_batches)  # it divides
        self._engine.step()  # does nothing but in the last micro-batch

    def step(self) -> None:
        pass


def main() -> None:
    folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    levels = [{"name": name, "size": size} for name, size in settings["levels"]]
    mesh = MeshSettings.model_validate({"levels": levels})
    world = tw.init(WorldSettings(threads=1, timeout_s=settings["timeout_s"]), mesh)
    shape = GPTSettings.model_validate(settings["model"])
    model = build_model(shape, tokenizer_vocab=VOCAB, seed=0, device=CPU)
    peak = PeakMemory(CPU)  # the whole model is there already
    way = enter_way(model, world, settings)
    told = train(way, world, settings, shape.context)
    if way.handle is not None:
        told["predicted"] = way.handle.predicted_bytes()
        told["memory"] = {"predicted": way.handle.predicted_memory(), "measured": way.handle.measured_memory()}
    told["rss_growth_bytes"] = peak.peak_bytes() - peak.at_start_bytes
    (folder / f"{world.rank}.json").write_text(json.dumps(told))
    if way.handle is not None:
        way.handle.remove()
    del model, way
    gc.collect()
    dist.barrier()
    world.close()


def enter_way(model: nn.Module, world: World, settings: dict[str, Any]) -> Way:
    name = settings["way"]
    if name == "partition":
        return Partition(model, world, settings)
    if name == "deepspeed":
        return DeepSpeed(model, settings)
    if name == "alone":
        return Alone(model, settings)
    per_host = settings["ranks_per_host"]
    if name == "fsdp2":
        return FSDP2(model, init_device_mesh("cpu", (world.size,), mesh_dim_names=("world",)), settings)
    assert name == "hsdp", name
    dims = ("world", "node")
    return FSDP2(model, init_device_mesh("cpu", (world.size // per_host, per_host), mesh_dim_names=dims), settings)


def train(way: Way, world: World, settings: dict[str, Any], context: int) -> dict[str, Any]:
    """Steps, each begun together."""
    draw = torch.Generator().manual_seed(1000 + world.rank)
    told: dict[str, Any] = {"step_s": [], "losses": [], "interface_sent_bytes": [], "meter": []}
    for _ in range(settings["steps"]):
        dist.barrier()
        sent, metered = interface_sent(), world.meter.sent_bytes("partition/")
        began = time.monotonic()
        total = 0.0
        for micro in range(way.micro_batches):
            tokens = torch.randint(VOCAB, (settings["batch"], context + 1), generator=draw)
            scores = way.model(tokens[:, :-1]).flatten(0, 1)
            loss = F.cross_entropy(scores.float(), tokens[:, 1:].flatten()) / way.micro_batches
            way.backward(loss, is_last=micro + 1 == way.micro_batches)
            total += float(loss.detach())
        way.step()
        told["step_s"].append(time.monotonic() - began)
        told["losses"].append(total)
        dist.barrier()
        told["interface_sent_bytes"].append(interface_sent() - sent)
        now = world.meter.sent_bytes("partition/")
        told["meter"].append({level: count - metered.get(level, 0) for level, count in now.items()})
    return told


def interface_sent() -> int:
    """Of this host, so of all its ranks: 0 outside the lab."""
    counted = interface_bytes()
    return counted.tx_bytes if counted else 0


if __name__ == "__main__":
    main()
