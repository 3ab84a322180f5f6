"""One machine's side of what it has with one other: what is to be sent, what has come, and whether the other lives.

Messages are numbered. The sender keeps each until the other has said that it has it; on a new connection both say how
many they have, and what was lost on the way is sent again. So messages arrive in order and once each, however often
connections break.

A machine from which nothing is heard for lost_after_s is lost: what is kept for it is dropped, and it must begin anew.
Which is what it does if its process starts again (its incarnation changes), or if it comes back from beyond a cut
(the epoch of the pair has risen): both then forget all that was under way between them.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from thinwire.comm.gossip.message import Kind, Message, no_payload
from thinwire.comm.gossip.post.connection import Connection
from thinwire.comm.gossip.post.frame import GOODBYE, SIGN_OF_LIFE, Header
from thinwire.comm.gossip.post.handshake import Greeting, fresh_nonce
from thinwire.comm.wire import PayloadError

_TELL_S = 0.02  # what has been received is told within this time, if not before by a message that goes out anyway
_TELL_BYTES = 1 << 20
_TELL_MESSAGES = 64
_SLACK = 4


@dataclass(frozen=True, slots=True)
class LinkLimits:
    """When a machine counts as lost.

    lost_after_s: after so many seconds of silence. backlog_bytes, backlog_messages: when more would have to be kept for
    it; four of the longest message are always kept.
    """

    lost_after_s: float
    backlog_bytes: int
    backlog_messages: int


class Link:
    """What this machine has with one other. Its methods are for any thread.

    Args:
        rank: the other.
        me: (size, rank, incarnation) of this machine.
        grace_s: how long the other may take to appear for the first time.
        deliver: takes a message of the other. on_lost, on_anew: told that it is lost, that it has begun anew.
    Attributes: changed, held and notified on every change; connection, the present one; met, whether the other has been
        there; lost; leaving, whether this machine is; problem, what was last wrong with it, for people.
    """

    def __init__(
        self,
        rank: int,
        me: tuple[int, int, int],
        limits: LinkLimits,
        *,
        grace_s: float,
        deliver: Callable[[Message], None],
        on_lost: Callable[[], None],
        on_anew: Callable[[], None],
    ) -> None:
        self.rank = rank
        self.changed = threading.Condition(threading.RLock())
        self.connection: Connection | None = None
        self.lost = False
        self.leaving = False
        self.problem = "has not connected yet"
        self._me = me
        self._limits = limits
        self._deliver, self._on_lost, self._on_anew = deliver, on_lost, on_anew
        self._heard_at = time.monotonic() + grace_s
        self._incarnation = 0
        self._former: set[int] = set()
        self._epoch = 0
        self._generation = 0
        self._last: Connection | None = None
        self._kept: deque[Message] = deque()
        self._kept_bytes = 0
        self._longest_bytes = 0
        self._first = 0  # number of _kept[0]
        self._next = 0  # number of what goes out next on the present connection
        self._received = 0
        self._told = 0  # of _received
        self._untold_bytes = 0
        self._untold_since = 0.0
        self._signed_at = 0.0

    @property
    def met(self) -> bool:
        return bool(self._incarnation)

    def push(self, message: Message, generation: int) -> bool:
        """Keep a message until it has arrived; whether it is: not for one that is lost or has begun anew since."""
        count = len(message.payload)
        with self.changed:
            if self.lost or self.leaving or generation != self._generation:
                return False
            self._longest_bytes = max(self._longest_bytes, count)
            most_bytes = max(self._limits.backlog_bytes, _SLACK * self._longest_bytes)
            if self._kept_bytes + count > most_bytes or len(self._kept) >= self._limits.backlog_messages:
                self._lose(f"left {len(self._kept)} messages of {self._kept_bytes} bytes unread")
                return False
            self._kept.append(message)
            self._kept_bytes += count
            self.changed.notify_all()
            return True

    def greeting(self) -> Greeting:
        """What this machine says to the other on a new connection. Raises PayloadError if it is leaving."""
        size, rank, incarnation = self._me
        with self.changed:
            if self.leaving:
                raise PayloadError("this machine is leaving")
            return Greeting(
                size, rank, self.rank, incarnation, self._incarnation, self._epoch, self._received, fresh_nonce()
            )

    def take_up(self, connection: Connection, mine: Greeting, theirs: Greeting) -> None:
        """Go on with a connection on which both have greeted.

        Raises:
            PayloadError: the other is a machine in whose place another has come, or makes no sense.
        """
        with self.changed:
            if self.leaving or (mine.known, mine.epoch) != (self._incarnation, self._epoch):
                raise PayloadError("what this machine has said in its greeting no longer holds")
            if theirs.incarnation in self._former:
                raise PayloadError("it has left, or another process has taken its place")
            same = self._incarnation == theirs.incarnation
            anew = self.met and (not same or theirs.epoch > self._epoch)
            if anew or self.lost:
                self._begin_anew()
                if self.met and not same:
                    self._former.add(self._incarnation)
                self.lost = False
                self._generation += 1
                self._on_anew()
            counts = theirs.known == self._me[2] and theirs.epoch == mine.epoch and (same or not self.met)
            resume = max(theirs.received, self._first) if counts else 0
            if resume > self._first + len(self._kept):
                raise PayloadError(f"it has {resume} messages where {self._first + len(self._kept)} were sent")
            self._incarnation = theirs.incarnation
            self._epoch = max(self._epoch, theirs.epoch)
            self._forget_received_by_other(resume)
            self._next = resume
            self._told = -1  # say at once that this machine is here
            self._untold_since = 0.0
            self._heard_at = time.monotonic()
            self.problem = ""
            if self.connection is not None:
                self.connection.hang_up()
            self.connection = connection
            self.changed.notify_all()

    def next_frame(self, connection: Connection) -> tuple[Header, Tensor] | None:
        """Wait for something to send on this connection; None: it is no longer the present one."""
        beat_s = self._limits.lost_after_s / 4
        with self.changed:
            while self.connection is connection:
                now = time.monotonic()
                waits = self._first + len(self._kept) > self._next
                if waits or now >= min(self._tell_at(), self._signed_at + beat_s):
                    message = self._kept[self._next - self._first] if waits else None
                    self._next += waits
                    self._told, self._untold_bytes = self._received, 0
                    self._signed_at = now
                    return self._frame(message)
                self.changed.wait(min(self._tell_at(), self._signed_at + beat_s) - now)
            return None

    def take_in(self, connection: Connection, header: Header, payload: Tensor) -> bool:
        """A frame has come; whether more may follow.

        Raises:
            PayloadError: it makes no sense.
        """
        with self.changed:
            if self.connection is not connection:
                return self.leaving  # then what still comes is read to its end, so that the system resets nothing
            if not self._first <= header.received <= self._next:
                raise PayloadError(f"it has {header.received} messages of {self._first} to {self._next}")
            self._forget_received_by_other(header.received)
            if header.kind == GOODBYE:
                self._former.add(self._incarnation)
                self._lose("has left")
                return False
            if header.kind == SIGN_OF_LIFE or header.number < self._received:
                return True
            if header.number > self._received:
                raise PayloadError(f"message {header.number} came where {self._received} was expected")
            self._received += 1
            if self._untold_bytes == 0:
                self._untold_since = time.monotonic()
            self._untold_bytes += 1 + header.payload_bytes
            if self._received - self._told == 1 or self._tell_at() == 0.0:
                self.changed.notify_all()
            kind = Kind(header.kind)
            self._deliver(Message(kind, header.round, header.mass, header.stream, header.flags, payload))
            return True

    def heard(self, something: bool) -> None:
        """Bytes have come, or none for a while."""
        with self.changed:
            if something:
                self._heard_at = time.monotonic()
            else:
                self.check()

    def check(self) -> None:
        """Count the other as lost if it has been silent for too long."""
        with self.changed:
            if not self.lost and time.monotonic() - self._heard_at > self._limits.lost_after_s:
                self._lose(self.problem or f"has been silent for {self._limits.lost_after_s:g} s")

    def complain(self, problem: str) -> None:
        """Note why there is no connection; not for one that is lost, of which more is known."""
        with self.changed:
            if self.connection is None and not self.lost:
                self.problem = problem

    def give_up(self, why: str) -> None:
        """Count the other as lost."""
        with self.changed:
            if not self.lost:
                self._lose(why)

    def broken(self, connection: Connection, problem: str) -> None:
        """A connection is of no use any more."""
        connection.hang_up()
        with self.changed:
            if self.connection is connection:
                self.connection = None
                self.problem = problem
                self.changed.notify_all()

    def say_goodbye(self, until: float, *, farewell: bool) -> None:
        """Wait until the other has everything, but not past `until`, and tell it that this machine leaves."""
        with self.changed:
            while self._kept and not self.lost and (left_s := until - time.monotonic()) > 0:
                self.changed.wait(left_s)
            self.leaving = True
            self._last, self.connection = self.connection, None
            self.changed.notify_all()
            frame = Header(GOODBYE, 0, 0, 0, 0, self._received, 0, 0.0, 0)
            has_everything = not self._kept
        if self._last is None:
            return
        if farewell and has_everything:
            with contextlib.suppress(OSError):
                self._last.send(frame, no_payload())
            self._last.end_sending()
        else:
            self._last.hang_up()

    def hang_up(self) -> None:
        """After say_goodbye(): the other has had time to take leave."""
        if self._last is not None:
            self._last.hang_up()

    def _frame(self, message: Message | None) -> tuple[Header, Tensor]:
        if message is None:
            return Header(SIGN_OF_LIFE, 0, 0, 0, 0, self._received, 0, 0.0, 0), no_payload()
        number, payload = self._next - 1, message.payload
        header = Header(
            message.kind,
            message.flags,
            message.stream,
            message.round,
            number,
            self._received,
            len(payload),
            message.mass,
            0,
        )
        return header, payload

    def _tell_at(self) -> float:
        """When to say how much has been received, if nothing else is said before."""
        if self._told == self._received:
            return float("inf")
        urgent = self._untold_bytes >= _TELL_BYTES or self._received - self._told >= _TELL_MESSAGES
        return 0.0 if urgent or self._told < 0 else self._untold_since + _TELL_S

    def _forget_received_by_other(self, count: int) -> None:
        while self._first < count:
            self._kept_bytes -= len(self._kept.popleft().payload)
            self._first += 1
        if not self._kept:
            self.changed.notify_all()

    def _lose(self, why: str) -> None:
        self.lost = True
        self.problem = why
        self._begin_anew()
        if self.met:
            self._epoch += 1
        if self.connection is not None:
            self.connection.hang_up()
            self.connection = None
        self._on_lost()
        self.changed.notify_all()

    def _begin_anew(self) -> None:
        self._kept.clear()
        self._kept_bytes = self._first = self._next = self._received = self._told = self._untold_bytes = 0
