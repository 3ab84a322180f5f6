"""Ranks as threads: n real gloo groups in one process, in milliseconds instead of the seconds that processes take."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import torch
from torch.distributed import HashStore, PrefixStore, ProcessGroup, ProcessGroupGloo, Store

from thinwire.comm.liveness import PeerMonitor
from thinwire.comm.meter import TrafficMeter
from thinwire.comm.queue import CommQueue

T = TypeVar("T")
_runs = itertools.count()
_seeding = threading.Lock()


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Torch's random numbers from this seed, for one thread at a time: its generator belongs to the process."""
    with _seeding:
        torch.manual_seed(seed)
        yield


@dataclass
class Rank:
    """One thread's place: its rank, and a store and a gloo group that it shares with the other threads.

    monitors: of its queues; run_ranks() closes them, since each has a thread that would outlive the test.
    """

    rank: int
    size: int
    store: Store
    group: ProcessGroup
    monitors: list[PeerMonitor] = field(default_factory=list)

    def queue(self, timeout_s: float = 30.0, name: str = "queue", levels: list[str] | None = None) -> CommQueue:
        """A CommQueue over the threads; all peers are on level "world" unless levels says otherwise."""
        store = PrefixStore(f"queue/{name}", self.store)
        meter = TrafficMeter(levels or ["self" if r == self.rank else "world" for r in range(self.size)])
        monitor = PeerMonitor.meet(store, self.rank, self.size, "127.0.0.1", timeout_s=30.0)
        self.monitors.append(monitor)
        group = self.new_group(name, 2 * timeout_s)
        return CommQueue(group, meter=meter, monitor=monitor, timeout_s=timeout_s, name=name)

    def new_group(self, name: str, timeout_s: float = 30.0) -> ProcessGroup:
        """Another gloo group over the same threads; every rank calls this with the same name."""
        return gloo_group(PrefixStore(name, self.store), self.rank, self.size, name, timeout_s)


def gloo_group(store: Store, rank: int, size: int, name: str, timeout_s: float = 30.0) -> ProcessGroup:
    """A gloo ProcessGroup outside torch's global registry. The only place that touches this private API."""
    group = ProcessGroup(store, rank, size)
    backend = ProcessGroupGloo(store, rank, size, timedelta(seconds=timeout_s))
    # Who leaves as soon as its own connections stand would close them while others still make theirs.
    store.set(f"connected/{rank}", "")
    store.wait([f"connected/{r}" for r in range(size)], timedelta(seconds=timeout_s))
    group._register_backend(torch.device("cpu"), ProcessGroup.BackendType.GLOO, backend)
    group._set_default_backend(ProcessGroup.BackendType.GLOO)
    group._set_group_name(f"{name}-{next(_runs)}-{rank}")
    return group


def run_ranks(size: int, work: Callable[[Rank], T], *, timeout_s: float = 60.0) -> list[T]:
    """Run `work` as `size` ranks and return what each returned; the first rank that failed raises its exception.

    A rank that is still running after timeout_s is reported by name: its thread is a daemon and is left behind.
    """
    outcomes = run_ranks_to_the_end(size, work, timeout_s=timeout_s)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return outcomes  # type: ignore[return-value]


def run_ranks_to_the_end(size: int, work: Callable[[Rank], T], *, timeout_s: float = 60.0) -> list[T | BaseException]:
    """Like run_ranks, but an exception of a rank is its outcome: for tests in which ranks are meant to fail."""
    shared = HashStore()
    run = next(_runs)
    outcomes: list[T | BaseException] = [TimeoutError(f"rank {r} did not finish") for r in range(size)]
    monitors: list[PeerMonitor] = []

    def body(rank: int) -> None:
        try:
            store = PrefixStore(f"run{run}", shared)
            group = gloo_group(PrefixStore("group", store), rank, size, f"run{run}")
            outcomes[rank] = work(Rank(rank, size, store, group, monitors))
        except BaseException as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=body, args=(r,), name=f"rank{r}", daemon=True) for r in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout_s)
    for monitor in monitors:  # not before the last rank has ended: they answer for theirs
        monitor.close()
    return outcomes
