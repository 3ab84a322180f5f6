"""One round among neighbours, exact in the mean through local steps under way, lateness and loss.

Every machine i has a vector z_i and a mass m_i (1 unless machines have joined); what is preserved is sum_i m_i z_i.

Symmetric rounds. On an edge each end sends (s, m), what it holds when the round begins, and later adds the *flow*

    m_i z_i += w_ij (m_j s_j - m_i s_i),   m_i += w_ij (m_j - m_i)        (with the m of the messages)

which is the negative of what the other end adds, whenever either gets to it: so neither steps taken in between nor a
message that comes after its deadline move the mean. An edge whose answer is overdue takes no part in later rounds until
the answer has come: its owner sends SKIPPED instead, and a flow counts only if neither end has skipped; each end
knows its own word and will know the other's, so both decide alike. A machine that is lost takes along what it held.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from thinwire.comm.errors import OwnWeightsError
from thinwire.comm.finite import are_finite
from thinwire.comm.gossip.codec import Codec
from thinwire.comm.gossip.message import NON_FINITE, SKIPPED, Kind, Message, no_payload
from thinwire.comm.gossip.mixing import Mixing
from thinwire.comm.gossip.port import Port, Script, Wait
from thinwire.kernels.weighted_sum import weighted_sum

_FP32_STEPS = 1 << 22  # multiples of 1 / this, and 1 less them, are numbers of fp32


@dataclass(frozen=True)
class Mixed:
    """What a round gives: the average of what was sent, and how the masses changed.

    sent: this machine's own public vector; average: (sum of the flows + mass_before sent) / mass_after. arrears: the
    sum of the flows that came late, each times the rounds that it did, over mass_after: for algorithms in which a flow
    goes on acting in later rounds; None: there were none, or the mixer is not SymmetricMixer.
    """

    sent: Tensor
    average: Tensor
    mass_before: float
    mass_after: float
    arrears: Tensor | None = None

    def onto(self, value: Tensor) -> Tensor:
        """`value` after the round: average + mass_before / mass_after * (value - sent).

        Args: value: what `sent` has become since by local steps; if it still is what was sent, give `sent` itself.
        """
        if value is self.sent:
            return self.average
        moved = value - self.sent
        if self.mass_before != self.mass_after:
            moved *= self.mass_before / self.mass_after
        return moved.add_(self.average)


class Mixer(Protocol):
    """Rounds of one vector. One is under way at a time.

    Attributes: mass, this machine's.
    """

    mass: float

    def begin(self, round: int, mixing: Mixing, value: Tensor) -> Tensor:
        """Send this machine's vector. Returns what was sent, as the others will read it.

        Raises:
            OwnWeightsError: it is not finite. The neighbours have been told to do without it, and no round is open.
        """
        ...

    def finish(self) -> Script[Mixed]:
        """Wait for the round's messages, until its deadline at most."""
        ...

    def settle(self) -> Script[Mixed | None]:
        """Wait for what is overdue from earlier rounds, for a deadline; None if there is nothing to add.

        What has not come by then stays owed: after a barrier, behind which nothing is on the wire, it has.
        """
        ...

    def sent_bytes(self, mixing: Mixing, numel: int, itemsize: int) -> dict[int, int]:
        """Payload bytes that begin() sends, by machine; of a codec whose payloads vary, those that it sent last."""
        ...

    def metrics(self) -> dict[str, float]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True, eq=False)
class _Sent:
    """What this machine gave in a round, kept until every edge of it has answered.

    weights: of the neighbours that it did not skip; own_weight: what is left for itself. generations: of those
    neighbours: one that has begun anew since has not received it, so neither end may count what the other gave.
    """

    round: int
    weights: dict[int, float]
    generations: dict[int, int]
    own_weight: float
    public: Tensor
    mass: float
    until: float


@dataclass(frozen=True, eq=False)
class _Flow:
    """What one edge brings: rank, the neighbour; mine, what this machine gave for it."""

    rank: int
    weight: float
    mine: _Sent
    theirs: Tensor
    mass: float


class SymmetricMixer:
    """Mixer for symmetric mixings.

    Args:
        deadline_s: how long a round waits for a neighbour, from its begin().
        stream: of the messages.
    """

    def __init__(self, port: Port, codec: Codec, *, deadline_s: float, stream: int = 0) -> None:
        self._port = port
        self._codec = codec
        self._deadline_s = deadline_s
        self._stream = stream
        self._open: _Sent | None = None
        self._overdue: dict[int, _Sent] = {}  # by neighbour
        self._last: _Sent | None = None  # the last round, where something may still come of it
        self.mass = 1.0
        self._given: dict[int, int] = {}  # payload bytes of the last round, by receiver
        self._late = 0
        self._absent = 0

    def begin(self, round: int, mixing: Mixing, value: Tensor) -> Tensor:
        """As Mixer says."""
        assert self._open is None
        assert mixing.symmetric
        refuse_non_finite(self._port, value, round, mixing.sources(self._port.rank), Kind.VALUE, self._stream)
        payload, public = self._codec.encode(round, value)
        self._given = {}
        row, lost = mixing.rows[self._port.rank], self._port.lost()
        weights: dict[int, float] = {}
        generations: dict[int, int] = {}
        for rank in mixing.sources(self._port.rank):
            flags = self._flags(rank) | (SKIPPED if rank in self._overdue or rank in lost else 0)
            generations[rank] = self._port.generation(rank)
            if not flags & SKIPPED:
                weights[rank] = row[rank]
            given = no_payload() if flags & SKIPPED and not self._codec.remembers else payload
            self._port.send(rank, Message(Kind.VALUE, round, self._stated_mass(), self._stream, flags, given))
            self._given[rank] = len(given)
        until = self._port.now() + self._deadline_s
        whole = len(weights) == len(mixing.sources(self._port.rank))
        own = row.get(self._port.rank, 0.0) if whole else 1.0 - sum(weights.values())
        self._open = _Sent(round, weights, generations, own, public, self._stated_mass(), until)
        return public

    def finish(self) -> Script[Mixed]:
        """As Mixer says."""
        now = self._open
        assert now is not None
        self._open = None
        yield Wait(lambda: all(self._has_answered(rank, now) for rank in now.weights), now.until)
        flows = self._take(now)
        for rank in now.weights:
            if not self._has_answered(rank, now):
                self._overdue[rank] = now
        self._last = now if self._overdue or self._codec.remembers else None
        return self._mix(now, flows)

    def settle(self) -> Script[Mixed | None]:
        """As Mixer says. Nothing may be under way. What has not come by then is still owed."""
        assert self._open is None
        last = self._last
        if last is None or not (self._overdue or self._codec.remembers):
            return None
        until = self._port.now() + self._deadline_s
        yield Wait(lambda: all(self._has_answered(rank, sent) for rank, sent in self._overdue.items()), until)
        nothing = _Sent(last.round, {}, {}, 1.0, last.public, self.mass, until)
        flows = self._take(nothing)
        return self._mix(nothing, flows) if flows else None

    def sent_bytes(self, mixing: Mixing, numel: int, itemsize: int) -> dict[int, int]:
        """As Mixer says."""
        count = self._codec.payload_bytes(numel, itemsize)
        return dict(self._given) if count is None else {rank: count for rank in mixing.sources(self._port.rank)}

    def metrics(self) -> dict[str, float]:
        """`mass`; `late`, flows that came after their round; `overdue`, neighbours that still owe one.

        `absent`, messages of neighbours whose vector was not finite.
        """
        return {
            "mass": self.mass,
            "late": float(self._late),
            "overdue": float(len(self._overdue)),
            "absent": float(self._absent),
        }

    def state_dict(self) -> dict[str, Any]:
        """The mass, and the codec's memory. What a neighbour owes even after settle() is not part of it."""
        assert self._open is None, "finish() first"
        return {"mass": self.mass, "codec": self._codec.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what state_dict() gave."""
        self._open = self._last = None
        self._overdue.clear()
        self.mass = float(state["mass"])
        self._codec.load_state_dict(state["codec"])

    def _stated_mass(self) -> float:
        """What messages say of this machine's mass."""
        return self.mass

    def _flags(self, rank: int) -> int:
        """Flags of every message to a neighbour."""
        return 0

    def _read(self, rank: int, message: Message, like: Tensor) -> Tensor | None:
        """What a payload says; None: nothing to either end, so that it makes no flow."""
        return self._codec.decode(rank, message.round, message.payload, like)

    def _has_answered(self, rank: int, sent: _Sent) -> bool:
        if self._port.generation(rank) != sent.generations[rank]:
            return True  # it never will
        return self._port.newest(rank, Kind.VALUE, self._stream) >= sent.round or rank in self._port.lost()

    def _take(self, now: _Sent) -> list[_Flow]:
        """Everything that has arrived of rounds up to this one, as flows: those of this round first, by rank."""
        flows = []
        for rank in sorted(self._port.waiting(Kind.VALUE, self._stream)):
            while (message := self._port.peek(rank, Kind.VALUE, self._stream)) and message.round <= now.round:
                self._port.take(rank, Kind.VALUE, self._stream)
                if message.flags & NON_FINITE:
                    self._absent += 1
                    continue
                mine = self._sent_in(rank, message.round, now)
                counts = mine is not None and not message.flags & SKIPPED
                if not (counts or self._codec.remembers):
                    continue
                theirs = self._read(rank, message, now.public)
                if mine is not None and counts and theirs is not None:
                    flows.append(_Flow(rank, mine.weights[rank], mine, theirs, message.mass))
        for rank, sent in list(self._overdue.items()):
            if self._has_answered(rank, sent):  # also one that is lost, or has begun anew, and never will
                del self._overdue[rank]
        return sorted(flows, key=lambda flow: (flow.mine is not now, flow.mine.round, flow.rank))

    def _sent_in(self, rank: int, round: int, now: _Sent) -> _Sent | None:
        """What this machine gave `rank` in a round, unless it skipped."""
        for sent in (now, self._overdue.get(rank)):
            if sent is not None and sent.round == round and rank in sent.weights:
                return sent if sent.generations[rank] == self._port.generation(rank) else None
        return None

    def _mix(self, now: _Sent, flows: list[_Flow]) -> Mixed:
        on_time = {flow.rank: flow for flow in flows if flow.mine is now}
        late = [flow for flow in flows if flow.mine is not now]
        self._late += len(late)
        before = self.mass
        self.mass += sum(flow.weight * (flow.mass - flow.mine.mass) for flow in flows)
        scale = 1.0 / self.mass
        complete = len(on_time) == len(now.weights) and self.mass == before == now.mass
        own = now.own_weight if complete else 1.0 - sum(flow.weight for flow in on_time.values())
        # What this machine holds beyond what it sent, if joins have changed its mass meanwhile, stays with it.
        terms = {self._port.rank: (now.public, (own * now.mass + (before - now.mass)) * scale)}
        for rank, flow in on_time.items():
            terms[rank] = (flow.theirs, flow.weight * flow.mass * scale)
        own_place = sorted(terms).index(self._port.rank)
        ordered = [terms[rank] for rank in sorted(terms)]
        for flow in late:
            ordered.append((flow.theirs, flow.weight * flow.mass * scale))
            ordered.append((flow.mine.public, -flow.weight * flow.mine.mass * scale))
        weights = summing_to_one([weight for _, weight in ordered], own_place, now.public.dtype)
        average = weighted_sum([vector for vector, _ in ordered], weights)
        return Mixed(now.public, average, before, self.mass, self._arrears(now.round, late))

    def _arrears(self, round: int, late: list[_Flow]) -> Tensor | None:
        vectors, weights = [], []
        for flow in late:
            if rounds := round - flow.mine.round:
                vectors += [flow.theirs, flow.mine.public]
                share = rounds * flow.weight / self.mass
                weights += [share * flow.mass, -share * flow.mine.mass]
        return weighted_sum(vectors, weights) if vectors else None


def summing_to_one(weights: Sequence[float], own: int, dtype: torch.dtype) -> list[float]:
    """The weights of a mean so that they sum to 1 in fp32 as well, where they are rounded to.

    Three times 1/3 would be 1 + 3e-8, and what is averaged in every step grow by that in every step: the mean with it.
    An error of a single weight weighs what two machines disagree in; both ends of an edge make the same.

    Args:
        own: place of this machine's weight, which takes what the others leave.
        dtype: of the vectors.
    """
    if dtype != torch.float32:
        return list(weights)
    rounded = [round(weight * _FP32_STEPS) / _FP32_STEPS for weight in weights]
    rounded[own] = 1.0 - (sum(rounded) - rounded[own])
    return rounded


def refuse_non_finite(
    port: Port, value: Tensor, round: int, receivers: Iterable[int], kind: Kind, stream: int = 0
) -> None:
    """Before a vector is sent in a round: see that it is finite, or tell those who wait for it, and raise.

    Raises:
        OwnWeightsError: it has a NaN or an infinity.
    """
    if are_finite([value]):
        return
    for rank in receivers:
        port.send(rank, Message(kind, round, 0.0, stream, SKIPPED | NON_FINITE))
    raise OwnWeightsError(port.rank)
