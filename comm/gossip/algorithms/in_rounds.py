"""What algorithms that go in rounds have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from torch import Tensor

from thinwire.comm.gossip.algorithm import Parts
from thinwire.comm.gossip.algorithms.dpsgd import WIRE
from thinwire.comm.gossip.codec import Plain
from thinwire.comm.gossip.mixer import Mixed, Mixer, SymmetricMixer
from thinwire.comm.gossip.mixing import Mixing
from thinwire.comm.gossip.port import Script
from thinwire.comm.gossip.push_sum import PushMixer
from thinwire.comm.gossip.replica import Replica
from thinwire.comm.gossip.turn import Turn

Wire: TypeAlias = Literal["fp32", "bf16", "fp16"]


def mixer_of(parts: Parts, wire: Wire = "fp32") -> Mixer:
    """The mixer that a graph needs.

    Args:
        wire: what values are rounded to on the way; the mean is kept all the same.
    """
    kind = SymmetricMixer if parts.graph.symmetric else PushMixer
    # The dtype on the wire is the replica's also where an algorithm mixes in a wider one.
    return kind(parts.port, Plain(WIRE[wire] or parts.replica.dtype), deadline_s=parts.deadline_s)


def refuse_directed(parts: Parts, kind: str) -> None:
    """
    Raises:
        ValueError: the graph's weights are not symmetric.
    """
    if not parts.graph.symmetric:
        raise ValueError(
            f"method.graph: {parts.graph.name} is directed, but method.algorithm.kind {kind} is defined for symmetric "
            "weights; use an undirected graph such as ring, torus or base_k, or an algorithm for directed ones: dpsgd, "
            "gradient_tracking"
        )


class InRounds:
    """An algorithm of one vector, exchanged in rounds in which each machine waits for its neighbours.

    Args:
        mixer: of the rounds; its deadline bounds what a neighbour can delay.
        numel: elements of the vector.
    """

    def __init__(self, replica: Replica, mixer: Mixer, numel: int) -> None:
        self._replica = replica
        self._mixer = mixer
        self._numel = numel
        self._learned = sum(replica.sizes)  # what comes after that are statistics, which have no gradient

    @property
    def mass(self) -> float:
        return self._mixer.mass

    def hold(self, mass: float) -> None:
        """As SharesMass says."""
        self._mixer.mass = mass

    def before_step(self, turn: Turn) -> Script[None]:
        """Nothing."""
        return
        yield

    def asked(self) -> bool:
        """Never: machines go in rounds."""
        return False

    def serve(self) -> None:
        """Nobody asks."""

    def sent_bytes(self, turn: Turn) -> dict[int, int]:
        """As Algorithm says."""
        if turn.mixing is None:
            return {}
        return self._mixer.sent_bytes(turn.mixing, self._numel, self._replica.dtype.itemsize)

    def metrics(self) -> dict[str, float]:
        """What the mixer says."""
        return self._mixer.metrics()

    def state_dict(self) -> dict[str, Any]:
        """As Algorithm says."""
        return {"mixer": self._mixer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As Algorithm says."""
        self._mixer.load_state_dict(state["mixer"])

    def _exchange(self, round: int, mixing: Mixing, value: Tensor) -> Script[Mixed]:
        assert value.numel() == self._numel
        self._mixer.begin(round, mixing, value)
        return (yield from self._mixer.finish())
