"""A2CiD2: pairs of machines average at their own pace, with a companion of the weights that lends them momentum."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from thinwire.comm.gossip.algorithm import AlgorithmSettings, Parts
from thinwire.comm.gossip.algorithms.dpsgd import WIRE
from thinwire.comm.gossip.algorithms.in_rounds import Wire
from thinwire.comm.gossip.algorithms.own_pace import OwnPace
from thinwire.comm.gossip.codec import Plain
from thinwire.comm.gossip.graphs.spectrum import Resistance, meeting_rates
from thinwire.comm.gossip.mixing import Graph
from thinwire.comm.gossip.port import Port, Script
from thinwire.comm.gossip.replica import Replica
from thinwire.comm.gossip.swaps import Swap, Swaps
from thinwire.comm.gossip.turn import Turn
from thinwire.kernels.swap_with_momentum import swap_with_momentum


class A2CiD2Settings(AlgorithmSettings):
    """`algorithm: {kind: acid, rate: 1}`.

    rate: exchanges of a machine per turn, on average: it asks Poisson(rate / 2) of its neighbours. asks: how many may
    owe an answer at once. wire: what weights are rounded to on the way; the mean is exact all the same.
    """

    kind: Literal["acid"] = "acid"
    rate: float = Field(default=1.0, gt=0.0, le=64.0)
    asks: int = Field(default=2, ge=1, le=64)
    wire: Wire = "fp32"

    in_rounds: ClassVar[bool] = False
    joinable: ClassVar[bool] = False

    def build(self, parts: Parts) -> A2CiD2:
        """The algorithm of one machine."""
        swaps = Swaps(parts.port, Plain(WIRE[self.wire]), asks=self.asks, deadline_s=parts.deadline_s)
        return A2CiD2(
            parts.replica,
            parts.port,
            swaps,
            momentum_for(parts.graph, self.rate),
            rate=self.rate,
            seed=parts.seed,
            deadline_s=parts.deadline_s,
        )


@dataclass(frozen=True)
class Momentum:
    """eta: how fast weights and companion flow together, per unit of time. alpha: what the companion takes up of the
    difference in an exchange, where the weights take up a half."""

    eta: float
    alpha: float


NO_MOMENTUM = Momentum(0.0, 0.5)
"""With which it is AD-PSGD."""


def momentum_for(graph: Graph, rate: float) -> Momentum:
    """eta = 1 / (2 sqrt(chi_1 chi_2)),  alpha = sqrt(chi_1 / chi_2) / 2.

    Args:
        rate: exchanges of a machine per unit of time, its neighbours being equally likely.
    """
    if graph.size == 1:
        return NO_MOMENTUM
    network = Resistance(meeting_rates(graph), graph.size)
    eta = rate / (2 * math.sqrt(network.chi_1 * network.chi_2))
    return Momentum(eta, math.sqrt(network.chi_1 / network.chi_2) / 2)


class A2CiD2(OwnPace):
    """A2CiD2 (Nabli, Belilovsky, Oyallon 2023, 2306.08289), with any optimizer in place of SGD.

    Each machine has weights x and a companion y, equal at first, and its own clock:

        between events   x' = eta (y - x),  y' = eta (x - y)
        step             x += u,  y += u,   u the optimizer's update at x
        exchange (i, j)  x_i += (s_j - s_i) / 2,  y_i += alpha (s_j - s_i);  for j the negative;  s the x as sent

    On graphs with a large diameter consensus needs about sqrt(chi_1 / chi_2) times fewer exchanges than without.

    What is exact: sum (x + y) whenever each machine gets to its events, since time does not change x + y; sum x and
    sum y by themselves only where both ends exchange at one and the same time. Therefore a global average is one of
    (x + y) / 2: averaged().

    Differs: the clock of a machine counts its turns, not seconds, so that a run repeats; time passes before anything is
    sent, and both ends use what was sent (in the paper's code x is sent before its time has passed, which moves the
    mean); who asks whom needs no matchmaker.

    Args:
        swaps: of x.
        momentum: eta per unit of the clock.
        rate: the mean number of exchanges at a turn; it asks Poisson(rate / 2) neighbours.
        clock: what time it is here; default: turns with an exchange so far.
    """

    def __init__(
        self,
        replica: Replica,
        port: Port,
        swaps: Swaps,
        momentum: Momentum,
        *,
        rate: float,
        seed: int,
        deadline_s: float,
        clock: Callable[[], float] | None = None,
    ) -> None:
        super().__init__(replica, port, swaps, seed=seed, deadline_s=deadline_s)
        self._momentum = momentum
        self._rate = rate
        self._clock = clock or (lambda: float(self._turns))
        self._turns = 0
        self._time = self._clock()  # up to which x and y have flowed together
        self._companion = replica.weights()
        self._new = True
        self._before: Tensor | None = None

    def before_step(self, turn: Turn) -> Script[None]:
        """As Algorithm says."""
        self._before = self._replica.weights()
        if self._new and not self._swaps.made:
            self._companion = self._before.clone()  # the weights may have been set since this was made
        self._new = False
        return
        yield

    def averaged(self) -> Tensor:
        """What enters a global average: (x + y) / 2, whose sum over all machines is exact. A copy."""
        return self._replica.weights().add_(self._companion).div_(2)

    @property
    def asks_per_turn(self) -> float:
        """Poisson(rate / 2)."""
        return self._rate / 2

    def advance(self) -> None:
        """Let x and y flow together until now."""
        self._flow()
        self._store()

    def state_dict(self) -> dict[str, Any]:
        """As Algorithm says."""
        return {**super().state_dict(), "turns": self._turns, "companion": self._companion.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As Algorithm says."""
        super().load_state_dict(state)
        self._turns = int(state["turns"])
        self._time = self._clock()
        self._companion = state["companion"].to(self._replica.device, self._replica.dtype, copy=True)
        self._new, self._before = False, None

    def merged(self) -> None:
        """The companion is the weights again."""
        self._companion = self._replica.weights()

    def _begin_turn(self, turn: Turn) -> None:
        if self._before is not None:
            self._companion += self._weights() - self._before
            self._before = None
        self._turns += turn.mixing is not None

    def _asks_of(self, chance: np.random.Generator) -> int:
        return int(chance.poisson(self._rate / 2))

    def _to_send(self) -> Tensor:
        self._flow()
        return self._weights()

    def _flow(self) -> None:
        decay = self._decay()
        if decay < 1.0:
            x = self._weights()
            flow = (self._companion - x).mul_((1.0 - decay) / 2)
            self._companion -= flow
            x += flow

    def _take(self, swap: Swap) -> None:
        step = swap.step(self.mass)
        swap_with_momentum(
            self._weights(),
            self._companion,
            swap.mine,
            swap.theirs.contiguous(),
            decay=self._decay(),
            step=step,
            momentum_step=2 * self._momentum.alpha * step,
        )

    def _decay(self) -> float:
        """exp(-2 eta t) for the time t since this was last asked for."""
        now = self._clock()
        passed, self._time = now - self._time, now
        return math.exp(-2 * self._momentum.eta * passed)
