"""Exchanges of pairs at their own pace: one asks, the other answers when it gets to it, and the mean stays exact.

Machine i asks with (s_i, m_i), its vector as j will read it and its mass; j answers with (s_j, m_j). Each end then adds

    m_i z_i += mu (s_j - s_i),   m_j z_j += mu (s_i - s_j),   mu = m_i m_j / (m_i + m_j)

which for unchanged z is the mean of both, weighted by mass, and whose sum is 0: j adds it when it answers, i when the
answer has come, and neither what either has done meanwhile nor how long it takes moves sum m z. Masses do not change.

This takes a port that loses nothing between two machines that live; over links that do, push_counters.py is exact.

Nobody waits: an ask that has no answer yet keeps its machine from nothing but asking the same one again. Of a machine
that is lost, asks are dropped on both sides, so it takes along what it held.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from thinwire.comm.gossip.codec import Codec
from thinwire.comm.gossip.message import Kind, Message
from thinwire.comm.gossip.port import Port
from thinwire.comm.wire import PayloadError
from thinwire.kernels.weighted_sum import weighted_sum


@dataclass(frozen=True, eq=False)
class Swap:
    """What an exchange brings this machine.

    mine, theirs: as both ends read them. mass, other: of this machine when it sent `mine`, and of the other. first:
    whether this machine is the one of lower rank.
    """

    mine: Tensor
    theirs: Tensor
    mass: float
    other: float
    first: bool

    def step(self, mass: float) -> float:
        """c in z += c (theirs - mine), for a machine whose mass now is `mass`."""
        return self.other / (self.mass + self.other) * (self.mass / mass)

    def onto(self, value: Tensor, mass: float) -> Tensor:
        """`value` after the exchange; if it is what was sent, the same bits on both ends."""
        if mass != self.mass:
            return value + self.step(mass) * (self.theirs - self.mine)
        both = self.mass + self.other
        terms = [(self.mine, self.mass / both), (self.theirs, self.other / both)]
        ordered = terms if self.first else terms[::-1]
        average = weighted_sum([vector for vector, _ in ordered], [weight for _, weight in ordered])
        return average.add_(value - self.mine)


@dataclass(frozen=True, eq=False)
class _Asked:
    """An ask under way. generation: of the machine that was asked; another in its place will not answer."""

    number: int
    mine: Tensor
    mass: float
    overdue_at: float
    generation: int


class Swaps:
    """One machine's exchanges of one vector.

    Args:
        codec: without a memory of its own, since partners change.
        asks: how many asks may be under way; those older than deadline_s do not count.
        stream: of the messages.
    Attributes: mass, this machine's; made, exchanges so far; sent_bytes, of payloads so far, by machine.
    """

    def __init__(self, port: Port, codec: Codec, *, asks: int, deadline_s: float, stream: int = 0) -> None:
        assert not codec.remembers
        self._port = port
        self._codec = codec
        self._asks = asks
        self._deadline_s = deadline_s
        self._stream = stream
        self._under_way: dict[int, _Asked] = {}  # by machine
        self._number = 0
        self.mass = 1.0
        self.made = 0
        self.sent_bytes: dict[int, int] = {}

    def payload_bytes(self, numel: int, itemsize: int) -> int:
        """Of every ask and answer."""
        count = self._codec.payload_bytes(numel, itemsize)
        assert count is not None
        return count

    def can_ask(self, ranks: list[int]) -> list[int]:
        """Those of the machines that may be asked now."""
        self._forget_the_lost()
        waiting = sum(asked.overdue_at > self._port.now() for asked in self._under_way.values())
        if waiting >= self._asks:
            return []
        lost = self._port.lost()
        return [rank for rank in ranks if rank not in lost and rank not in self._under_way]

    def ask(self, rank: int, value: Tensor) -> None:
        """Begin an exchange with a machine that can_ask() names."""
        assert rank not in self._under_way
        self._number += 1
        payload, mine = self._codec.encode(self._number, value)
        overdue_at = self._port.now() + self._deadline_s
        generation = self._port.generation(rank)
        self._under_way[rank] = _Asked(self._number, mine, self.mass, overdue_at, generation)
        self._send(rank, Message(Kind.SWAP_ASK, self._number, self.mass, self._stream, 0, payload))

    def take_answer(self, like: Tensor) -> Swap | None:
        """The oldest answer that has come."""
        for rank in self._port.waiting(Kind.SWAP_ANSWER, self._stream):
            message = self._port.take(rank, Kind.SWAP_ANSWER, self._stream)
            self._forget_the_lost()
            asked = self._under_way.get(rank)
            if asked is not None and asked.number == message.round:  # and not the answer to an earlier run's
                theirs = self._read(rank, message, like)
                del self._under_way[rank]
                return self._swap(rank, asked.mine, theirs, asked.mass, message.mass)
        return None

    def is_asked(self) -> bool:
        """Whether answer() would find somebody."""
        lost = self._port.lost()
        return any(rank not in lost for rank in self._port.waiting(Kind.SWAP_ASK, self._stream))

    def answer(self, value: Tensor) -> Swap | None:
        """Answer the machine that has waited longest; None if none waits. Asks of lost machines are dropped."""
        for rank in self._port.waiting(Kind.SWAP_ASK, self._stream):
            message = self._port.take(rank, Kind.SWAP_ASK, self._stream)
            if rank in self._port.lost():
                continue
            theirs = self._read(rank, message, value)
            payload, mine = self._codec.encode(message.round, value)
            self._send(rank, Message(Kind.SWAP_ANSWER, message.round, self.mass, self._stream, 0, payload))
            return self._swap(rank, mine, theirs, self.mass, message.mass)
        return None

    def under_way(self) -> bool:
        """Whether an answer is awaited, from a machine that lives."""
        self._forget_the_lost()
        return bool(self._under_way)

    def has_news(self) -> bool:
        """Whether an answer has come."""
        return bool(self._port.waiting(Kind.SWAP_ANSWER, self._stream))

    def forget(self) -> None:
        """Drop all asks under way, as where another state is taken."""
        self._under_way.clear()

    def _send(self, rank: int, message: Message) -> None:
        self._port.send(rank, message)
        self.sent_bytes[rank] = self.sent_bytes.get(rank, 0) + len(message.payload)

    def _swap(self, rank: int, mine: Tensor, theirs: Tensor, mass: float, other: float) -> Swap:
        self.made += 1
        return Swap(mine, theirs, mass, other, self._port.rank < rank)

    def _read(self, rank: int, message: Message, like: Tensor) -> Tensor:
        if message.mass <= 0:
            raise PayloadError(f"an exchange with machine {rank}, whose mass is {message.mass}; it must be above 0")
        return self._codec.decode(rank, message.round, message.payload, like)

    def _forget_the_lost(self) -> None:
        lost = self._port.lost()
        for rank, asked in list(self._under_way.items()):
            if rank in lost or self._port.generation(rank) != asked.generation:
                del self._under_way[rank]
