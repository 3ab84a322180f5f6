"""All machines that are alive agree on who they are: what a consistent cut and a global average begin with.

Every machine tells the lowest machine that is alive that it has come, with a yes or no. That one waits until all that
are alive have come, for a deadline at most, and says who came and who said yes. Whoever learns it passes it on to all
before acting on it, so that a leader that dies in the middle of saying it leaves nobody without it: either nobody alive
knows, and the next machine leads, or all will know. This is exact as long as machines are lost only when they are gone.
Machines that are merely later than the deadline are left out; while a leader is overdue as well, two decisions can
cross, and what is built on one, such as a merge, has to notice that others do not take part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from thinwire.comm.gossip.message import Kind, Message
from thinwire.comm.gossip.port import Port, Script, Wait
from thinwire.comm.wire import PayloadError

BARRIER_STREAM = 0
MERGE_STREAM = 2
_YES = 1


@dataclass(frozen=True)
class Agreed:
    """What all machines that are alive know alike. present: who came; yes: who of them said yes."""

    present: frozenset[int]
    yes: frozenset[int]


@dataclass(frozen=True)
class Serving:
    """What a machine does for others while it waits for something else: Algorithm.asked() and serve()."""

    asked: Callable[[], bool] = lambda: False
    serve: Callable[[], None] = lambda: None

    def wait(self, port: Port, ready: Callable[[], bool], until: float) -> Script[None]:
        """Wait until ready() or the time `until`, and answer those who ask meanwhile."""
        while not ready() and port.now() < until:
            if self.asked():
                self.serve()
            yield Wait(lambda: ready() or self.asked(), until)


def barrier(
    port: Port,
    number: int,
    *,
    deadline_s: float,
    asked: Callable[[], bool] = lambda: False,
    serve: Callable[[], None] = lambda: None,
) -> Script[frozenset[int]]:
    """Wait until all machines that are alive have come. Returns those that have, the same set to each.

    What they sent to this machine before they came has arrived by then.

    Args:
        number: of this barrier, the same on all machines; each later one has a higher one.
        deadline_s: how long the last one is waited for. It is then left out, and its set does not contain itself.
        asked, serve: as Algorithm says.
    """
    serving = Serving(asked, serve)
    agreed = yield from agree(port, number, True, deadline_s=deadline_s, serving=serving)
    talk = _Talk(port, number, BARRIER_STREAM)
    silent = sorted(agreed.present - {port.rank})

    def is_quiet() -> bool:
        while silent and (talk.has_passed_on(silent[-1]) or silent[-1] in port.lost()):
            silent.pop()  # so that among n machines this takes n looks in all, not n at each message
        return not silent

    # Nothing overtakes the word that each of them passes on to this machine.
    yield from serving.wait(port, is_quiet, port.now() + deadline_s)
    return agreed.present


def agree(
    port: Port, number: int, vote: bool, *, deadline_s: float, serving: Serving, stream: int = BARRIER_STREAM
) -> Script[Agreed]:
    """Learn which machines have come to `number`, and which of them voted yes.

    Args: stream: two streams from this one on carry it; numbers of one stream rise.
    """
    talk = _Talk(port, number, stream)
    overdue: set[int] = set()
    while True:
        if (agreed := talk.heard()) is not None:
            talk.pass_on(agreed)
            return agreed
        leader = min(set(range(port.size)) - port.lost() - overdue)
        if leader == port.rank:
            until = port.now() + deadline_s
            yield from serving.wait(port, lambda: talk.heard() is not None or talk.all_came(overdue), until)
            if talk.heard() is None:
                agreed = talk.count(vote)
                talk.pass_on(agreed)
                return agreed
        else:
            talk.come_to(leader, vote)
            # A leader waits for one deadline itself.
            until = port.now() + 2 * deadline_s
            gone = _IsLost(port, leader)
            yield from serving.wait(port, lambda: talk.heard() is not None or gone(), until)  # noqa: B023
            if talk.heard() is None and not gone():
                overdue.add(leader)


@dataclass(frozen=True)
class _IsLost:
    port: Port
    rank: int

    def __call__(self) -> bool:
        return self.rank in self.port.lost()


class _Talk:
    """The messages of one agreement."""

    def __init__(self, port: Port, number: int, stream: int) -> None:
        self._port = port
        self._number = number
        self._come = stream
        self._said = stream + 1

    def come_to(self, leader: int, vote: bool) -> None:
        """Tell it that this machine has come."""
        flags = _YES if vote else 0
        self._port.send(leader, Message(Kind.BARRIER, self._number, stream=self._come, flags=flags))

    def all_came(self, overdue: Iterable[int]) -> bool:
        """Whether all have come that are alive and not overdue."""
        awaited = set(range(self._port.size)) - self._port.lost() - set(overdue) - {self._port.rank}
        return all(self._of(rank, self._come) is not None for rank in awaited)

    def has_passed_on(self, rank: int) -> bool:
        """Whether a machine has said to this one what all agreed on."""
        return self._of(rank, self._said) is not None

    def count(self, vote: bool) -> Agreed:
        """What has come until now, with this machine's own vote."""
        came = {rank: self._of(rank, self._come) for rank in range(self._port.size) if rank not in self._port.lost()}
        flags = {rank: message.flags for rank, message in came.items() if message is not None}
        flags[self._port.rank] = _YES if vote else 0
        return Agreed(frozenset(flags), frozenset(rank for rank, bits in flags.items() if bits & _YES))

    def heard(self) -> Agreed | None:
        """What somebody has said that all agreed on."""
        for rank in self._port.waiting(Kind.BARRIER, self._said):
            if (message := self._of(rank, self._said)) is not None:
                return decode(message.payload, self._port.size)
        return None

    def pass_on(self, agreed: Agreed) -> None:
        """Say it to all, also to those who were left out."""
        payload = encode(agreed, self._port.size)
        for rank in range(self._port.size):
            if rank != self._port.rank:
                self._port.send(rank, Message(Kind.BARRIER, self._number, stream=self._said, payload=payload))

    def _of(self, rank: int, stream: int) -> Message | None:
        """The message of this number from a machine; those of lower numbers are dropped."""
        while (message := self._port.peek(rank, Kind.BARRIER, stream)) and message.round < self._number:
            self._port.take(rank, Kind.BARRIER, stream)
        return message if message is not None and message.round == self._number else None


def encode(agreed: Agreed, size: int) -> Tensor:
    """Two bits per machine: those present, then those that said yes."""
    bits = [[rank in group for rank in range(size)] for group in (agreed.present, agreed.yes)]
    return torch.from_numpy(np.packbits(np.array(bits), axis=1, bitorder="little").reshape(-1).copy())


def decode(payload: Tensor, size: int) -> Agreed:
    """What encode() was given.

    Raises:
        PayloadError: it is no such payload.
    """
    width = -(-size // 8)
    if len(payload) != 2 * width:
        raise PayloadError(f"an agreement of {size} machines takes {2 * width} bytes, not {len(payload)}")
    bits = np.unpackbits(payload.numpy().reshape(2, width), axis=1, bitorder="little")
    present, yes = (frozenset(np.flatnonzero(row).tolist()) for row in bits)
    if max(present | yes, default=0) >= size or not yes <= present or not present:
        raise PayloadError(f"an agreement of machines {sorted(present)}, of which {sorted(yes)} say yes, among {size}")
    return Agreed(present, yes)
