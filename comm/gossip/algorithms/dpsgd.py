"""Decentralized parallel SGD: a step of one's own, and an average with one's neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from thinwire.comm.gossip.algorithm import AlgorithmSettings, Parts
from thinwire.comm.gossip.codec import Plain
from thinwire.comm.gossip.mixer import Mixer, SymmetricMixer
from thinwire.comm.gossip.port import Port, Script
from thinwire.comm.gossip.push_sum import PushMixer
from thinwire.comm.gossip.replica import Replica
from thinwire.comm.gossip.turn import Turn

WIRE = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class DPSGDSettings(AlgorithmSettings):
    """`algorithm: {kind: dpsgd, overlap: true}`.

    overlap: exchange during the next forward and backward pass. wire: what weights are rounded to on the way.
    """

    kind: Literal["dpsgd"] = "dpsgd"
    overlap: bool = False
    wire: Literal["fp32", "bf16", "fp16"] = "fp32"

    def build(self, parts: Parts) -> DPSGD:
        """The algorithm of one machine."""
        kind = SymmetricMixer if parts.graph.symmetric else PushMixer
        mixer = kind(parts.port, Plain(WIRE[self.wire]), deadline_s=parts.deadline_s)
        return DPSGD(parts.replica, parts.port, mixer, overlap=self.overlap, rounds_off=self.wire != "fp32")


class DPSGD:
    """D-PSGD (Lian et al. 2017, 1705.09056), with any optimizer in place of SGD.

    Adapt then combine:  x_i <- sum_j w_ij (x_j + u_j),  u_j the optimizer's update at x_j. More accurate; the exchange
    delays the next step.
    Combine then adapt (overlap):  x_i <- sum_j w_ij x_j + u_i. What is sent is the weights before the update, so the
    exchange goes on during the next forward and backward pass: begun after a step, and added as the difference
    average - sent after the next one.

    On a directed graph the averages are push-sums. Where its rows do not sum to 1, machines with more mass count for
    more in the mean: algorithms/sgp.py counts all alike.

    Args:
        mixer: of the rounds; its deadline bounds what a neighbour can delay.
        overlap: combine then adapt.
        rounds_off: whether what is sent is not quite the weights.
    """

    def __init__(
        self, replica: Replica, port: Port, mixer: Mixer, *, overlap: bool = False, rounds_off: bool = True
    ) -> None:
        self._replica = replica
        self._port = port
        self._mixer = mixer
        self._overlap = overlap
        self._rounds_off = rounds_off
        self._under_way = False

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

    def after_step(self, turn: Turn) -> Script[None]:
        """As Algorithm says."""
        if self._under_way:
            yield from self._finish()
        if turn.mixing is not None:
            weights = self._replica.weights()
            sent = self._mixer.begin(turn.round, turn.mixing, weights)
            self._under_way = True
            if not self._overlap:
                yield from self._finish(weights if self._rounds_off else sent)

    def asked(self) -> bool:
        """Never: machines go in rounds."""
        return False

    def serve(self) -> None:
        """Nobody asks."""

    def drain(self) -> Script[None]:
        """As Algorithm says."""
        if self._under_way:
            yield from self._finish()
        late = yield from self._mixer.settle()
        if late is not None:
            self._replica.set_weights(late.onto(self._replica.weights()))

    def sent_bytes(self, turn: Turn) -> dict[int, int]:
        """As Algorithm says."""
        itemsize = self._replica.dtype.itemsize
        return self._mixer.sent_bytes(turn.mixing, self._replica.numel, itemsize) if turn.mixing else {}

    def metrics(self) -> dict[str, float]:
        """What the mixer says."""
        return self._mixer.metrics()

    def state_dict(self) -> dict[str, Any]:
        """As Algorithm says."""
        return {"mixer": self._mixer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As Algorithm says."""
        self._mixer.load_state_dict(state["mixer"])

    def merged(self) -> None:
        """Nothing to forget."""

    def _finish(self, weights: Tensor | None = None) -> Script[None]:
        """Args: weights, the present ones, where they are known; what was sent, if they still are just that."""
        mixed = yield from self._mixer.finish()
        self._replica.set_weights(mixed.onto(self._replica.weights() if weights is None else weights))
        self._under_way = False
