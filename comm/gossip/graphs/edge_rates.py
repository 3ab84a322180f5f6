"""How often each link is best used, so that all machines agree after the fewest messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from thinwire.comm.gossip.graphs.descent import descend
from thinwire.comm.gossip.graphs.reach import reached
from thinwire.comm.gossip.graphs.spectrum import Resistance
from thinwire.comm.gossip.graphs.weights import Edge

Array = NDArray[np.float64]

_SHARPNESS = (8.0, 32.0, 128.0, 512.0, 2048.0)  # of the soft maxima, one after the other
_WORTH = 1e-3  # share of the cost that must be saved to give up edges


@dataclass(frozen=True)
class EdgeRates:
    """Rates at which the edges of a network are best used.

    rates: exchanges per unit of time, by edge, such that a machine takes part in one on average.
    cost, uniform_cost: what these rates cost to a given consensus, and what equal rates do; their quotient counts.
    """

    rates: dict[Edge, float]
    cost: float
    uniform_cost: float


def optimal_rates(
    edges: Sequence[Edge],
    size: int,
    *,
    accelerated: bool = True,
    cost_s: Mapping[Edge, float] | None = None,
    drop: bool = True,
) -> EdgeRates:
    """The rates r of least  cost(r) = sum_e c_e r_e * T(r),  with T the time to a given consensus up to a constant:

        accelerated  T = sqrt(2 chi_1 chi_2)  A2CiD2 (2306.08289) and DADAO (2208.00779), whose number of messages it is
        otherwise    T = chi_1                pairs that average

    and c_e = 1, so that messages count, or the seconds that an exchange takes on the edge. Scaling r changes nothing.

    DADAO's authors solve a semidefinite program. Here log r is found by quasi-Newton steps on the cost with soft
    maxima (the sum of p-th powers in place of 1/smallest eigenvalue and of the largest resistance), p rising until they
    are hard; the soft cost is smooth also where eigenvalues or resistances coincide, as they do at the optimum. As
    chi_2 is the largest resistance of an edge in use, a network can be better without some edges: the least used ones
    are dropped as long as that lowers the cost.

    Args:
        edges: of an undirected, connected graph, each once.
        size: machines.
        accelerated: which T.
        cost_s: c, seconds, by edge.
        drop: whether a rate may be 0. The network that is left stays connected, but loses ways round a dead machine.
    Raises:
        ValueError: the edges do not connect all machines, or a cost is not above 0 and finite.
    """
    costs = {edge: 1.0 if cost_s is None else cost_s[edge] for edge in edges}
    if not all(0 < cost < np.inf for cost in costs.values()):
        raise ValueError("cost_s: seconds of an edge are above 0 and finite")
    if size == 1:
        return EdgeRates({}, 0.0, 0.0)
    uniform_cost = _Network(costs, size, accelerated).hard_cost(np.zeros(len(costs)))
    best = _optimum(costs, size, accelerated)
    while drop and (without := _without_least(best, costs, size, accelerated)) is not None:
        best = without
    used, log_rates, cost = best
    rates = np.exp(log_rates - log_rates.max())
    rates *= size / 2 / rates.sum()
    return EdgeRates({**dict.fromkeys(edges, 0.0), **dict(zip(used, rates.tolist(), strict=True))}, cost, uniform_cost)


_Optimum: TypeAlias = tuple[list[Edge], Array, float]
"""Edges, the log rates of least cost, and the cost."""


def _optimum(costs: Mapping[Edge, float], size: int, accelerated: bool) -> _Optimum:
    """With all of these edges: the best from equal rates, and from rates that are lower the dearer an edge is."""
    network = _Network(costs, size, accelerated)
    equal = np.zeros(len(costs))
    cheap_first = -np.log(np.array(list(costs.values()))) / 2
    starts = [equal] if (cheap_first == cheap_first[0]).all() else [equal, cheap_first]
    best = min((network.best_from(start, _SHARPNESS) for start in starts), key=network.hard_cost)
    return list(costs), best, network.hard_cost(best)


def _without_least(before: _Optimum, costs: Mapping[Edge, float], size: int, accelerated: bool) -> _Optimum | None:
    """The optimum without the least used edges, if that is better: without half of them, a quarter, ... or the least.

    Edges whose rates differ by less than a percent go together: those of a symmetric network.
    """
    used, log_rates, cost = before
    order = np.argsort(log_rates, kind="stable")
    tried = set()
    for halvings in range(1, len(used).bit_length() + 1):
        kept = log_rates > log_rates[order[len(used) >> halvings]] + 0.01
        edges = [edge for edge, keep in zip(used, kept.tolist(), strict=True) if keep]
        if len(edges) not in tried and len(reached(0, edges, size, both_ways=True)) == size:
            network = _Network({edge: costs[edge] for edge in edges}, size, accelerated)
            best = network.best_from(log_rates[kept], _SHARPNESS[2:])
            if network.hard_cost(best) < cost * (1 - _WORTH):
                return edges, best, network.hard_cost(best)
        tried.add(len(edges))
    return None


class _Network:
    """The cost of log rates, hard and soft, and its gradient."""

    def __init__(self, costs: Mapping[Edge, float], size: int, accelerated: bool) -> None:
        self._edges = list(costs)
        self._size = size
        self._costs = np.array(list(costs.values()))
        self._accelerated = accelerated
        ends = np.array(self._edges, dtype=np.intp).reshape(-1, 2)
        self._i, self._j = ends[:, 0], ends[:, 1]

    def hard_cost(self, log_rates: Array) -> float:
        """sum(c r) T(r)."""
        rates = np.exp(log_rates - log_rates.max(initial=-np.inf))
        network = Resistance(dict(zip(self._edges, rates.tolist(), strict=True)), self._size)
        time = (2 * network.chi_1 * network.chi_2) ** 0.5 if self._accelerated else network.chi_1
        return float(self._costs @ rates) * time

    def best_from(self, start: Array, sharpness: Sequence[float]) -> Array:
        """The log rates of least hard cost on the way from these to where the soft costs lead."""
        best = at = start
        for p in sharpness:
            at = descend(self._soft_cost(p), at)
            best = min(best, at, key=self.hard_cost)
        return best

    def _soft_cost(self, p: float) -> Callable[[Array], tuple[float, Array]]:
        """Logarithm of the soft cost, and its gradient by the log rates.

        d mu_k / d r_e = (v_k . b_e)^2 for an eigenvalue, and d R_f / d r_e = -(b_f . L^+ b_e)^2 for a resistance, with
        b_e = e_i - e_j.
        """

        def evaluate(log_rates: Array) -> tuple[float, Array]:
            scaled = np.exp(log_rates - log_rates.max())
            laplacian = np.zeros((self._size, self._size))
            np.add.at(laplacian, (self._i, self._j), -scaled)
            laplacian += laplacian.T
            laplacian -= np.diag(laplacian.sum(0))
            values, vectors = np.linalg.eigh(laplacian)
            values, vectors = values[1:], vectors[:, 1:]  # without the mean's
            if values[0] <= 1e-13 * values[-1]:
                return np.inf, np.zeros_like(log_rates)
            total = float(self._costs @ scaled)
            log_chi_1, shares = _soft_maximum(-np.log(values), p)
            slope = self._across((vectors * (shares / values)) @ vectors.T)
            if not self._accelerated:
                return np.log(total) + log_chi_1, scaled * (self._costs / total - slope)
            inverse = (vectors / values) @ vectors.T
            resistance = self._across(inverse)
            log_chi_2, shares = _soft_maximum(np.log(resistance), p)
            strained = np.zeros_like(laplacian)
            np.add.at(strained, (self._i, self._j), -shares / resistance)
            strained += strained.T
            strained -= np.diag(strained.sum(0))
            slope = (slope + self._across(inverse @ strained @ inverse)) / 2
            return np.log(total) + (log_chi_1 + log_chi_2) / 2, scaled * (self._costs / total - slope)

        return evaluate

    def _across(self, matrix: Array) -> Array:
        """b_e^T M b_e of every edge."""
        i, j = self._i, self._j
        across: Array = matrix[i, i] + matrix[j, j] - matrix[i, j] - matrix[j, i]
        return across


def _soft_maximum(logarithms: Array, p: float) -> tuple[float, Array]:
    """1/p log sum exp(p l), and its derivative by each l."""
    powers = np.exp(p * (logarithms - logarithms.max()))
    return float(logarithms.max() + np.log(powers.sum()) / p), powers / powers.sum()
