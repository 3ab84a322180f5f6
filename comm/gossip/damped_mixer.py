"""Rounds for payloads that say only part of a vector: smaller flows, and masses that stay where they are."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from thinwire.comm.gossip.codec import Codec
from thinwire.comm.gossip.message import LACKS, SKIPPED, Message
from thinwire.comm.gossip.mixer import Mixed, SymmetricMixer, _Flow, _Sent, summing_to_one
from thinwire.comm.gossip.port import Port
from thinwire.kernels.weighted_sum import weighted_sum


@runtime_checkable
class Remembering(Protocol):
    """A Codec whose payloads are differences to what the receiver has of the sender already."""

    def knows(self, source: int) -> bool:
        """Whether this machine has what the next payload of `source` is a difference to."""
        ...

    def is_lacked(self, round: int) -> None:
        """A neighbour had said, when its `round` began, that it lacks the same of this machine. Give it."""
        ...


class DampedMixer(SymmetricMixer):
    """SymmetricMixer with a step size, over masses that do not move.

        m_i z_i += w_ij min(a_i, a_j) (s_j - s_i),   a_i = gamma_i m_i   (of the messages)

    Each end adds the negative of what the other adds, though each may choose its gamma by itself. Masses stay, because
    where part of a vector stays behind, as with everything that a payload leaves out, a mass that moved without it
    would scale it. With gamma = 1, equal masses and a codec that leaves nothing out this is SymmetricMixer, to the bit.

    An edge on which one end lacks what the other's payloads are differences to (it has just entered, or was left out
    of a merge) is skipped until it has been given that.

    Args: as SymmetricMixer's. Attributes: gamma, the step size, above 0; above 1 never makes sense.
    """

    def __init__(self, port: Port, codec: Codec, *, deadline_s: float, gamma: float = 1.0, stream: int = 0) -> None:
        super().__init__(port, codec, deadline_s=deadline_s, stream=stream)
        self.gamma = gamma

    def _stated_mass(self) -> float:
        return self.gamma * self.mass

    def _flags(self, rank: int) -> int:
        if isinstance(self._codec, Remembering) and not self._codec.knows(rank):
            return SKIPPED | LACKS
        return 0

    def _read(self, rank: int, message: Message, like: Tensor) -> Tensor | None:
        if isinstance(self._codec, Remembering):
            if message.flags & LACKS:
                self._codec.is_lacked(message.round)
            theirs = super()._read(rank, message, like)
            return theirs if self._codec.knows(rank) else None
        return super()._read(rank, message, like)

    def _mix(self, now: _Sent, flows: list[_Flow]) -> Mixed:
        on_time = {flow.rank: flow for flow in flows if flow.mine is now}
        late = [flow for flow in flows if flow.mine is not now]
        self._late += len(late)
        shares = {flow: flow.weight * (min(flow.mass, flow.mine.mass) / self.mass) for flow in flows}
        whole = len(on_time) == len(now.weights) and all(shares[f] == f.weight for f in on_time.values())
        own = now.own_weight if whole else 1.0 - sum(shares[flow] for flow in on_time.values())
        terms = {self._port.rank: (now.public, own)}
        for rank, flow in on_time.items():
            terms[rank] = (flow.theirs, shares[flow])
        own_place = sorted(terms).index(self._port.rank)
        ordered = [terms[rank] for rank in sorted(terms)]
        for flow in late:
            ordered.append((flow.theirs, shares[flow]))
            ordered.append((flow.mine.public, -shares[flow]))
        weights = summing_to_one([weight for _, weight in ordered], own_place, now.public.dtype)
        average = weighted_sum([vector for vector, _ in ordered], weights)
        return Mixed(now.public, average, self.mass, self.mass)
