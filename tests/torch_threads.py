"""Ranks as threads that have all of torch.distributed: each its own default group, meshes, DTensors and FSDP2 modules.

Torch keeps its process groups in one table per process. Its own tests give every thread a table; the same two private
switches do it here, around real gloo groups. The only place that touches them.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from given_up_groups import forget_meshes
from torch._C._distributed_c10d import _set_thread_isolation_mode
from torch.distributed import HashStore, PrefixStore, ProcessGroup, Store
from torch.testing._internal.distributed.multi_threaded_pg import ThreadLocalWorld

from thinwire.comm.errors import CommError
from thinwire.comm.liveness import PeerMonitor
from thinwire.comm.meter import TrafficMeter
from thinwire.comm.partition.levels import Levels, build_levels
from thinwire.comm.queue import CommQueue

T = TypeVar("T")
_runs = itertools.count()
_one_at_a_time = threading.Lock()


@dataclass
class TorchRank:
    """One thread's place. levels: those of the machine that the ranks play. monitors: see tests/ranks.py."""

    rank: int
    size: int
    store: Store
    levels: Levels
    monitors: list[PeerMonitor] = field(default_factory=list)

    def queue(self, timeout_s: float = 30.0, name: str = "queue") -> CommQueue:
        """A CommQueue over all ranks, whose meter knows the levels."""
        store = PrefixStore(f"queue/{name}", self.store)
        monitor = PeerMonitor.meet(store, self.rank, self.size, "127.0.0.1", timeout_s=30.0)
        self.monitors.append(monitor)
        group = dist.new_group(timeout=timedelta(seconds=2 * timeout_s))
        assert isinstance(group, ProcessGroup)
        meter = TrafficMeter([self._level_of(peer) for peer in range(self.size)])
        return CommQueue(group, meter=meter, monitor=monitor, timeout_s=timeout_s, name=name)

    def _level_of(self, peer: int) -> str:
        mine, theirs = self.levels.digits[self.rank], self.levels.digits[peer]
        differ = [level for level in range(self.levels.depth) if mine[level] != theirs[level]]
        return self.levels.names[differ[-1]] if differ else "self"


def run_torch_ranks(
    sizes: Sequence[int], work: Callable[[TorchRank], T], *, names: Sequence[str] = (), timeout_s: float = 120.0
) -> list[T]:
    """Run `work` on every rank of a machine and return what each returned; the first that failed raises.

    Args:
        sizes: of the groups of its levels, fastest first; the last is the number of ranks.
        names: of the levels; default: pair, node, world, of which fewer levels are the last ones.
    """
    size = sizes[-1]
    names = names or ("pair", "node", "world")[-len(sizes) :]
    store, run = HashStore(), next(_runs)
    outcomes: list[T | BaseException] = [TimeoutError(f"a rank ran longer than {timeout_s} s")] * size
    monitors: list[PeerMonitor] = []

    def body(rank: int) -> None:
        try:
            own = PrefixStore(f"run{run}", store)
            dist.init_process_group("gloo", store=own, rank=rank, world_size=size)
            levels = build_levels(names, sizes, range(size), rank=rank)
            outcomes[rank] = work(TorchRank(rank, size, own, levels, monitors))
            dist.barrier()
        except BaseException as error:
            outcomes[rank] = error
        finally:
            forget_meshes()
            if dist.is_initialized():
                dist.destroy_process_group()

    with _one_at_a_time, _isolated():
        threads = [threading.Thread(target=body, args=(r,), name=f"rank{r}", daemon=True) for r in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout_s)
        for monitor in monitors:
            monitor.close()
    errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    if errors:  # what a rank met by itself says more than that others then missed it
        raise next((error for error in errors if not isinstance(error, CommError)), errors[0])
    return outcomes  # type: ignore[return-value]


@contextmanager
def _isolated() -> Iterator[None]:
    before = c10d._world
    _set_thread_isolation_mode(True)
    c10d._world = ThreadLocalWorld()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        c10d._world = before
        _set_thread_isolation_mode(False)
