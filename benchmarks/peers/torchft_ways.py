"""torchft's fault-tolerant ways, each rank a replica group of its own, on gloo; rank 0 runs the lighthouse."""

from __future__ import annotations

import os
import socket
from contextlib import AbstractContextManager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo
from torchft.coordination import LighthouseServer
from torchft.local_sgd import DiLoCo, LocalSGD

from peers.peer import EVERY, OUTER_LR, OUTER_MOMENTUM, Job, Peer
from thinwire.dist.data import Batch
from thinwire.dist.world import World

LIGHTHOUSE_PORT = 29610
PATIENCE = timedelta(seconds=300)


class Managed(Peer):
    """A rank with a Manager.

    starts_quorum: its optimizer wants zero_grad() before the forward pass, where the quorum begins.
    """

    def __init__(self, job: Job, *, is_async: bool) -> None:
        self._lighthouse = None
        if job.rank == 0:
            self._lighthouse = LighthouseServer(
                bind=f"[::]:{LIGHTHOUSE_PORT}", min_replicas=job.size, join_timeout_ms=1000, quorum_tick_ms=50
            )
        dist.barrier()
        # Each replica group has a store of its own, which must be reachable from the others.
        self._store = dist.TCPStore(job.address, 0, is_master=True, wait_for_workers=False)
        self.model = job.model()
        self.inner = job.optimizer(self.model)
        os.environ["TORCHFT_LIGHTHOUSE"] = f"http://{job.head}:{LIGHTHOUSE_PORT}"
        self.manager = Manager(
            pg=ProcessGroupGloo(timeout=PATIENCE),
            load_state_dict=self._load,
            state_dict=self._state,
            min_replica_size=job.size,
            use_async_quorum=is_async,
            timeout=PATIENCE,
            quorum_timeout=PATIENCE,
            rank=0,
            world_size=1,
            store_addr=job.address,
            store_port=self._store.port,
            replica_id=f"replica_{job.rank}",
            hostname=socket.gethostname(),
            init_sync=False,  # all ranks draw the same weights
        )
        self._entered: AbstractContextManager[object] | None = None

    def begin(self, job: Job, wrapped: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """What the manager's users have to do after it is there."""
        super().__init__(job, self.model, wrapped, optimizer)

    def enter(self, context: AbstractContextManager[object]) -> None:
        """Let local SGD hook itself into the inner optimizer."""
        self._entered = context
        context.__enter__()

    def close(self) -> None:
        if self._entered is not None:
            self._entered.__exit__(None, None, None)
        dist.barrier()
        self.manager.shutdown(wait=False)
        dist.barrier()
        if self._lighthouse is not None:
            self._lighthouse.shutdown()

    def _state(self) -> dict[str, object]:
        return {"model": self.model.state_dict(), "optimizer": self.inner.state_dict()}

    def _load(self, state: dict[str, dict[str, object]]) -> None:
        self.model.load_state_dict(state["model"])
        self.inner.load_state_dict(state["optimizer"])


class FaultTolerantDDP(Managed):
    """Its quorum begins with zero_grad(), before the forward pass."""

    def step(self, batch: Batch, lr: float) -> float:
        for group in self.inner.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        loss = self.loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.job.config.train.clip_norm)
        self.optimizer.step()
        return float(loss.detach())


def ddp(job: Job, world: World) -> Peer:
    peer = FaultTolerantDDP(job, is_async=True)
    peer.begin(job, DistributedDataParallel(peer.manager, peer.model), Optimizer(peer.manager, peer.inner))
    return peer


def local_sgd(job: Job, world: World) -> Peer:
    peer = Managed(job, is_async=False)
    peer.begin(job, peer.model, peer.inner)
    peer.enter(LocalSGD(peer.manager, peer.model, peer.inner, sync_every=EVERY))
    return peer


def diloco(job: Job, world: World) -> Peer:
    peer = Managed(job, is_async=False)
    peer.begin(job, peer.model, peer.inner)
    outer = torch.optim.SGD(peer.model.parameters(), lr=OUTER_LR, momentum=OUTER_MOMENTUM, nesterov=True)
    peer.enter(DiLoCo(peer.manager, [peer.model], peer.inner, outer, sync_every=EVERY))
    return peer
