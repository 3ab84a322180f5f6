"""The methods of the contract table: how each enters a training run, and what it promises.

`enter(rank, queue, model)` returns the run: `step(x)` trains one step on this rank's batch x (inputs of shape
(batch, WIDTH)) of contract_run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar, cast

import torch
from contract_run import Run, ShardedRun
from ranks import Rank, run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch_threads import TorchRank, run_torch_ranks

from thinwire.comm.allreduce import allreduce
from thinwire.comm.balance.balance import LoadBalance
from thinwire.comm.compress.door import compress
from thinwire.comm.gossip.door import gossip
from thinwire.comm.local_sgd.door import local_sgd
from thinwire.comm.method import Method
from thinwire.comm.onebyte.optimizer import OneByteSPSA
from thinwire.comm.partition.door import partition
from thinwire.comm.queue import CommQueue

T = TypeVar("T")
Enter: TypeAlias = Callable[[Any, CommQueue, nn.Module], Run]


@dataclass(frozen=True)
class Row:
    """One method with its settings.

    lossless: with one rank, or with the same batch on all ranks, it does exactly what one machine alone would do.
    close: otherwise it does nearly that; if not, so much is left for later steps that all we ask of it is to descend.
    all_of_torch: its ranks need default groups, meshes and DTensors, and its levels are groups of equal size.
    cannot, why: entering with these settings, or with a model in fp64, is refused with an error that says this.
    """

    name: str
    enter: Enter
    lossless: bool
    close: bool = True
    all_of_torch: bool = False
    cannot: Enter | None = None
    why: str = "float64"

    def run(self, size: int, work: Callable[[Any], T]) -> list[T]:
        """Run `work` on so many ranks, and return what each returned."""
        if not self.all_of_torch:
            return run_ranks(size, work)
        return run_torch_ranks((2, 4) if size == 4 else (size,), work)

    def queue(self, rank: Any, levels: list[str]) -> CommQueue:
        """A queue whose meter knows these levels of the peers, or those of the method's own."""
        found: CommQueue = rank.queue() if self.all_of_torch else rank.queue(levels=levels)
        return found

    def __str__(self) -> str:
        return self.name


def enter_allreduce(dtype: str, *, inner: Any = None) -> Enter:
    """inner: for each size of the world, its groups that average exactly."""

    def enter(rank: Rank, queue: CommQueue, model: nn.Module) -> Run:
        ddp = DistributedDataParallel(model, process_group=rank.group, init_sync=False, gradient_as_bucket_view=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.125, momentum=0.5)
        method = allreduce(ddp, dtype=dtype, exact_within=inner[rank.size] if inner else None, queue=queue)

        def step(x: Tensor) -> None:
            optimizer.zero_grad()
            ddp(x).square().sum().backward()
            optimizer.step()

        return Run(model, optimizer, method, step)

    return enter


def enter_compress(
    compressor: Any, feedback: Any, *, momentum: float = 0.5, inner: Any = None, **options: Any
) -> Enter:
    """inner: for each size of the world, its groups that average exactly."""

    def enter(rank: Rank, queue: CommQueue, model: nn.Module) -> Run:
        ddp = DistributedDataParallel(model, process_group=rank.group, init_sync=False, gradient_as_bucket_view=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.125, momentum=momentum)
        method = compress(
            ddp,
            compressor=compressor,
            feedback=feedback,
            queue=queue,
            optimizer=optimizer,
            exact_within=inner[rank.size] if inner else None,
            **{"dense_below": 0, **options},
        )

        def step(x: Tensor) -> None:
            optimizer.zero_grad()
            ddp(x).square().sum().backward()
            optimizer.step()

        return Run(model, optimizer, method, step)

    return enter


def compressed(
    name: str, compressor: Any, feedback: Any, *, lossless: bool = False, close: bool = True, **options: Any
) -> Row:
    return Row(f"compress-{name}", enter_compress(compressor, feedback, **options), lossless=lossless, close=close)


def enter_local_sgd(**options: Any) -> Enter:
    def enter(rank: Rank, queue: CommQueue, model: nn.Module) -> Run:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.125, momentum=0.5)
        method = local_sgd(model, optimizer, queue=queue, dense_below=0, **options)

        def step(x: Tensor) -> None:
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()

        return Run(model, optimizer, method, step)

    return enter


def enter_gossip(**options: Any) -> Enter:
    def enter(rank: Rank, queue: CommQueue, model: nn.Module) -> Run:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.125, momentum=0.5)
        method = gossip(optimizer, model=model, queue=queue, **{"deadline_s": 30.0, **options})
        OPENED.append(method)

        def step(x: Tensor) -> None:
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()

        return Run(model, optimizer, method, step)

    return enter


def enter_onebyte(**options: Any) -> Enter:
    def enter(rank: Rank, queue: CommQueue, model: nn.Module) -> Run:
        optimizer = OneByteSPSA(model.named_parameters(), 0.001, model=model, queue=queue, **options)

        def step(x: Tensor) -> None:
            # tanh hides an infinite input: it would show in gradients alone, which there are none of.
            optimizer.step(lambda: model(x).square().sum() + 0.0 * x.sum())

        return Run(model, optimizer, optimizer, step)

    return enter


def enter_partition(**options: Any) -> Enter:
    def enter(rank: TorchRank, queue: CommQueue, model: nn.Module) -> Run:
        sizes = (2, 2) if rank.size == 4 else (rank.size,)
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("world", "node")[: len(sizes)])
        optimizer = partition(
            model,
            mesh,
            torch.optim.SGD,
            units=[cast(nn.Sequential, model)[0]],
            queue=queue,
            lr=0.125,
            momentum=0.5,
            foreach=True,
            **options,
        )

        def step(x: Tensor) -> None:
            model(x).square().sum().backward()
            optimizer.step()

        return ShardedRun(model, optimizer, optimizer, step)

    return enter


def enter_balance(**options: Any) -> Enter:
    """The first layer's outputs are the logits of a router; its loss enters their gradients, DDP averages."""

    def enter(rank: Rank, queue: CommQueue, model: nn.Module) -> Run:
        method = LoadBalance(queue=queue, **{"num_experts": 7, "top_k": 2, "coef": 1e-3, **options})
        router = cast(nn.Sequential, model)[0]
        router.register_forward_hook(lambda _, x, logits: method("router", logits, logits.topk(2).indices))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.125, momentum=0.5)
        mean = 1 / rank.size

        def step(x: Tensor) -> None:
            optimizer.zero_grad()
            model(x).square().sum().backward()
            method.finish()
            for parameter in model.parameters():
                assert parameter.grad is not None
                rank.group.allreduce([parameter.grad.mul_(mean)]).wait()
            optimizer.step()

        return Run(model, optimizer, method, step)

    return enter


def balanced(mode: str, **options: Any) -> Row:
    return Row(
        f"balance-{mode}",
        enter_balance(mode=mode, **options),
        lossless=False,
        cannot=enter_balance(mode=mode, top_k=8, **options),
        why="top_k: 8; allowed: 1 to num_experts, 7",
    )


OPENED: list[Method] = []
"""Methods whose threads outlive their queue: a test ends with their remove()."""

GROUPS = {1: [[0]], 2: [[0, 1]], 3: [[0, 1, 2]], 4: [[0, 1], [2, 3]]}

METHODS = [
    Row("allreduce-fp32", enter_allreduce("fp32"), lossless=True),
    Row("allreduce-bf16", enter_allreduce("bf16"), lossless=False),
    Row("allreduce-fp16", enter_allreduce("fp16"), lossless=False),
    Row("allreduce-fp32-in-groups", enter_allreduce("fp32", inner=GROUPS), lossless=True),
    Row("allreduce-bf16-in-groups", enter_allreduce("bf16", inner=GROUPS), lossless=False),
    compressed("none", "none", "none", lossless=True),
    compressed("bf16-none", "bf16", "none"),
    compressed("fp16-ef", "fp16", "ef"),
    compressed("int8-ef", "int8", "ef"),
    compressed("int8-stochastic", {"kind": "int8", "rounding": "stochastic"}, "none"),
    compressed("int8-ef-in-updates", "int8", {"kind": "ef", "units": "update"}),
    compressed("int8-ef21_bc", "int8", "ef21_bc"),
    compressed("int8-econtrol", "int8", {"kind": "econtrol", "eta": 1.0}),
    compressed("int8-clipped", "int8", "ef", clip_norm=1e6),
    compressed("int4-ef", "int4", "ef", close=False),
    compressed("natural-none", "natural", "none", close=False),
    compressed("sign-ef", "sign", "ef", close=False),
    compressed("topk-ef", {"kind": "topk", "density": 0.5}, "ef", close=False),
    compressed("topk-all-ef", {"kind": "topk", "density": 1.0}, "ef"),
    compressed(
        "topk-int8-ef8",
        {"kind": "topk", "density": 0.5, "values": "int8"},
        {"kind": "ef", "storage": "int8"},
        close=False,
    ),
    compressed("topk-global-ef", {"kind": "topk", "density": 0.5, "scope": "global"}, "ef", close=False),
    compressed("topk-leader-ef", {"kind": "topk", "density": 0.5}, "ef", collective="leader_indices", close=False),
    compressed("topk-balanced-ef", {"kind": "topk", "density": 0.5}, "ef", collective="balanced", close=False),
    compressed("topk-ef21", {"kind": "topk", "density": 0.5}, "ef21", start_step=1, close=False),
    compressed("topk-ef21_w", {"kind": "topk", "density": 1.0}, "ef21_w"),
    compressed(
        "topk-ef21_sgdm",
        {"kind": "topk", "density": 0.5},
        {"kind": "ef21_sgdm", "eta": 0.5},
        momentum=0.0,
        start_step=1,
        close=False,
    ),
    compressed("topk-ef21_pp", {"kind": "topk", "density": 0.5}, "ef21_pp", start_step=1, close=False),
    compressed(
        "topk-dgc", {"kind": "topk", "density": 1.0}, {"kind": "dgc", "momentum": 0.5, "masking": False}, momentum=0.0
    ),
    compressed(
        "threshold-dgc",
        {"kind": "threshold", "density": 0.2},
        {"kind": "dgc", "momentum": 0.5},
        momentum=0.0,
        close=False,
    ),
    compressed("randk-ef", {"kind": "randk", "density": 0.2}, "ef", close=False),
    compressed("ternary_cluster-ef", "ternary_cluster", "ef", close=False),
    compressed("lowrank-ef", {"kind": "lowrank", "rank": 2}, "ef", close=False),
    compressed("lowrank-full-ef", {"kind": "lowrank", "rank": 7}, "ef"),
    compressed("int8-in-groups", "int8", "ef", inner=GROUPS),
    Row("local_sgd-average", enter_local_sgd(every=2), lossless=True),
    Row("local_sgd-int8", enter_local_sgd(every=1, compressor="int8"), lossless=False),
    Row("local_sgd-diloco", enter_local_sgd(every=2, outer="nesterov"), lossless=False, close=False),
    Row(
        "local_sgd-sparseloco",
        enter_local_sgd(
            every=2,
            outer="sgd",
            compressor={"kind": "topk", "k": 8, "chunk": 16, "values": "2bit"},
            feedback={"kind": "ef", "decay": 0.95},
        ),
        lossless=False,
        close=False,
    ),
    Row("gossip-dpsgd", enter_gossip(graph="complete"), lossless=True),
    Row("gossip-ring", enter_gossip(graph="ring", probe_every=2), lossless=False),
    Row("gossip-bf16", enter_gossip(graph="complete", algorithm={"kind": "dpsgd", "wire": "bf16"}), lossless=False),
    Row(
        "gossip-merge",
        enter_gossip(graph="complete", schedule={"kind": "every", "steps": 2, "merge_at": 3}),
        lossless=True,
    ),
    Row("gossip-tracking", enter_gossip(graph="complete", algorithm="gradient_tracking"), lossless=False),
    Row("gossip-d2", enter_gossip(graph="complete", algorithm="d2"), lossless=False),
    Row("gossip-decentlam", enter_gossip(graph="complete", algorithm="decentlam"), lossless=False),
    Row(
        "gossip-slowmo",
        enter_gossip(graph="complete", algorithm={"kind": "slowmo", "every": 3}),
        lossless=False,
        close=False,
    ),
    Row("gossip-noloco", enter_gossip(graph="complete", algorithm="noloco"), lossless=False, close=False),
    Row("gossip-sgp", enter_gossip(graph="exponential", algorithm="sgp"), lossless=False),
    Row("gossip-choco", enter_gossip(graph="complete", algorithm="choco"), lossless=False),
    Row("gossip-sparta", enter_gossip(graph="complete", algorithm="sparta"), lossless=False),
    Row("gossip-corrected", enter_gossip(graph="complete", algorithm="variance_corrected"), lossless=False),
    Row("onebyte", enter_onebyte(samples=4), lossless=False, close=False),
    Row(
        "onebyte-shared",
        enter_onebyte(samples=6, directions="shared", robust="median", snapshot_every=2),
        lossless=False,
        close=False,
    ),
    Row("onebyte-subspace", enter_onebyte(samples=4, directions="subspace", rank=3), lossless=False, close=False),
    Row(
        "onebyte-flood",
        enter_onebyte(samples=4, exchange={"kind": "flood", "graph": "mesh"}, snapshot_every=2),
        lossless=False,
        close=False,
    ),
    Row(
        "partition-fp32",
        enter_partition(params="world", grads="world", optim="world"),
        lossless=True,
        all_of_torch=True,
    ),
    Row(
        "partition-quantised",
        enter_partition(
            params="rank",
            grads="rank",
            optim="world",
            gradients={"world": {"kind": "int8", "feedback": True}},
            update={"kind": "difference", "bits": 8},
        ),
        lossless=False,
        all_of_torch=True,
    ),
    balanced("late"),
    balanced("stale"),
]
