"""Push-sum: rounds on directed graphs, where what a machine gives away is its own decision and nobody answers.

Every machine j has a vector z_j and a mass m_j, 1 at first; what is preserved is sum_j m_j z_j, and sum_j m_j. In a
round it sends each target i the parcel (w_ij m_j, s_j), s_j being its z_j as the others will read it, and keeps the
rest:

    m_j z_j -= sum_i w_ij m_j s_j,   m_j -= sum_i w_ij m_j       (i over its targets, without itself)
    m_i z_i += w_ij m_j s_j,         m_i += w_ij m_j             (whenever the parcel of j is absorbed)

W need only be column stochastic. A parcel that comes after its deadline is absorbed by a later round: until then its
mass is on the wire. A machine that is lost takes along what it held and the parcels that were under way to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from thinwire.comm.gossip.codec import Codec
from thinwire.comm.gossip.message import NON_FINITE, Kind, Message
from thinwire.comm.gossip.mixer import Mixed, refuse_non_finite, summing_to_one
from thinwire.comm.gossip.mixing import Mixing
from thinwire.comm.gossip.port import Port, Script, Wait
from thinwire.kernels.weighted_sum import weighted_sum


@dataclass(frozen=True, eq=False)
class Parcel:
    """What one machine gave another: `scale` times `vector`, and `mass`."""

    vector: Tensor
    scale: float
    mass: float


@dataclass(frozen=True, eq=False)
class _Begun:
    """A round under way.

    public: what was sent; mass: this machine's, when it was. kept: what it did not give away. sources: who sends in
    this round, each with its generation: another in its place does not.
    """

    round: int
    public: Tensor
    mass: float
    kept: Parcel
    sources: dict[int, int]
    until: float


class PushMixer:
    """Mixer for directed mixings: push-sum (Kempe, Dobra, Gehrke 2003), in the form for time-varying graphs (Nedić,
    Olshevsky 2016, 1406.2075).

    Differs: z itself travels and is kept, not the numerator m z, and the parcel's mass says how much of it is given.

    Args:
        codec: without a memory of its own, since targets change with the round.
        deadline_s: how long a round waits for its parcels, from its begin().
        stream: of the messages.
    """

    def __init__(self, port: Port, codec: Codec, *, deadline_s: float, stream: int = 0) -> None:
        assert not codec.remembers
        self._port = port
        self._codec = codec
        self._deadline_s = deadline_s
        self._stream = stream
        self._begun: _Begun | None = None
        self._owed: dict[int, _Begun] = {}  # by machine: the newest round that it has not sent in, though it should
        self._public: Tensor | None = None  # of the round before
        self._mass = 1.0
        self._late = 0
        self._absent = 0

    @property
    def mass(self) -> float:
        return self._mass

    @mass.setter
    def mass(self, value: float) -> None:
        assert self._begun is None, "finish() first: what has been given away cannot be halved"
        self._mass = value

    def begin(self, round: int, mixing: Mixing, value: Tensor) -> Tensor:
        """As Mixer says.

        Raises:
            OwnWeightsError: as Mixer says.
            ValueError: the mixing leaves this machine nothing.
        """
        assert self._begun is None
        rank, lost = self._port.rank, self._port.lost()
        targets = {to: weight for to, weight in mixing.targets(rank).items() if to not in lost}
        own = 1.0 - sum(targets.values())
        if own <= 1e-9:
            raise ValueError(
                f"method.graph gives away all that machine {rank} holds in round {round}: a machine whose parcels are "
                "late would have no weights left; give each machine a weight for itself"
            )
        refuse_non_finite(self._port, value, round, targets, Kind.PUSH, self._stream)
        public, kept = self._push(round, targets, value)
        until = self._port.now() + self._deadline_s
        sources = {source: self._port.generation(source) for source in mixing.sources(rank)}
        self._begun = _Begun(round, public, self._mass, kept, sources, until)
        return public

    def finish(self) -> Script[Mixed]:
        """As Mixer says."""
        now = self._begun
        assert now is not None
        yield Wait(lambda: all(self._has_come(rank, now) for rank in now.sources), now.until)
        parcels = self._absorb(now.round, now.public)
        self._owed = {rank: begun for rank, begun in self._owed.items() if not self._has_come(rank, begun)}
        self._owed.update((rank, now) for rank in now.sources if not self._has_come(rank, now))
        self._begun = None
        self._public = now.public
        return self._mix(now, parcels)

    def settle(self) -> Script[Mixed | None]:
        """As Mixer says. Nothing may be under way."""
        assert self._begun is None
        until = self._port.now() + self._deadline_s
        yield Wait(lambda: all(self._has_come(rank, begun) for rank, begun in self._owed.items()), until)
        if self._public is None:
            return None
        newest = max((self._port.newest(rank, Kind.PUSH, self._stream) for rank in range(self._port.size)), default=-1)
        parcels = self._absorb(newest, self._public)
        if not parcels:
            return None
        return self._mix(_Begun(newest, self._public, self._mass, self._all_of(self._public), {}, until), parcels)

    def sent_bytes(self, mixing: Mixing, numel: int, itemsize: int) -> dict[int, int]:
        """As Mixer says."""
        count = self._codec.payload_bytes(numel, itemsize)
        return {} if count is None else {rank: count for rank in mixing.targets(self._port.rank)}

    def metrics(self) -> dict[str, float]:
        """`mass`; `late`, parcels that came after their round; `overdue`, machines that still owe one.

        `absent`, messages of machines whose vector was not finite: they give nothing.
        """
        owed = sum(not self._has_come(rank, begun) for rank, begun in self._owed.items())
        return {
            "mass": self._mass,
            "late": float(self._late),
            "overdue": float(owed),
            "absent": float(self._absent),
        }

    def state_dict(self) -> dict[str, Any]:
        """The mass. A parcel that is late even after settle() is not part of it."""
        assert self._begun is None, "finish() first"
        return {"mass": self._mass, "codec": self._codec.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what state_dict() gave."""
        self._begun = self._public = None
        self._owed.clear()
        self.mass = float(state["mass"])
        self._codec.load_state_dict(state["codec"])

    def _push(self, round: int, targets: dict[int, float], value: Tensor) -> tuple[Tensor, Parcel]:
        """Send each target its parcel: what was sent, and what is left of it."""
        payload, public = self._codec.encode(round, value)
        kept = self._mass
        for to, weight in targets.items():
            given = weight * self._mass
            kept -= given
            self._port.send(to, Message(Kind.PUSH, round, given, self._stream, 0, payload))
        return public, Parcel(public, kept, kept)

    def _all_of(self, public: Tensor) -> Parcel:
        """What this machine has, where it gives nothing away."""
        return Parcel(public, self._mass, self._mass)

    def _open(self, source: int, message: Message, like: Tensor) -> Parcel | None:
        """What a message brings."""
        return Parcel(self._codec.decode(source, message.round, message.payload, like), message.mass, message.mass)

    def _has_come(self, rank: int, begun: _Begun) -> bool:
        """Whether nothing more is to be waited for."""
        if rank in self._port.lost() or self._port.generation(rank) != begun.sources[rank]:
            return True
        return self._port.newest(rank, Kind.PUSH, self._stream) >= begun.round

    def _absorb(self, round: int, like: Tensor) -> list[Parcel]:
        """Everything that has arrived of rounds up to this one: of this round first, by rank."""
        found = []
        for rank in sorted(self._port.waiting(Kind.PUSH, self._stream)):
            while (message := self._port.peek(rank, Kind.PUSH, self._stream)) and message.round <= round:
                self._port.take(rank, Kind.PUSH, self._stream)
                if message.flags & NON_FINITE:
                    self._absent += 1
                    continue
                self._late += message.round < round
                parcel = self._open(rank, message, like)
                if parcel is not None:
                    found.append(((message.round != round, message.round, rank), parcel))
        return [parcel for _, parcel in sorted(found, key=lambda item: item[0])]

    def _mix(self, now: _Begun, parcels: list[Parcel]) -> Mixed:
        self._mass = now.kept.mass + sum(parcel.mass for parcel in parcels)
        terms = [now.kept, *parcels]
        scale = 1.0 / self._mass
        weights = [term.scale * scale for term in terms]
        if all(term.scale == term.mass for term in terms):
            weights = summing_to_one(weights, 0, now.public.dtype)
        average = weighted_sum([term.vector for term in terms], weights)
        return Mixed(now.public, average.to(now.public.dtype), now.mass, self._mass)
