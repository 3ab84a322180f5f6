"""Membership: an Exchange whose machines may come and go."""

from __future__ import annotations

import asyncio
import ctypes
import hashlib
import math
import random
import socket
import threading
import time
from collections.abc import Callable, Sequence

from thinwire.comm.address import join_address, split_address
from thinwire.comm.onebyte.exchange import Change, Turn
from thinwire.comm.onebyte.log import Log
from thinwire.comm.onebyte.membership.connections import Connections
from thinwire.comm.onebyte.membership.core import Core
from thinwire.comm.onebyte.membership.errors import MessageError, NoQuorumError
from thinwire.comm.onebyte.membership.frame import RUN_BYTES, Frame
from thinwire.comm.onebyte.membership.handshake import TO_TAKE_PART, Greeting
from thinwire.comm.onebyte.membership.ledger import Ledger
from thinwire.comm.onebyte.membership.messages import NO_SLOT, Control
from thinwire.comm.onebyte.membership.place import Me
from thinwire.comm.onebyte.membership.promise import PromiseFile
from thinwire.comm.onebyte.membership.settings import MembershipSettings
from thinwire.comm.onebyte.membership.steps import Model, Steps
from thinwire.comm.onebyte.membership.work import Seat

_TICKS_PER_HEARTBEAT = 4


class Membership:
    """One machine's part in a run whose machines may come and go.

    Founds the run, joins it, or goes on with it, as settings.contacts and the log say. A thread of its own keeps the
    connections alive; begin() and commit() belong to one other thread.

    Args:
        manifest: of the run; the log must have the same.
        log: open for writing, until close() has returned. A small file with the ending .vote lies beside it, and
            belongs to it: whoever moves or copies one without the other makes a machine that breaks its promises.
        model: the weights, with all rounds of the log taken up, or none.
        settings: of this machine.
        base_hash: what model_hash() gives before the first round. snapshot_every: rounds between two snapshots.
    Raises:
        ValueError: the log is of another run, or lacks what this machine had promised.
        OSError: settings.listen cannot be bound.

        settings = MembershipSettings(listen="10.0.0.2:7000", contacts=("10.0.0.1:7000",))
        exchange = Membership(manifest, log, model, settings, base_hash=base_hash, snapshot_every=1000)
    """

    def __init__(
        self,
        manifest: bytes,
        log: Log,
        model: Model,
        settings: MembershipSettings,
        *,
        base_hash: bytes,
        snapshot_every: int,
    ) -> None:
        if log.manifest != manifest:
            raise ValueError(f"{log.path} is the log of another run: its manifest differs")
        run_id = hashlib.sha256(manifest).digest()[:RUN_BYTES]
        promises = PromiseFile(log.path.with_name(log.path.name + ".vote"), run_id, sync=settings.sync)
        if len(log) and not settings.contacts and promises.load().slot == NO_SLOT:
            raise ValueError(
                f"contacts: none, and {log.path} has a run without {log.path.name}.vote beside it, so this machine has "
                "no place in it: give the address of a machine of the run, or start a new log"
            )
        if model.rounds not in (0, log.rounds):
            raise ValueError(f"the weights have taken up {model.rounds} of the log's {log.rounds} rounds; all or none")
        self._settings = settings
        listener = _bind(settings.listen)
        address = settings.advertise or join_address(*listener.getsockname()[:2])
        self.address = address
        self._lock = threading.Condition()
        handed = len(log) if model.rounds else 0
        self._ledger = Ledger(log, snapshot_every, handed=handed, sync=settings.sync)
        me = Me(settings.name or address, address, run_id, base_hash)
        self._core = Core(me, self._ledger, promises, settings, chance=random.Random(), now=time.monotonic())
        self._steps = Steps(self._core, model, self._lock, time.monotonic)
        self._seat: Seat | None = None
        self._closing = False
        self._connections = Connections(
            listener,
            Greeting(TO_TAKE_PART, run_id, b"", address),
            self._core.secret,
            patience_s=settings.suspicion_s,
            retry_s=settings.heartbeat_s,
            receive=self._receive,
            lost=self._lost,
            manifest=manifest,
        )
        self._stop = asyncio.Event()
        self._progress = (-1, time.monotonic())
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="thinwire-membership", daemon=True)
        self._thread.start()

    def begin(self) -> Turn:
        """What to evaluate next. Blocks while this machine does not take part; brings the weights up to date.

        Raises:
            NoQuorumError: nothing was committed for give_up_s.
            RefusedError, HistoryError: this machine cannot take part in this run.
            ModelMismatchError: the weights are not the run's.
        """
        while True:
            seat = self._steps.next()
            with self._lock:
                self._flush_soon()
                self._raise_if_over()
                if seat is not None:
                    self._seat = seat
                    return seat.turn
                if (
                    not self._core.ledger.has_changes
                    and not self._core.ledger.must_rebuild
                    and not self._core.work.hash_due
                ):
                    self._lock.wait(self._settings.heartbeat_s)

    def commit(self, turn: Turn, codes: bytes, rate: float) -> Sequence[Change]:
        """Hand in this machine's codes; blocks until the round is decided, with them or without.

        Raises: as begin(); ValueError for what is no answer to the turn.
        """
        seat = self._seat
        assert seat is not None
        assert seat.turn == turn
        if len(codes) != turn.samples:
            raise ValueError(f"{len(codes)} codes for a turn of {turn.samples} samples")
        if ctypes.c_float(rate).value != rate or math.isinf(rate):
            raise ValueError(f"rate: {rate!r} is not a finite fp32 number")
        with self._lock:
            self._core.contribute(seat, codes, rate, time.monotonic())
            self._flush_soon()
            self._lock.notify_all()
            while self._core.work.is_open(seat):
                self._raise_if_over()
                self._lock.wait(self._settings.heartbeat_s)
            self._raise_if_over()
            return self._steps.changes_for_commit()

    def ask_samples(self, samples: int) -> None:
        """Ask the run for another number of samples per round on this machine."""
        with self._lock:
            self._core.ask_samples(samples, time.monotonic())
            self._flush_soon()

    def metrics(self) -> dict[str, float]:
        """Of this machine since it was started: rounds committed, missed by it, and undone; elections won; messages'
        bytes to and from TCP, those of contributions alone; members of the roster; its slot (-1: none); is it leader.
        """
        with self._lock:
            core, traffic = self._core, self._connections.traffic
            return {
                "rounds_committed": float(core.work.committed),
                "rounds_missed": float(core.work.missed),
                "rounds_undone": float(self._ledger.undone),
                "elections": float(core.election.won),
                "sent_bytes": float(traffic.sent_bytes),
                "received_bytes": float(traffic.received_bytes),
                "contribution_bytes": float(traffic.frame_bytes),
                "contributions_sent": float(traffic.frames),
                "connections_refused": float(traffic.refused),
                "members": float(len(self._ledger.roster.members)),
                "slot": float(-1 if core.place.slot == NO_SLOT else core.place.slot),
                "leads": float(core.leads),
            }

    def close(self) -> None:
        """Leave: the others go on without this machine, and take it back when it returns with its log.

        Brings the weights up to date meanwhile, and says their hash where the others wait for it.
        """
        if self._closing:
            return
        with self._lock:
            self._closing = True
            self._core.leave(time.monotonic())
            self._flush_soon()
        deadline = time.monotonic() + self._settings.leave_s
        works = True
        while not self._core.left and not self._core.failure and time.monotonic() < deadline:
            if works:
                try:
                    self._steps.next()
                except Exception:  # as begin() would have raised: the weights are no longer anybody's concern
                    works = False
            with self._lock:
                self._flush_soon()
                if not self._core.left:
                    self._lock.wait(max(0.0, min(self._settings.heartbeat_s, deadline - time.monotonic())))
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _raise_if_over(self) -> None:
        core = self._core
        if core.failure is not None:
            raise core.failure
        if self._closing or core.left:
            raise NoQuorumError("this machine has left the run", operation="onebyte/round")
        committed, since = self._progress
        now = time.monotonic()
        if committed != core.ledger.committed:
            self._progress = (core.ledger.committed, now)
        elif self._settings.give_up_s is not None and now - since > self._settings.give_up_s:
            raise NoQuorumError(self._describe_standstill(now - since), operation="onebyte/round")

    def _describe_standstill(self, seconds: float) -> str:
        members = ", ".join(f"{m.slot} ({m.name}, {m.address})" for m in self._ledger.roster.members) or "nobody"
        problems = "; ".join(f"{address} {what}" for address, what in self._connections.problems.items() if address)
        return (
            f"nothing has been committed for {seconds:.0f} s (give_up_s). Members: {members}. This machine is slot "
            f"{self._core.place.slot if self._core.place.slot != NO_SLOT else 'none'}, the leader "
            f"{self._core.leader_address or 'unknown'}. {problems or 'No connection failed'}. More than half of the "
            "members must reach each other, or half of them with the lowest slot"
        )

    # In the thread of the connections.

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        try:
            await self._connections.start()
            while not self._stop.is_set():
                self._with_core(self._core.tick)
                try:
                    await asyncio.wait_for(self._stop.wait(), self._settings.heartbeat_s / _TICKS_PER_HEARTBEAT)
                except asyncio.TimeoutError:
                    pass
            self._flush()
            await self._connections.close()
        except Exception as error:
            with self._lock:
                self._core.fail(error)
                self._lock.notify_all()
            raise

    def _with_core(self, work: Callable[[float], None]) -> None:
        with self._lock:
            try:
                work(time.monotonic())
            except MessageError:
                raise
            except Exception as error:  # such as a full disk: this machine must not go on as if nothing had happened
                self._core.fail(error)
            self._flush()
            self._lock.notify_all()

    def _receive(self, sender: str, message: Control | Frame) -> None:
        self._with_core(lambda now: self._core.receive(sender, message, now))

    def _lost(self, address: str) -> None:
        self._with_core(lambda now: self._core.lost(address, now))

    def _flush(self) -> None:
        with self._lock:
            outbox, self._core.outbox = self._core.outbox, []
        for address, message in outbox:
            self._connections.send(address, message)

    def _flush_soon(self) -> None:
        if self._core.outbox and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._flush)


def _bind(address: str) -> socket.socket:
    host, port = split_address(address)
    try:
        family, kind, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except socket.gaierror as error:
        raise OSError(f"listen: {address!r} is no address of this machine: {error}") from None
    listener = socket.socket(family, kind)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(target)
        listener.listen()
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"listen: {address!r} cannot be bound: {error.strerror}") from None
    return listener
