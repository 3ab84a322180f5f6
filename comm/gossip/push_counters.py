"""Push-sum over links that lose messages: running sums travel, so that the next message brings what was lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thinwire.comm.gossip.codec import Plain
from thinwire.comm.gossip.message import Kind, Message
from thinwire.comm.gossip.mixing import Mixing
from thinwire.comm.gossip.port import Port
from thinwire.comm.gossip.push_sum import Parcel, PushMixer
from thinwire.comm.wire import PayloadError


@dataclass(frozen=True, eq=False)
class _Sum:
    """All that one machine has given another.

    generation: of the other machine; another in its place begins anew. round: of its newest message. vector: fp64.
    """

    generation: int
    round: int
    vector: Tensor
    mass: float


class HealingPushMixer(PushMixer):
    """PushMixer whose messages may be lost (Hadjicostis, Vaidya, Domínguez-García 2016, running sums).

    For each target i the sender j keeps and sends, for each source j the receiver i remembers, the sum of all parcels:

        sigma_ij += w_ij m_j (s_j, 1);   (m_j z_j, m_j) -= what sigma_ij has grown by, as rounded
        (m_i z_i, m_i) += sigma_ij - rho_ij;   rho_ij = sigma_ij         (the newest sigma_ij that has come)

    so a lost parcel comes with the next message on its edge; until then it is on the wire. Sums are fp64 and cross the
    wire as such, twice the bytes of fp32: they grow with the rounds, and fp32 would round away more and more of each
    parcel. Both ends begin anew with a machine that does.

    Memory: 8 bytes per element, target and source.

    Args: as of PushMixer.
    """

    def __init__(self, port: Port, *, deadline_s: float, stream: int = 0) -> None:
        super().__init__(port, Plain(), deadline_s=deadline_s, stream=stream)
        self._given: dict[int, _Sum] = {}
        self._seen: dict[int, _Sum] = {}

    def sent_bytes(self, mixing: Mixing, numel: int, itemsize: int) -> dict[int, int]:
        """As Mixer says."""
        return {rank: 8 * numel for rank in mixing.targets(self._port.rank)}

    def state_dict(self) -> dict[str, Any]:
        """The mass and the sums."""
        sums = {"given": self._given, "seen": self._seen}
        packed = {
            name: {str(rank): [s.round, s.vector.clone(), s.mass] for rank, s in by_rank.items()}
            for name, by_rank in sums.items()
        }
        return {**super().state_dict(), **packed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As Mixer says."""
        super().load_state_dict(state)
        self._given, self._seen = (
            {
                int(rank): _Sum(self._port.generation(int(rank)), round, vector.clone(), mass)
                for rank, (round, vector, mass) in sums.items()
            }
            for sums in (state["given"], state["seen"])
        )

    def _push(self, round: int, targets: dict[int, float], value: Tensor) -> tuple[Tensor, Parcel]:
        public = value.clone()
        exact = public.to(torch.float64)
        kept, kept_mass = exact * self._mass, self._mass
        for to, weight in targets.items():
            old = self._known(self._given, to) or _Sum(self._port.generation(to), round, torch.zeros_like(exact), 0.0)
            given = weight * self._mass
            new = _Sum(old.generation, round, old.vector + exact * given, old.mass + given)
            kept -= new.vector - old.vector
            kept_mass -= new.mass - old.mass
            self._given[to] = new
            payload = new.vector.cpu().view(torch.uint8)
            self._port.send(to, Message(Kind.PUSH, round, new.mass, self._stream, 0, payload))
        return public, Parcel(kept, 1.0, kept_mass)

    def _all_of(self, public: Tensor) -> Parcel:
        return Parcel(public.to(torch.float64) * self._mass, 1.0, self._mass)

    def _open(self, source: int, message: Message, like: Tensor) -> Parcel | None:
        expected = 8 * like.numel()
        if len(message.payload) != expected:
            raise PayloadError(f"a sum of {like.numel()} elements takes {expected} bytes, not {len(message.payload)}")
        vector = message.payload.view(torch.float64).to(like.device)
        new, old = (
            _Sum(self._port.generation(source), message.round, vector, message.mass),
            self._known(self._seen, source),
        )
        if old is None:
            self._seen[source] = new
            return Parcel(new.vector, 1.0, new.mass)
        if old.round >= new.round:
            return None  # overtaken by a newer one, which had all of this
        self._seen[source] = new
        return Parcel(new.vector - old.vector, 1.0, new.mass - old.mass)

    def _known(self, sums: dict[int, _Sum], rank: int) -> _Sum | None:
        """The sum of the machine that now is in this place."""
        found = sums.get(rank)
        return found if found is not None and found.generation == self._port.generation(rank) else None
