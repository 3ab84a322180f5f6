"""The only place where background communication happens: one thread and one process group, in submission order.

Hooks and optimizers submit; the thread runs the exchanges one after another. So every rank issues the same collectives
in the same order however its autograd engine schedules the hooks, and communication overlaps with computation while
nothing but this thread touches the group.
"""

from __future__ import annotations

import ctypes
import itertools
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, Work

from thinwire.comm.channel import Channel
from thinwire.comm.errors import CommError, PeerFailedError, PeerLateError, PeerLostError
from thinwire.comm.liveness import PeerMonitor, own_address
from thinwire.comm.meter import TrafficMeter
from thinwire.comm.verdict import Progress, Verdict, draw_verdict

T = TypeVar("T")

# How long the others may take to answer once an operation is overdue: within the two seconds that a caller is promised.
_SURVEY_S = 1.0
# A wait on the transport is cut into slices so that a verdict that arrives meanwhile ends it.
_SLICE = timedelta(milliseconds=100)
_ERRORS = {"lost": PeerLostError, "late": PeerLateError, "failed": PeerFailedError}


class _Overdue(Exception):
    """The deadline of an operation has passed."""


class _TransportError(Exception):
    """The transport gave up: a connection closed, was reset, or timed out."""


class Pending(Generic[T]):
    """The result of a submitted exchange, once it is there."""

    def __init__(self, owner: CommQueue, operation: str, exchange: Callable[[Channel], T]) -> None:
        self.operation = operation
        self._owner = owner
        self._exchange = exchange
        self._done = threading.Event()
        self._result: T
        self._error: BaseException | None = None

    def done(self) -> bool:
        """Whether wait() would return at once."""
        return self._done.is_set()

    def wait(self) -> T:
        """Block until the exchange has ended and return its result.

        Raises:
            PeerLostError, PeerLateError, PeerFailedError: a peer is gone, overdue, or left with an error of its own.
            Exception: whatever the exchange itself raised on this rank.
        """
        if not self._done.is_set():
            began = time.monotonic()
            self._done.wait()
            self._owner.exposed_s += time.monotonic() - began
        if self._error is not None:
            raise self._error
        return self._result

    def _run(self, channel: Channel) -> None:
        self._result = self._exchange(channel)

    def _end(self, error: BaseException | None = None) -> None:
        self._error = error
        # The exchange's closure holds buffers and often the method that made it: let go of it, or they form a cycle.
        del self._exchange
        self._done.set()


class CommQueue:
    """Runs exchanges on a process group of its own, in submission order, each named and under a deadline.

    After the first failure the group is of no use: every exchange that waits, and every later one, ends with the same
    error.

    Args:
        group: process group that nobody else uses.
        meter: where the payload bytes are counted.
        monitor: how the other ranks are asked when an operation is overdue; knows ranks as the group does.
        timeout_s: deadline of one operation, in seconds from its start on this rank.
        peers: for each rank of the group its rank in the job, as the meter numbers them; default: the same.
        name: what the monitor calls this queue; equal on all ranks, different for queues that share a monitor.

    Attributes: exposed_s, the seconds for which callers were blocked in Pending.wait() since the start.
    """

    def __init__(
        self,
        group: ProcessGroup,
        *,
        meter: TrafficMeter,
        monitor: PeerMonitor,
        timeout_s: float,
        peers: Sequence[int] | None = None,
        name: str = "queue",
    ) -> None:
        if not timeout_s > 0:
            raise ValueError(f"timeout_s: {timeout_s} must be a positive number of seconds")
        self.group = group
        self.rank = group.rank()
        self.size = group.size()
        self.peers = tuple(peers if peers is not None else range(self.size))
        self.meter = meter
        self.monitor = monitor
        self.timeout_s = timeout_s
        self.name = name
        self.exposed_s = 0.0
        self._failure: BaseException | None = None
        self._sequence = itertools.count(1)
        self._jobs: queue.SimpleQueue[tuple[Pending[object], torch.cuda.Event | None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=_serve, args=(weakref.ref(self), self._jobs), name=f"thinwire-{name}")
        self._thread.daemon = True  # a collective that hangs must not keep a failed process alive
        self._thread.start()
        weakref.finalize(self, self._jobs.put, None)

    def submit(self, operation: str, exchange: Callable[[Channel], T]) -> Pending[T]:
        """Run `exchange(channel)` on the queue's thread after all that was submitted before.

        The exchange sees tensors as the caller's current CUDA stream leaves them, and its results are complete for
        every stream once Pending.wait() returns.

        Args:
            operation: name for the meter and for error messages, the same on every rank.
            exchange: uses the channel's collectives; every rank submits the same sequence of them.
        """
        pending: Pending[T] = Pending(self, operation, exchange)
        ready = torch.cuda.current_stream().record_event() if torch.cuda.is_initialized() else None
        self._jobs.put((pending, ready))  # type: ignore[arg-type]
        return pending

    def close(self) -> None:
        """End the thread after what was submitted. The group and the monitor stay open: they are the caller's."""
        self._jobs.put(None)
        if self._failure is None:
            self._thread.join()

    def _perform(self, pending: Pending[object], ready: torch.cuda.Event | None) -> None:
        """Run one exchange on the queue's thread and end its Pending, well or badly."""
        sequence = next(self._sequence)
        if self._failure is None and self.monitor.verdict is not None:
            self._failure = _error_of(self.monitor.verdict)
        if self._failure is not None:
            pending._end(self._failure)
            return
        deadline = time.monotonic() + self.timeout_s
        self.monitor.report(self.name, Progress(sequence, pending.operation, finished=False))
        channel = Channel(
            self.group,
            self.peers,
            self.meter,
            pending.operation,
            lambda work, on_device: self._wait(work, deadline, on_device),
        )
        try:
            with torch.profiler.record_function(f"thinwire::{pending.operation}"):
                if ready is None:
                    pending._run(channel)
                else:
                    self._run_on_stream(pending, channel, ready, deadline)
        except BaseException as error:
            self._failure = self._judge(sequence, pending.operation, error)
            pending._end(self._failure)
            _abandon(self.group)
        else:
            self.monitor.report(self.name, Progress(sequence, pending.operation, finished=True))
            pending._end()

    def _run_on_stream(
        self, pending: Pending[object], channel: Channel, ready: torch.cuda.Event, deadline: float
    ) -> None:
        """Run the exchange on a side stream after the caller's work, and return once the device has done it."""
        stream = torch.cuda.Stream(ready.device)
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            pending._run(channel)
            finished = stream.record_event()
        while not finished.query():
            self._check(deadline)
            time.sleep(50e-6)

    def _wait(self, work: Work, deadline: float, on_device: bool) -> None:
        """Wait for one collective, but no longer than the deadline or the arrival of a verdict.

        A collective of device tensors is only ordered before the stream's next work; _run_on_stream() waits for it.
        """
        try:
            while not (on_device or work.is_completed()):
                try:
                    work.wait(min(_SLICE, timedelta(seconds=max(1e-3, deadline - time.monotonic()))))
                except RuntimeError:
                    if not work.is_completed():
                        self._check(deadline)
            work.wait()
        except RuntimeError as error:
            if isinstance(error, CommError):
                raise
            raise _TransportError((str(error) or "no message").splitlines()[0]) from error

    def _check(self, deadline: float) -> None:
        if self.monitor.verdict is not None:
            raise _error_of(self.monitor.verdict)
        if time.monotonic() >= deadline:
            raise _Overdue

    def _judge(self, sequence: int, operation: str, error: BaseException) -> BaseException:
        """What this rank raises for a failed exchange: its own error, or what the other ranks' answers say of it."""
        if self.monitor.verdict is not None:
            return _error_of(self.monitor.verdict)
        if not isinstance(error, (_Overdue, _TransportError)):
            # Not the transport: the exchange itself failed here, and the others should not wait for it in vain.
            self.monitor.announce(
                Verdict(
                    "failed",
                    operation,
                    (self.peers[self.rank],),
                    f"{operation}: rank {self.peers[self.rank]} failed with {type(error).__name__}: {error}"[:2000],
                )
            )
            return error
        overdue = isinstance(error, _Overdue)
        why = f"not finished {self.timeout_s:g} s after its start" if overdue else f"broken: {error}"
        survey = self.monitor.survey(self.name, _SURVEY_S)
        verdict = draw_verdict(self.name, Progress(sequence, operation, False), self.rank, self.peers, why, survey)
        failure = _error_of(self.monitor.announce(verdict))
        failure.__cause__ = error
        return failure


def open_queue(group: ProcessGroup | None = None, *, timeout_s: float = 60.0) -> CommQueue:
    """A CommQueue over the ranks of `group`, for a trainer that calls init_process_group itself. Collective.

    Creates a process group of its own beside `group`; all ranks count as one level named "world". `thinwire.init()`
    gives a queue that knows the machine's levels.

    Args:
        group: default: all ranks.
        timeout_s: deadline of each operation, in seconds.
    Raises:
        ValueError: torch.distributed is not initialised, or timeout_s is not positive.
    """
    if not dist.is_initialized():
        raise ValueError(
            "torch.distributed is not initialised: call thinwire.init() or init_process_group() before this"
        )
    members = dist.get_process_group_ranks(group or dist.group.WORLD)
    rank = members.index(dist.get_rank())
    name = f"queue{next(_names)}"
    private = dist.new_group(members, timeout=timedelta(seconds=2 * timeout_s), use_local_synchronization=True)
    assert isinstance(private, ProcessGroup)
    store = dist.PrefixStore(f"thinwire/{name}/{members[0]}", private.get_group_store())
    monitor = PeerMonitor.meet(store, rank, len(members), own_address(store), timeout_s)
    levels = ["world"] * dist.get_world_size()
    levels[dist.get_rank()] = "self"
    return CommQueue(
        private, meter=TrafficMeter(levels), monitor=monitor, timeout_s=timeout_s, peers=members, name=name
    )


_names = itertools.count()


def _serve(
    owner: weakref.ref[CommQueue],
    jobs: queue.SimpleQueue[tuple[Pending[object], torch.cuda.Event | None] | None],
) -> None:
    """The thread: holds its queue only while it works, so that a forgotten queue can be collected."""
    while (job := jobs.get()) is not None:
        holder = owner()
        if holder is None:
            return
        holder._perform(*job)
        del holder, job


def _abandon(group: ProcessGroup) -> None:
    """Give up a group that has failed.

    NCCL stops its kernels when told to. A gloo group cannot: its destructor waits for the operation under way, which
    ends only at gloo's own timeout. The reference that is never returned keeps the destructor from running, so that
    neither the garbage collector nor the end of the process is held up.
    """
    try:
        group.abort()
    except (RuntimeError, AttributeError):
        pass
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))


def _error_of(verdict: Verdict) -> CommError:
    return _ERRORS[verdict.kind](verdict.message, operation=verdict.operation, missing_ranks=verdict.ranks)
