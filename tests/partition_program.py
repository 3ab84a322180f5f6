"""Eight ranks on a machine of 2 x 2 x 2, as processes: every legal triple, beside DDP and torch's own sharding.

    python partition_program.py FOLDER

Processes, because most of the work is FSDP2's and DTensor's Python. Each writes to FOLDER/RANK.json, for every way to
train: the loss of each step, a digest of its weights, and what it has sent and what was predicted.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from forked_ranks import fork_ranks
from given_up_groups import forget_meshes
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch_threads import TorchRank

from thinwire.comm.partition.door import partition
from thinwire.comm.partition.levels import build_levels
from thinwire.comm.partition.settings import PartitionSettings
from thinwire.comm.partition.traffic import predict_flows, unit_shapes
from thinwire.comm.queue import CommQueue

NAMES, FANOUTS = ("pair", "node", "world"), (2, 2, 2)
WIDER = ("rank", *NAMES)
SIZES, RANKS = (2, 4, 8), 8
MICRO_BATCHES, STEPS = 2, 3
TRIPLES = [(p, g, o) for p in range(4) for g in range(p, 4) for o in range(g, 4)]
CLIP = 0.3
MAKERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.5, foreach=True),
    "adamw": partial(torch.optim.AdamW, lr=0.01, fused=True),
}


class Net(nn.Module):
    """A root around one block.

    even: everything divides by 8, and what replicas of an owner share divides by 256. Otherwise no row count does, and
    some ranks own nothing of some parameters.
    """

    def __init__(self, *, even: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        outer, inner, bias = (128, 32, False) if even else (11, 7, True)
        self.first = nn.Linear(16, outer, bias=bias)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(outer, inner, bias=bias), nn.Tanh())])
        self.last = nn.Linear(inner, 64 if even else 16, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        found: Tensor = 4 * self.last(x)  # so that gradients are clipped
        return found


def batch(rank: int, step: int, micro_batch: int) -> Tensor:
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(1000 * step + 100 * micro_batch + rank))


def losses_of(
    rank: int, model: nn.Module, step: Callable[[], object], contexts: Callable[[int, int], Any] | None = None
) -> Iterator[float]:
    """Train; yields this rank's loss after every step."""
    for number in range(STEPS):
        total = 0.0
        for micro_batch in range(MICRO_BATCHES):
            with contexts(number, micro_batch) if contexts else nullcontext():
                loss = model(batch(rank, number, micro_batch)).square().mean() / MICRO_BATCHES
                loss.backward()
            total += float(loss)
        step()
        yield total


def clip_and_step(model: nn.Module, optimizer: Optimizer, norms: list[float]) -> None:
    norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
    optimizer.step()
    optimizer.zero_grad()


def train_ddp(rank: TorchRank, name: str, *, even: bool) -> dict[str, Any]:
    model = DistributedDataParallel(Net(even=even))
    optimizer = MAKERS[name](model.parameters())

    def contexts(_: int, micro_batch: int) -> Any:
        return nullcontext() if micro_batch == MICRO_BATCHES - 1 else model.no_sync()

    norms: list[float] = []
    step = partial(clip_and_step, model, optimizer, norms)
    return {"losses": list(losses_of(rank.rank, model, step, contexts)), "norm": min(norms)}


def train_torch(rank: TorchRank, shape: tuple[int, ...], *, even: bool) -> dict[str, Any]:
    """torch's own full sharding, or, on two dimensions, its hybrid sharding."""
    model = Net(even=even)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh)
    optimizer = MAKERS["sgd"](model.parameters())
    return {"losses": list(losses_of(rank.rank, model, partial(clip_and_step, model, optimizer, [])))}


def train_partitioned(
    rank: TorchRank,
    queue: CommQueue,
    mesh: DeviceMesh,
    triple: tuple[int, int, int],
    name: str,
    *,
    even: bool,
    secondary: int | None,
) -> dict[str, Any]:
    params, grads, optim = (WIDER[depth] for depth in triple)
    kept = None if secondary is None else WIDER[secondary]
    settings = PartitionSettings(params=params, grads=grads, optim=optim, secondary=kept)
    model = Net(even=even)
    flows = predict_flows(unit_shapes(model, list(model.blocks)), rank.levels, settings, micro_batches=MICRO_BATCHES)
    optimizer = partition(
        model,
        mesh,
        MAKERS[name],
        params=params,
        grads=grads,
        optim=optim,
        secondary=kept,
        clip_norm=CLIP,
        micro_batches=MICRO_BATCHES,
        queue=queue,
    )

    def contexts(step: int, micro_batch: int) -> Any:
        """In the second step, what goes beyond grads is sent while backward runs."""
        assert isinstance(model, FSDPModule)
        model.set_requires_all_reduce(step == 1 and micro_batch == MICRO_BATCHES - 1)
        return nullcontext()

    sent = []
    before = operations(queue)
    losses = []
    for loss in losses_of(rank.rank, model, optimizer.step, contexts):
        losses.append(loss)
        after = operations(queue)
        sent.append(difference(after, before))
        before = after
    predicted: dict[str, dict[str, int]] = {}
    for flow in flows:
        predicted.setdefault(flow.operation, {})[flow.level] = flow.payload_bytes
    shards = [cast(DTensor, p).to_local().detach().numpy().tobytes() for p in model.parameters()]
    found = {
        "losses": losses,
        "weights": zlib.crc32(b"".join(shards)),
        "number": rank.levels.number(rank.rank, triple[0]),
        "sent": sent,
        "predicted": predicted,
        "predicted_bytes": optimizer.predicted_bytes(),
    }
    optimizer.remove()
    return found


def operations(queue: CommQueue) -> dict[str, dict[str, int]]:
    """Bytes sent so far by partition's operations, by their short name and level."""
    return {
        name.removeprefix("partition/"): {level: entry["sent_bytes"] for level, entry in levels.items()}
        for name, levels in queue.meter.snapshot()["operations"].items()
        if not name.startswith("control/")
    }


def difference(after: dict[str, dict[str, int]], before: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    found = {
        name: {level: count - before.get(name, {}).get(level, 0) for level, count in levels.items()}
        for name, levels in after.items()
    }
    found = {name: {level: count for level, count in levels.items() if count} for name, levels in found.items()}
    return {name: levels for name, levels in found.items() if levels}


def secondary_of(triple: tuple[int, int, int]) -> int | None:
    """Of the runs with AdamW: the widest copy that there can be."""
    return triple[0] - 1 if triple[0] else None


def yardsticks(rank: TorchRank) -> dict[str, Any]:
    """What torch does."""
    return {
        "ddp/sgd": train_ddp(rank, "sgd", even=False),
        "ddp/adamw": train_ddp(rank, "adamw", even=True),
        "torch/fsdp": train_torch(rank, (8,), even=False),
        "torch/hsdp": train_torch(rank, (2, 4), even=False),
    }


def train_triple(rank: TorchRank, triple: tuple[int, int, int]) -> dict[str, Any]:
    """What one triple does."""
    queue = rank.queue(timeout_s=60.0)
    mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("world", "node", "pair"))
    key, secondary = "".join(str(depth) for depth in triple), secondary_of(triple)
    found = {
        f"{key}/sgd": train_partitioned(rank, queue, mesh, triple, "sgd", even=False, secondary=None),
        f"{key}/adamw": train_partitioned(rank, queue, mesh, triple, "adamw", even=True, secondary=secondary),
    }
    queue.close()
    for monitor in rank.monitors:
        monitor.close()
    return found


def run_rank(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=120)
    store = dist.TCPStore("127.0.0.1", port, timeout=timeout)
    levels = build_levels(NAMES, SIZES, range(RANKS), rank=rank)
    found: dict[str, Any] = {}
    for number, work in enumerate([yardsticks, *(partial(train_triple, triple=triple) for triple in TRIPLES)]):
        # Groups of their own, that end with them: each has a thread that wakes up a hundred times a second.
        own = dist.PrefixStore(str(number), store)
        dist.init_process_group("gloo", store=own, rank=rank, world_size=RANKS, timeout=timeout)
        found |= work(TorchRank(rank, RANKS, own, levels))
        dist.barrier()
        forget_meshes()
        dist.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    given = Path(sys.argv[1])
    sys.exit(any(fork_ranks(RANKS, lambda rank, port: run_rank(rank, port, given))))
