"""NoLoCo: DiLoCo's outer momentum, among random pairs instead of all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from thinwire.comm.gossip.algorithm import AlgorithmSettings, Parts
from thinwire.comm.gossip.algorithms.in_rounds import InRounds, Wire, mixer_of, refuse_directed
from thinwire.comm.gossip.mixer import Mixer
from thinwire.comm.gossip.mixing import Graph
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
            ValueError: the graph is directed; or on this graph machines diverge with this momentum and pull.
        """
        refuse_directed(parts, self.kind)
        self._refuse_divergence(parts.graph)
        mixer = mixer_of(parts, self.wire)
        return NoLoCo(parts.replica, mixer, momentum=self.momentum, lr=self.lr, pull=self.pull)

    def _refuse_divergence(self, graph: Graph) -> None:
        if (limit := _largest_pull(graph, self.momentum)) is not None and self.pull >= limit:
            raise ValueError(
                f"method.algorithm.pull: {self.pull:g} with momentum {self.momentum:g}: on method.graph {graph.name} "
                f"machines would diverge; give a pull below {limit:.4g}, or less momentum"
            )


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

    What machines disagree in changes from round to round by a factor that momentum, pull and W decide alone:
    pair_moments() for random pairs, whose mean square the defaults divide by 1.5 in a round (n = 8). The paper's
    interval for pull, as far as we know it (between momentum and 2 + momentum for pairs), has values at which it grows,
    such as 2.2 at momentum 0.5.

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


def pair_moments(momentum: float, pull: float, size: int) -> NDArray[np.float64]:
    """How disagreement changes in a round of uniformly random pairs, for machines that do not train.

    With phi and m less their means, and averaged over pairings and machines: (E phi^2, E phi m, E m^2) after a round is
    this matrix times the same before it. For an odd size one machine has no partner.

    Returns:
        3 x 3; machines come together in the mean square if its eigenvalues are within the unit circle.
    """
    # With q = (phi_partner - phi) / 2, m <- momentum m + pull q and phi <- phi + m. Averaged over all partners, what is
    # a partner's is -1/(n-1) of one's own: E q^2 = k/2 E phi^2, E q phi = -k/2 E phi^2, E q m = -k/2 E phi m.
    k = size / (size - 1) if size % 2 == 0 else 1.0
    cross = np.array([-pull * k / 2, momentum, 0.0])
    square = np.array([pull * pull * k / 2, -momentum * pull * k, momentum * momentum])
    return np.stack([np.array([1.0, 0.0, 0.0]) + 2 * cross + square, cross + square, square])


def _largest_pull(graph: Graph, momentum: float) -> float | None:
    """The pull from which on machines diverge; None if we do not know it for such a graph."""
    if graph.size < 2:
        return None
    if graph.period == 1:  # heavy ball in the eigenvectors of I - W
        spread = 1.0 - float(np.linalg.eigvalsh(graph.mixing(0).matrix())[0])
        return 2.0 * (1.0 + momentum) / spread
    halves = all(weight in (0.5, 1.0) for row in graph.mixing(0).rows for weight in row.values())
    if graph.period == 0 and halves:
        low, high = 0.0, 4.0
        for _ in range(40):
            middle = (low + high) / 2
            radius = float(np.abs(np.linalg.eigvals(pair_moments(momentum, middle, graph.size))).max())
            low, high = (middle, high) if radius < 1.0 else (low, middle)
        return low
    return None
