"""DADAO: gradients and exchanges at random times of their own, at the best rates known, for smooth and strongly convex
objectives."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from thinwire.comm.gossip.algorithm import AlgorithmSettings, Parts
from thinwire.comm.gossip.algorithms.own_pace import OwnPace
from thinwire.comm.gossip.codec import Plain
from thinwire.comm.gossip.graphs.spectrum import Resistance, meeting_rates
from thinwire.comm.gossip.mixing import Graph
from thinwire.comm.gossip.port import Port, Script, Wait
from thinwire.comm.gossip.replica import Replica
from thinwire.comm.gossip.swaps import Swap, Swaps
from thinwire.comm.gossip.turn import Turn


class DADAOSettings(AlgorithmSettings):
    """`algorithm: {kind: dadao, smoothness: 10, strong_convexity: 1}`.

    smoothness, strong_convexity: L and mu of every machine's objective; the method's constants follow from them and the
    graph. asks: how many machines may owe an answer at once.
    """

    kind: Literal["dadao"] = "dadao"
    smoothness: float = Field(gt=0.0)
    strong_convexity: float = Field(gt=0.0)
    asks: int = Field(default=64, ge=1, le=1024)

    in_rounds: ClassVar[bool] = False
    needs_sgd: ClassVar[bool] = True
    joinable: ClassVar[bool] = False

    @model_validator(mode="after")
    def _is_a_condition(self) -> DADAOSettings:
        if self.smoothness < self.strong_convexity:
            raise ValueError(
                f"smoothness: {self.smoothness:g} with strong_convexity: {self.strong_convexity:g}; no function is "
                "less smooth than it is convex: give the largest and the smallest eigenvalue of the Hessian"
            )
        return self

    def build(self, parts: Parts) -> DADAO:
        """The algorithm of one machine."""
        constants = constants_for(parts.graph, self.smoothness, self.strong_convexity)
        swaps = Swaps(parts.port, Plain(), asks=self.asks, deadline_s=parts.deadline_s)
        return DADAO(parts.replica, parts.port, swaps, constants, seed=parts.seed, deadline_s=parts.deadline_s)


@dataclass(frozen=True)
class Constants:
    """Of the paper, tildes as `_t`; nu = mu / 2. rate: exchanges of a machine per unit of time, in which it takes one
    gradient."""

    nu: float
    alpha: float
    alpha_t: float
    eta: float
    theta: float
    beta_t: float
    delta: float
    gamma: float
    gamma_t: float
    rate: float


def constants_for(graph: Graph, smoothness: float, strong_convexity: float) -> Constants:
    """With kappa = sqrt(nu / L):  alpha = kappa/4, alpha~ = eta = eta~ = kappa/8, theta = 1/(2 kappa), beta = 1/2,
    beta~ = 2 chi_1 / kappa, delta = kappa/4, delta~ = 1, gamma = 1/(4 L), gamma~ = 1/(4 sqrt(L nu)).

    All edges are used alike, at rates for which chi_1 chi_2 = 1/2.
    """
    nu = strong_convexity / 2
    kappa = math.sqrt(nu / smoothness)
    rate, chi_1 = 0.0, 0.0
    if graph.size > 1:
        network = Resistance(meeting_rates(graph), graph.size)  # one exchange of a machine per unit of time
        rate = math.sqrt(2 * network.chi_1 * network.chi_2)
        chi_1 = network.chi_1 / rate
    return Constants(
        nu=nu,
        alpha=kappa / 4,
        alpha_t=kappa / 8,
        eta=kappa / 8,
        theta=1 / (2 * kappa),
        beta_t=2 * chi_1 / kappa,
        delta=kappa / 4,
        gamma=1 / (4 * smoothness),
        gamma_t=1 / (4 * math.sqrt(smoothness * nu)),
        rate=rate,
    )


class DADAO(OwnPace):
    """DADAO (Nabli, Oyallon 2023, 2208.00779): sum_i f_i, each L-smooth and mu-strongly convex.

    Each machine has x, x~, y, y~, z, z~, all but x and x~ = x from 0 on, and its own clock:

        between events   x' = eta (x~ - x)       x~' = eta (x - x~)
                         y' = alpha (y~ - y)     y~' = -theta (nu x~ + y + z)
                         z' = alpha (z~ - z)     z~' = alpha~ (z - z~)
        gradient         u = grad f(x) - nu x - y~;   x -= gamma u,  x~ -= gamma~ u,  y~ += (delta + delta~) u
        exchange (i, j)  m = s_i - s_j, s the y + z as sent;   z_i -= m / 2,  z~_i -= beta~ m;  for j the negative

    with the paper's constants: constants_for(). x of every machine goes to the minimiser, at a speed that does not
    depend on the graph, since the graph decides how often machines exchange.

    What is exact: alpha~ z + alpha z~ is what time leaves as it is, so its sum over all machines stays 0.

    live() is the method itself: both kinds of events at the times of Poisson clocks. As an Algorithm it takes a
    gradient at each step, then a unit of time passes and Poisson(rate / 2) neighbours are asked; what the optimizer
    does to the weights is replaced by the above.

    Args:
        swaps: of y + z.
        clock: what time it is here, in units in which a machine takes one gradient; default: steps so far.
    """

    def __init__(
        self,
        replica: Replica,
        port: Port,
        swaps: Swaps,
        constants: Constants,
        *,
        seed: int,
        deadline_s: float,
        clock: Callable[[], float] | None = None,
    ) -> None:
        super().__init__(replica, port, swaps, seed=seed, deadline_s=deadline_s)
        self._constants = constants
        self._flow = _matrix(constants)
        self._flown: tuple[float, Tensor] | None = None  # exp(flow t) of the last t
        self._steps = 0
        self._clock = clock or (lambda: float(self._steps))
        self._time = self._clock()
        self._new = True
        self._state = self._begin()  # x, x~, y, y~, z, z~

    def before_step(self, turn: Turn) -> Script[None]:
        """As Algorithm says."""
        if self._new and not self._swaps.made:
            self._state = self._begin()  # the weights may have been set since this was made
        self._new = False
        self._take_gradient(self._replica.gradient())
        return
        yield

    def live(self, gradient: Callable[[Tensor], Tensor], sources: list[int], until: float) -> Script[None]:
        """Take gradients and ask neighbours at the times of Poisson clocks, until a time of the port's clock.

        Args:
            gradient: of this machine's objective, at weights.
            sources: neighbours, each as likely.
        """
        chance = self._chance(0)
        now = self._port.now
        gradient_at = now() + chance.exponential()
        pause_s = 2 / self._constants.rate if sources else math.inf
        ask_at = now() + chance.exponential() * pause_s
        while now() < until:
            yield Wait(lambda: self._swaps.has_news() or self.asked(), min(gradient_at, ask_at, until))
            self._take_and_serve()
            if now() >= gradient_at:
                self._advance()
                self._take_gradient(gradient(self._state[0]))
                gradient_at += chance.exponential()
            if now() >= ask_at:
                self._ask_one_of(sources, chance)
                ask_at += chance.exponential() * pause_s
        self._advance()
        self._store()

    @property
    def asks_per_turn(self) -> float:
        """Poisson(rate / 2)."""
        return self._constants.rate / 2

    def conserved(self) -> Tensor:
        """What of this machine sums to 0 over all, whenever each gets to its events."""
        c, (_, _, _, _, z, z_t) = self._constants, self._state
        conserved: Tensor = (c.alpha_t * z + c.alpha * z_t) / (c.alpha_t + c.alpha)
        return conserved

    def state_dict(self) -> dict[str, Any]:
        """As Algorithm says."""
        return {**super().state_dict(), "steps": self._steps, "state": self._state.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As Algorithm says."""
        super().load_state_dict(state)
        self._new = False
        self._steps = int(state["steps"])
        self._time = self._clock()
        self._state = state["state"].to(self._replica.device, self._replica.dtype, copy=True)

    def merged(self) -> None:
        """x~ is x again; y and z keep what they say of the gradients."""
        self._state[0] = self._state[1] = self._replica.weights()

    def _begin(self) -> Tensor:
        x = self._replica.weights()
        return torch.stack([x, x, *[torch.zeros_like(x)] * 4])

    def _begin_turn(self, turn: Turn) -> None:
        self._steps += 1
        self._advance()

    def _asks_of(self, chance: np.random.Generator) -> int:
        return int(chance.poisson(self._constants.rate / 2))

    def _to_send(self) -> Tensor:
        self._advance()
        return self._state[2] + self._state[4]

    def _take(self, swap: Swap) -> None:
        self._advance()
        step = swap.step(self.mass)
        difference = swap.theirs - swap.mine
        self._state[4] += step * difference
        self._state[5] += 2 * self._constants.beta_t * step * difference

    def _weights(self) -> Tensor:
        return self._state[0]

    def _store(self) -> None:
        self._replica.set_weights(self._state[0])

    def _take_gradient(self, gradient: Tensor) -> None:
        c, (x, x_t, _, y_t, _, _) = self._constants, self._state
        u = gradient - c.nu * x - y_t
        x -= c.gamma * u
        x_t -= c.gamma_t * u
        y_t += (c.delta + 1) * u

    def _advance(self) -> None:
        """Let time pass until now."""
        now = self._clock()
        passed, self._time = now - self._time, now
        if passed:
            if self._flown is None or self._flown[0] != passed:  # between steps it is always 1
                flown = torch.linalg.matrix_exp(self._flow * passed)
                self._flown = passed, flown.to(self._state.device, self._state.dtype)
            self._state = self._flown[1] @ self._state


def _matrix(c: Constants) -> Tensor:
    """A of s' = A s, s = (x, x~, y, y~, z, z~)."""
    rows = [
        [-c.eta, c.eta, 0, 0, 0, 0],
        [c.eta, -c.eta, 0, 0, 0, 0],
        [0, 0, -c.alpha, c.alpha, 0, 0],
        [0, -c.theta * c.nu, -c.theta, 0, -c.theta, 0],
        [0, 0, 0, 0, -c.alpha, c.alpha],
        [0, 0, 0, 0, c.alpha_t, -c.alpha_t],
    ]
    return torch.tensor(rows, dtype=torch.float64)
