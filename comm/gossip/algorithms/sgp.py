"""Stochastic gradient push: D-PSGD for directed graphs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import model_validator
from torch import Tensor

from thinwire.comm.gossip.algorithm import AlgorithmSettings, Parts
from thinwire.comm.gossip.algorithms.dpsgd import WIRE
from thinwire.comm.gossip.algorithms.in_rounds import InRounds, Wire
from thinwire.comm.gossip.codec import Plain
from thinwire.comm.gossip.port import Script
from thinwire.comm.gossip.push_counters import HealingPushMixer
from thinwire.comm.gossip.push_sum import PushMixer
from thinwire.comm.gossip.replica import Replica
from thinwire.comm.gossip.turn import Turn


class SGPSettings(AlgorithmSettings):
    """`algorithm: {kind: sgp, overlap: true}`.

    overlap: exchange during the next forward and backward pass. heal: send running sums, so that messages that links
    lose cost nothing; 8 bytes per element. wire: what weights are rounded to on the way; with heal, fp32.
    """

    kind: Literal["sgp"] = "sgp"
    overlap: bool = False
    heal: bool = False
    wire: Wire = "fp32"

    @model_validator(mode="after")
    def _sums_are_not_rounded(self) -> SGPSettings:
        if self.heal and self.wire != "fp32":
            raise ValueError(
                f"wire: {self.wire} with heal: true; running sums travel as they are, since what is rounded away of "
                "them would be lost: leave wire out, or set heal: false"
            )
        return self

    def build(self, parts: Parts) -> SGP:
        """The algorithm of one machine."""
        mixer = (
            HealingPushMixer(parts.port, deadline_s=parts.deadline_s)
            if self.heal
            else PushMixer(parts.port, Plain(WIRE[self.wire]), deadline_s=parts.deadline_s)
        )
        return SGP(parts.replica, mixer, overlap=self.overlap)


class SGP(InRounds):
    """SGP (Assran, Loizou, Ballas, Rabbat 2019, 1811.10792), with any optimizer in place of SGD.

    With the numerator x_i, the mass m_i and the weights z_i = x_i / m_i, which are the model:

        x_i <- x_i + u_i,  u_i the optimizer's update at z_i;   then a round of push-sum (push_sum.py)

    so sum_i x_i moves by sum_i u_i whatever the masses are: every machine's data count alike, on any graph whose
    columns sum to 1. The replica holds z; an update of z counts m_i times, so it is divided by m_i.

    Overlap (OSGP): the round begins after a step and ends after the next one, whose update is added to what it gives.

    Differs: the optimizer acts on z and its update is carried over, where the paper's code lets it act on x; the same
    for SGD with momentum, while weight decay pulls z and not x towards 0.

    Args:
        mixer: of the rounds; its deadline bounds what a machine can delay.
        overlap: as above.
    """

    def __init__(self, replica: Replica, mixer: PushMixer, *, overlap: bool = False) -> None:
        super().__init__(replica, mixer, replica.numel)
        self._overlap = overlap
        self._before: Tensor | None = None  # z before the optimizer's step, where its update must be divided
        self._under_way = False

    def before_step(self, turn: Turn) -> Script[None]:
        """As Algorithm says."""
        self._before = None if self.mass == 1.0 else self._replica.weights()
        return
        yield

    def after_step(self, turn: Turn) -> Script[None]:
        """As Algorithm says."""
        if self._before is not None:
            update = self._replica.weights() - self._before
            self._replica.set_weights(self._before.add_(update, alpha=1.0 / self.mass))
            self._before = None
        if self._under_way:
            yield from self._finish()
        if turn.mixing is not None:
            self._mixer.begin(turn.round, turn.mixing, self._replica.weights())
            self._under_way = True
            if not self._overlap:
                yield from self._finish()

    def drain(self) -> Script[None]:
        """As Algorithm says."""
        if self._under_way:
            yield from self._finish()
        late = yield from self._mixer.settle()
        if late is not None:
            self._replica.set_weights(late.onto(self._replica.weights()))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As Algorithm says."""
        super().load_state_dict(state)
        self._before, self._under_way = None, False

    def merged(self) -> None:
        """Nothing to forget."""

    def _finish(self) -> Script[None]:
        mixed = yield from self._mixer.finish()
        self._replica.set_weights(mixed.onto(self._replica.weights()))
        self._under_way = False
