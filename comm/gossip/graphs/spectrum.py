"""What the spectrum says of a graph: how much a round contracts, and how hard it is to come from one end to another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from thinwire.comm.gossip.graphs.weights import Edge
from thinwire.comm.gossip.mixing import Graph, Mixing

_ROUNDS_OF_CHANCE = 1000  # of a graph that is drawn, over which its edges are counted


def rho(mixing: Mixing) -> float:
    """||W - J||_2: what one round leaves of the distance from consensus, at most."""
    return float(np.linalg.norm(mixing.matrix() - 1 / mixing.size, 2))


def spectral_gap(mixing: Mixing) -> float:
    """1 - rho(W)."""
    return 1 - rho(mixing)


def period_product(graph: Graph) -> NDArray[np.float64]:
    """W_(T-1) ... W_1 W_0 of one period.

    Raises:
        ValueError: the graph never repeats.
    """
    if not graph.period:
        raise ValueError(f"{graph.name} never repeats: it has no period to multiply out")
    product = np.eye(graph.size)
    for round in range(graph.period):
        product = graph.mixing(round).matrix() @ product
    return product


@dataclass(frozen=True, eq=False)
class Resistance:
    """How well a network conducts whose edges are used at certain rates.

    With the Laplacian  L = sum_(i,j) r_ij (e_i - e_j)(e_i - e_j)^T  of the rates r_ij, exchanges per unit of time:

        chi_1 = 1 / (smallest eigenvalue of L that is not zero)
        chi_2 = max over the edges of  1/2 (e_i - e_j)^T L^+ (e_i - e_j),  half the effective resistance

    as DADAO (Nabli & Oyallon 2022, 2208.00779) and A2CiD2 (Nabli et al. 2023, 2306.08289) have them; L^+ is the
    pseudo-inverse. Rates c times as high make both c times as low.

    Args:
        rates: by undirected edge, lower machine first; above 0 where the network is to conduct.
        size: machines.
    Raises:
        ValueError: the edges of positive rate do not connect all machines.
    """

    rates: Mapping[Edge, float]
    size: int

    def __post_init__(self) -> None:
        if self.size > 1 and self._eigenvalues[1] <= 1e-13 * self._eigenvalues[-1]:
            raise ValueError("rates: the edges of positive rate do not connect all machines, so chi_1 is infinite")

    @cached_property
    def laplacian(self) -> NDArray[np.float64]:
        """L, [size, size]."""
        dense = np.zeros((self.size, self.size))
        for (i, j), rate in self.rates.items():
            dense[[i, j], [j, i]] -= rate
            dense[[i, j], [i, j]] += rate
        return dense

    @cached_property
    def chi_1(self) -> float:
        """0 for a single machine."""
        return float(1 / self._eigenvalues[1]) if self.size > 1 else 0.0

    @cached_property
    def chi_2(self) -> float:
        """0 for a single machine."""
        conducts = [edge for edge, rate in self.rates.items() if rate > 0]
        if not conducts:
            return 0.0
        i, j = np.array(conducts).T
        inverse = np.linalg.inv(self.laplacian + 1 / self.size)  # L^+ + J: the same on all differences
        return float((inverse[i, i] + inverse[j, j] - 2 * inverse[i, j]).max()) / 2

    @property
    def exchanges(self) -> float:
        """sum(r) * sqrt(2 chi_1 chi_2): the rate of messages at which DADAO's condition chi_1 chi_2 <= 1/2 just holds.

        It does not change if all rates are scaled.
        """
        return sum(self.rates.values()) * float(np.sqrt(2 * self.chi_1 * self.chi_2))

    @cached_property
    def _eigenvalues(self) -> NDArray[np.float64]:
        return np.asarray(np.linalg.eigvalsh(self.laplacian), np.float64)


def chi_1(rates: Mapping[Edge, float], size: int) -> float:
    """As Resistance says."""
    return Resistance(rates, size).chi_1


def chi_2(rates: Mapping[Edge, float], size: int) -> float:
    """As Resistance says."""
    return Resistance(rates, size).chi_2


def meeting_rates(graph: Graph) -> dict[Edge, float]:
    """How often the two of an edge meet, if every round each machine asks one of its neighbours, all equally likely.

    Half of these meetings: a machine that has neighbours in every round takes part in one exchange a round on average,
    and size / 2 exchanges a round are made by all; a machine without neighbours in a round asks nobody. Of a graph that
    changes, the mean over its period, or over the first 1000 rounds if it has none. For a ring every rate is 1/2, as in
    A2CiD2.
    """
    rounds = graph.period or _ROUNDS_OF_CHANCE
    asked: dict[Edge, float] = {}
    for round in range(rounds):
        mixing = graph.mixing(round)
        for rank in range(graph.size):
            neighbours = mixing.sources(rank)
            for other in neighbours:
                edge = (min(rank, other), max(rank, other))
                asked[edge] = asked.get(edge, 0.0) + 1 / len(neighbours)
    return {edge: count / rounds / 2 for edge, count in sorted(asked.items())}
