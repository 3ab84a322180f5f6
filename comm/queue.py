"""The only place where background communication happens: one thread and one process group, in submission order.

Hooks and optimizers submit; the thread runs the exchanges one after another. So every rank issues the same collectives
in the same order however its autograd engine schedules the hooks, and communication overlaps with computation while
nothing but this thread touches the group.
"""

from __future__ import annotations

import ctypes
import itertools
import queue
import re
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, Work

from thinwire.comm.channel import Channel
from thinwire.comm.errors import PeerFailedError, PeerLateError, PeerLostError
from thinwire.comm.liveness import PeerMonitor, own_address
from thinwire.comm.meter import TrafficMeter
from thinwire.comm.pace import Pace
from thinwire.comm.rank_names import name_ranks
from thinwire.comm.verdict import Progress, Survey, Verdict, draw_verdict

T = TypeVar("T")

# How long the others may take to answer once an operation is overdue: within the two seconds that a caller is promised.
_TRANSPORT = "gloo/transport"  # in the errors of its connections
_SURVEY_S = 1.0
_ERRORS = {"lost": PeerLostError, "late": PeerLateError, "failed": PeerFailedError}


class _OverdueError(Exception):
    """The deadline of an operation has passed."""


class _TransportError(Exception):
    """The transport gave up: a connection closed, was reset, or timed out."""


class Pending(Generic[T]):
    """The result of a submitted exchange, once it is there."""

    def __init__(self, owner: CommQueue, operation: str, exchange: Callable[[Channel], T]) -> None:
        self.operation = operation
        self._owner = owner
        self._exchange = exchange
        self._ended = threading.Event()
        self._result: T
        self._error: BaseException | None = None

    def done(self) -> bool:
        """Whether wait() would return at once."""
        return self._ended.is_set()

    def wait(self) -> T:
        """Block until the exchange has ended and return its result.

        Raises:
            PeerLostError, PeerLateError, PeerFailedError: a peer is gone, overdue, or left with an error of its own.
            Exception: whatever the exchange itself raised on this rank.
        """
        if not self._ended.is_set():
            began = time.monotonic()
            with torch.profiler.record_function(f"wait: {self.operation}"):
                self._ended.wait()
            self._owner.exposed_s += time.monotonic() - began
        if self._error is not None:
            raise self._error
        return self._result


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
        self._pace = Pace(monitor.latency_s)
        self._lock = threading.Lock()
        self._open: set[Pending[Any]] = set()
        self._failure: BaseException | None = None
        self._broken_by: BaseException | None = None
        self._sequence = itertools.count(1)
        monitor.listen(self._give_up)
        self._jobs: queue.SimpleQueue[tuple[Pending[Any], torch.cuda.Event | None] | None] = queue.SimpleQueue()
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
        with self._lock:
            self._open.add(pending)
            failure = self._failure
        if failure is not None:
            self._end(pending, error=failure)
            return pending
        ready = torch.cuda.current_stream().record_event() if torch.cuda.is_initialized() else None
        self._jobs.put((pending, ready))
        return pending

    def blame(self, error: RuntimeError, operation: str) -> BaseException:
        """What is behind an error that did not come from this queue: the ranks that are gone, or the error itself.

        DDP and others call collectives of their own, which fail with a bare RuntimeError when a peer is lost.

        Args:
            error: what was raised on this rank.
            operation: what this rank was doing, for the message.
        """
        survey = self.monitor.survey(self.name, _SURVEY_S) if self._failure is None and self.size > 1 else Survey()
        if survey.silent:
            self._broken_by = error
            here = Progress(operation=operation)
            why = f"broken: {_brief(error)}"
            self.monitor.announce(draw_verdict(self.name, here, self.rank, self.peers, why, survey))
        return self._failure or error

    def beside(self, name: str) -> CommQueue:
        """Another queue over the same ranks, with a group of its own, so that neither waits for the other. Collective.

        Shares the meter, the monitor and the deadline. Close it when its user leaves.

        Args:
            name: the same on every rank, and different for each queue beside this one.
        """
        timeout = timedelta(seconds=2 * self.timeout_s)
        private = dist.new_group(list(self.peers), timeout=timeout, use_local_synchronization=True)
        assert isinstance(private, ProcessGroup)
        return CommQueue(
            private,
            meter=self.meter,
            monitor=self.monitor,
            timeout_s=self.timeout_s,
            peers=self.peers,
            name=f"{self.name}/{name}",
        )

    def close(self) -> None:
        """End the thread after what was submitted. The group and the monitor stay open: they are the caller's."""
        self._jobs.put(None)
        while self._thread.is_alive() and self._failure is None:  # a failed exchange may hang in the transport
            self._thread.join(0.1)

    def _perform(self, pending: Pending[Any], ready: torch.cuda.Event | None) -> None:
        """Run one exchange on the queue's thread and end its Pending, well or badly."""
        if self._failure is not None:
            return  # it has ended with that
        here = Progress(next(self._sequence), pending.operation, finished=False)
        deadline = time.monotonic() + self.timeout_s
        self.monitor.report(self.name, here)
        channel = Channel(
            self.group,
            self.peers,
            self.meter,
            pending.operation,
            lambda work, on_device: self._wait(work, on_device, deadline),
            self._pace,
        )
        try:
            with torch.profiler.record_function(f"thinwire::{pending.operation}"):
                if ready is None:
                    result = pending._exchange(channel)
                else:
                    result = self._run_on_stream(pending, channel, ready, deadline)
        except BaseException as error:
            self._judge(here, error)
        else:
            self.monitor.report(self.name, replace(here, finished=True))
            self._end(pending, result=result)

    def _run_on_stream(
        self, pending: Pending[Any], channel: Channel, ready: torch.cuda.Event, deadline: float
    ) -> object:
        """Run the exchange on a side stream after the caller's work, and return once the device has done it."""
        stream = torch.cuda.Stream(ready.device)
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            result = pending._exchange(channel)
            finished = stream.record_event()
        while not finished.query():
            if time.monotonic() >= deadline:
                raise _OverdueError
            time.sleep(50e-6)
        return result

    def _wait(self, work: Work, on_device: bool, deadline: float) -> None:
        """Wait for one collective, but not past the deadline. One of device tensors is only put before later work."""
        try:
            if on_device:
                work.wait()
            else:
                work.wait(timedelta(seconds=max(1e-3, deadline - time.monotonic())))
        except RuntimeError as error:
            if time.monotonic() >= deadline:
                raise _OverdueError from error
            raise _TransportError(_brief(error)) from error

    def _judge(self, here: Progress, error: BaseException) -> None:
        """Decide what this rank raises for a failed exchange: its own error, or what the other ranks' answers say."""
        me = self.peers[self.rank]
        if isinstance(error, RuntimeError) and _TRANSPORT in str(error):
            # A connection that was broken already: gloo says so when an operation is begun, not when it is waited for.
            error = _TransportError(_brief(error))
        if not isinstance(error, _OverdueError | _TransportError):
            # Not the transport: the exchange itself failed here, and the others should not wait for it in vain.
            self._fail(error)
            text = f"{here.operation}: rank {me} failed with {type(error).__name__}: {error}"[:2000]
            self.monitor.announce(Verdict("failed", here.operation, (me,), text))
            return
        self._broken_by = error
        overdue = isinstance(error, _OverdueError)
        why = f"not finished {self.timeout_s:g} s after its start" if overdue else f"broken: {error}"
        survey = self.monitor.survey(self.name, _SURVEY_S)
        self.monitor.announce(draw_verdict(self.name, here, self.rank, self.peers, why, survey))

    def _give_up(self, verdict: Verdict) -> None:
        """The monitor's call, on any thread: this rank or another has judged that the job cannot go on."""
        failure = _ERRORS[verdict.kind](verdict.message, operation=verdict.operation, missing_ranks=verdict.ranks)
        failure.__cause__ = self._broken_by
        self._fail(failure)

    def _fail(self, failure: BaseException) -> None:
        """End everything that waits, and all that will be submitted, with the first failure."""
        with self._lock:
            if self._failure is not None:
                return
            self._failure = failure
            waiting = list(self._open)
        for pending in waiting:
            self._end(pending, error=failure)
        _abandon(self.group)

    def _end(self, pending: Pending[Any], *, result: Any = None, error: BaseException | None = None) -> None:
        with self._lock:
            if pending not in self._open:
                return
            self._open.remove(pending)
        pending._result = result
        pending._error = error
        # The exchange's closure holds buffers and often the method that made it: let go of it, or they form a cycle.
        del pending._exchange
        pending._ended.set()


def open_queue(group: ProcessGroup | None = None, *, timeout_s: float = 60.0) -> CommQueue:
    """A CommQueue over the ranks of `group`, for a trainer that calls init_process_group itself. Collective.

    Creates a process group of its own beside `group`; all ranks count as one level named "world". `thinwire.init()`
    gives a queue that knows the machine's levels.

    Args:
        group: default: all ranks.
        timeout_s: deadline of each operation, in seconds.
    Raises:
        ValueError: torch.distributed is not initialised, this rank is not in the group, or timeout_s is not positive.
    """
    if not dist.is_initialized():
        raise ValueError(
            "torch.distributed is not initialised: call thinwire.init() or init_process_group() before this"
        )
    if group is not None and not isinstance(group, ProcessGroup):  # what new_group() gives those outside
        raise ValueError(
            f"group: {group!r}, which is no process group that rank {dist.get_rank()} is in; give each rank the group "
            "that it is a member of (of a DeviceMesh: mesh.get_group(name)), and call this on no other rank"
        )
    members = dist.get_process_group_ranks(group or dist.group.WORLD)
    if dist.get_rank() not in members:
        raise ValueError(
            f"group: {name_ranks(members)} are in it, rank {dist.get_rank()} is not; give each rank the group that it "
            "is a member of, and call this on no other rank"
        )
    rank = members.index(dist.get_rank())
    private = dist.new_group(members, timeout=timedelta(seconds=2 * timeout_s), use_local_synchronization=True)
    assert isinstance(private, ProcessGroup)
    # Not a count of this process's queues: other ranks may be in more groups, or in fewer.
    name = f"queue-{private.group_name}"
    store = dist.PrefixStore(f"thinwire/{name}", private.get_group_store())
    monitor = PeerMonitor.meet(store, rank, len(members), own_address(store), timeout_s)
    levels = ["world"] * dist.get_world_size()
    levels[dist.get_rank()] = "self"
    return CommQueue(
        private, meter=TrafficMeter(levels), monitor=monitor, timeout_s=timeout_s, peers=members, name=name
    )


def _serve(
    owner: weakref.ref[CommQueue],
    jobs: queue.SimpleQueue[tuple[Pending[Any], torch.cuda.Event | None] | None],
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


def _brief(error: RuntimeError) -> str:
    """Gloo's message without the place in its source before it and the advice after it."""
    line = (str(error) or "no message").splitlines()[0]
    return re.sub(r"^\[\S+:\d+\] ", "", line).partition(" This is typically")[0].rstrip(".")
