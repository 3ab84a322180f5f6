"""NoLoCo: DiLoCo's outer momentum, among random pairs instead of all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from thinwire.comm.gossip.algorithm import AlgorithmSettings, Parts
from thinwire.comm.gossip.algorithms.in_rounds import InRounds, Wire, mixer_of, refuse_directed
from thinwire.comm.gossip.mixer import Mixer
from thinwire.comm.gossip.port import Script
from thinwire.comm.gossip.replica import Replica
from thinwire.comm.gossip.turn import Turn


class NoLoCoSettings(AlgorithmSettings):
    """`algorithm: {kind: noloco}`, with `graph: matching` and `schedule: {kind: every, steps: 50}` as in the paper.

    momentum: of the outer step, alpha. lr: of what pairs have changed, beta. pull: towards the pair's mean, gamma.
    wire: what is sent is rounded to.
    """

    kind: Literal["noloco"] = "noloco"
    momentum: float = Field(0.5, ge=0, lt=1)
    lr: float = Field(0.7, gt=0)
    pull: float = Field(0.7, gt=0)
    wire: Wire = "fp32"

    joinable: ClassVar[bool] = False

    def build(self, parts: Parts) -> NoLoCo:
        """The algorithm of one machine.

        Raises:
            ValueError: the graph is directed.
        """
        refuse_directed(parts, self.kind)
        mixer = mixer_of(parts, self.wire)
        return NoLoCo(parts.replica, mixer, momentum=self.momentum, lr=self.lr, pull=self.pull)


class NoLoCo(InRounds):
    """NoLoCo (Kolehmainen et al. 2025, 2506.10911).

    Each machine has slow weights phi beside those that it trains, x, and an outer momentum m, at first 0. At a round,
    with d_i = x_i - phi_i what it has changed since the last and W the round's mixing (in the paper random pairs, 1/2
    each):

        m_i <- momentum m_i + lr sum_j w_ij d_j + pull (sum_j w_ij phi_j - phi_i)
        phi_i <- phi_i + m_i;   x_i <- phi_i

    The mean: mean(m) <- momentum mean(m) + lr mean(d). A flow that comes after its deadline enters the m of its round;
    what it moves in the end is the same at both ends. What is exact at every moment is
    sum_i (phi_i + momentum / (1 - momentum) m_i), less the flows that have not come.

    Unlike the paper, any undirected graph; who has no partner in a round takes its outer step alone. A merge sets phi
    to the average and m to 0. A machine cannot join: it would need its donor's phi and m. Statistics are averaged as
    they are.

    Sends phi and d: two vectors to each neighbour of a round. Memory: phi and m.

    Args:
        mixer: of the rounds, for vectors of phi and d.
        momentum, lr, pull: see above; momentum 0, lr 1 and pull 1 are plain averages.
    """

    def __init__(self, replica: Replica, mixer: Mixer, *, momentum: float, lr: float, pull: float) -> None:
        super().__init__(replica, mixer, 2 * replica.numel)
        self._alpha, self._beta, self._gamma = momentum, lr, pull
        self._slow = replica.weights()  # phi
        self._momentum = torch.zeros_like(self._slow)  # m

    def after_step(self, turn: Turn) -> Script[None]:
        """As Algorithm says."""
        if turn.mixing is None:
            return
        changed = self._replica.weights() - self._slow
        value = torch.cat([self._slow, changed])
        mixed = yield from self._exchange(turn.round, turn.mixing, value)
        slow, mean_changed = mixed.onto(value).split(self._replica.numel)
        self._momentum.mul_(self._alpha).add_(mean_changed, alpha=self._beta).add_(slow - self._slow, alpha=self._gamma)
        moved = self._slow + self._momentum
        moved[self._learned :] = (slow + mean_changed)[self._learned :]
        self._momentum[self._learned :] = 0.0
        self._slow = moved
        self._replica.set_weights(moved)

    def drain(self) -> Script[None]:
        """As Algorithm says. What has come late is counted as if it had come in the last round."""
        late = yield from self._mixer.settle()
        if late is not None:
            slow, changed = (late.average - late.sent).split(self._replica.numel)
            gained = self._beta * changed + self._gamma * slow
            gained[self._learned :] = (changed + slow)[self._learned :]
            self._slow += gained
            self._momentum[: self._learned] += gained[: self._learned]
            self._replica.set_weights(self._replica.weights() + gained)

    def metrics(self) -> dict[str, float]:
        """What the mixer says, and `outer_momentum_norm`, of m."""
        return {**super().metrics(), "outer_momentum_norm": float(self._momentum.norm())}

    def state_dict(self) -> dict[str, Any]:
        """As Algorithm says."""
        return {**super().state_dict(), "slow": self._slow.clone(), "momentum": self._momentum.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As Algorithm says."""
        super().load_state_dict(state)
        slow: Tensor = state["slow"]
        self._slow = slow.to(self._replica.device, copy=True)
        self._momentum = state["momentum"].to(self._replica.device, copy=True)

    def merged(self) -> None:
        """phi <- the average, m <- 0."""
        self._slow = self._replica.weights()
        self._momentum.zero_()
