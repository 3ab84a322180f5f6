"""Who answers: machines are pinged in the order of a round until enough of them have."""

from __future__ import annotations

from collections.abc import Set

from thinwire.comm.gossip.algorithms.modest_view import View, order_of
from thinwire.comm.gossip.message import Kind, Message
from thinwire.comm.gossip.port import Port, Script, Wait

PING, PONG = 0, 1
"""Streams of Kind.SAMPLE."""
_BUSY = 1


class RollCall:
    """Pings and their answers, of one machine.

    Args:
        seed: of the order, the same on all machines.
        view: who belongs to the run.
        inactive_rounds: a member that was active in none of so many rounds is not asked.
        ping_s: how long an answer may take. Who has not answered in that time is asked again in later rounds, but not
            waited for, until something is heard of it.
    """

    def __init__(self, port: Port, view: View, *, seed: int, inactive_rounds: int, ping_s: float) -> None:
        self._port = port
        self._rank = port.rank
        self._view = view
        self._seed = seed
        self._inactive_rounds = inactive_rounds
        self._ping_s = ping_s
        self._generations = [port.generation(rank) for rank in range(port.size)]
        self.forget()

    def forget(self) -> None:
        """Drop all answers, and all that is held against machines."""
        self._answers: dict[int, dict[int, tuple[int, bool]]] = {}  # by round: who, the round of its model, busy or not
        self._silent: set[int] = set()

    def forget_before(self, round: int) -> None:
        """Drop the answers of earlier rounds."""
        for old in [old for old in self._answers if old < round]:
            del self._answers[old]

    def order(self, round: int) -> list[int]:
        """All members, in the order of a round."""
        for rank in range(self._port.size):
            if self._port.generation(rank) != self._generations[rank]:  # a new machine in an old place
                self._generations[rank] = self._port.generation(rank)
                self._view.saw(rank, round)
                self._view.join(rank)
        return order_of(self._seed, round, self._view.members(round, self._inactive_rounds))

    def heard(self, rank: int) -> None:
        """Something has come from a machine."""
        self._silent.discard(rank)

    def answer(self, rank: int, round: int, *, of: int, busy: bool) -> None:
        """Answer a ping. Args: of, the round of this machine's model; busy, whether it trains."""
        if self._view.changes[self._rank] % 2 == 0:
            self._port.send(rank, Message(Kind.SAMPLE, round, float(of), PONG, _BUSY if busy else 0))

    def answered(self, rank: int, message: Message) -> None:
        """The answer to a ping."""
        if message.round in self._answers:
            self._answers[message.round][rank] = int(message.mass), bool(message.flags & _BUSY)

    def draw(self, round: int, count: int, without: Set[int]) -> Script[list[int]]:
        """The first `count` machines in the order of a round that answer; at least one: this machine does."""
        order = [rank for rank in self.order(round) if rank not in without] or self.order(round)
        asked, batch = 0, 2 * count
        while True:
            for rank in order[asked : asked + batch]:
                self._ping(rank, round)
            asked, batch = asked + batch, 2 * batch
            candidates = order[:asked]
            yield Wait(lambda: self._is_settled(round, candidates, count), self._port.now() + self._ping_s)  # noqa: B023
            here = [rank for rank in candidates if self._is_here(rank, round)]
            if len(here) < count:
                self._silent.update(set(candidates) - set(here))
            if len(here) >= count or asked >= len(order):
                return here[:count] or [self._rank]

    def ask_all(self, round: int) -> Script[dict[int, tuple[int, bool]]]:
        """Who answers, with the round of its model and whether it trains."""
        self._answers[round] = {}
        for rank in range(self._port.size):
            self._ping(rank, round)
        yield Wait(lambda: False, self._port.now() + self._ping_s)
        return self._answers.get(round, {})

    def _ping(self, rank: int, round: int) -> None:
        self._answers.setdefault(round, {})
        if not self._is_here(rank, round):
            self._port.send(rank, Message(Kind.SAMPLE, round, stream=PING))

    def _is_here(self, rank: int, round: int) -> bool:
        return rank == self._rank or rank in self._answers.get(round, {})

    def _is_settled(self, round: int, candidates: list[int], count: int) -> bool:
        """Whether those who will be chosen are known: nobody before them may still answer."""
        lost, here = self._port.lost(), 0
        for rank in candidates:
            if self._is_here(rank, round):
                here += 1
            elif rank not in lost and rank not in self._silent:
                return False
            if here == count:
                return True
        return True
