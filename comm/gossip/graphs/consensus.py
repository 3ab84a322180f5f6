"""How long a graph takes until all machines agree, in rounds and, over given links, in seconds."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from thinwire.comm.gossip.graphs.links import Links
from thinwire.comm.gossip.graphs.spectrum import period_product, rho
from thinwire.comm.gossip.mixing import Graph, Mixing

_MOST_ROUNDS = 1_000_000
_MOST_ROUNDS_OF_CHANCE = 2_000


def rounds_to_consensus(graph: Graph, factor: float = 1e-3) -> int | None:
    """Rounds after which the distance from consensus is at most `factor` times what it was, from any start.

    The distance is Xi = sqrt(1/n sum_i ||x_i - mean||^2), and after t rounds it is at most ||W_(t-1) ... W_0 - J||_2
    times as large. Of a graph that is drawn it is that of its first rounds. Of directed weights whose rows do not sum
    to 1, it is that of push-sum, x divided by its mass.

    Returns: None if it takes more than a million rounds, or 2000 of a graph that is drawn.
    """
    if not 0 < factor < 1:
        raise ValueError(f"factor: {factor:g}; allowed is above 0 and below 1")
    if graph.size == 1:
        return 0
    if graph.period == 1 and graph.symmetric:
        return _rounds_of_powers(rho(graph.mixing(0)), factor)
    if not graph.period:
        product = np.eye(graph.size)
        for round in range(_MOST_ROUNDS_OF_CHANCE):
            product = _applied(graph.mixing(round), product)
            if _within(product, factor):
                return round + 1
        return None
    return _rounds_of_periods(graph, factor)


def round_s(mixing: Mixing, links: Links, payload_bytes: float) -> float:
    """Seconds of one round: of its slowest machine, sending or receiving.

    A machine's own line is as fast as the fastest of its links, and what it sends to several shares it; a slower link
    is a limit for what goes over it alone. To that comes the largest latency. Pairs take exactly this in a simulated
    network; of several neighbours, the simulated lines are less well filled, and rings take up to a quarter longer.
    """
    slowest_s = 0.0
    for rank in range(mixing.size):
        for ways in (
            [links.between(rank, to) for to in mixing.targets(rank)],
            [links.between(source, rank) for source in mixing.sources(rank)],
        ):
            if ways:
                shared_s = len(ways) * 8 * payload_bytes / max(link.bps for link in ways)
                alone_s = max(8 * payload_bytes / link.bps for link in ways)
                slowest_s = max(slowest_s, max(shared_s, alone_s) + max(link.latency_s for link in ways))
    return slowest_s


def seconds_to_consensus(graph: Graph, links: Links, payload_bytes: float, factor: float = 1e-3) -> float:
    """Seconds for rounds_to_consensus() rounds one after another, without computation; infinite if there are none.

    Args:
        payload_bytes: one machine's vector.
    """
    rounds = rounds_to_consensus(graph, factor)
    if rounds is None:
        return math.inf
    if not graph.period:
        return math.fsum(round_s(graph.mixing(round), links, payload_bytes) for round in range(rounds))
    each_s = [round_s(graph.mixing(round), links, payload_bytes) for round in range(graph.period)]
    whole, rest = divmod(rounds, graph.period)
    return whole * math.fsum(each_s) + math.fsum(each_s[:rest])


def _rounds_of_powers(contraction: float, factor: float) -> int | None:
    """The least t with contraction^t <= factor."""
    if contraction <= factor:
        return 1
    if contraction >= 1:
        return None
    needed = math.ceil(math.log(factor) / math.log(contraction) - 1e-9)
    return needed if needed <= _MOST_ROUNDS else None


def _rounds_of_periods(graph: Graph, factor: float) -> int | None:
    """Whole periods by squaring, as many as are too few; then round by round.

    Relies on distances that never grow, which doubly stochastic rounds cannot do; with push-sum the answer is the first
    round found after the last whole number of periods that was too few.
    """
    powers = [period_product(graph)]
    while not _within(powers[-1], factor):
        if graph.period * 2 ** len(powers) > _MOST_ROUNDS:
            return None
        powers.append(powers[-1] @ powers[-1])
    product, periods = np.eye(graph.size), 0
    for bit in reversed(range(len(powers) - 1)):
        longer = powers[bit] @ product
        if not _within(longer, factor):
            product, periods = longer, periods + 2**bit
    round = periods * graph.period
    while not _within(product, factor):
        product = _applied(graph.mixing(round), product)
        round += 1
    return round


def _applied(mixing: Mixing, product: NDArray[np.float64]) -> NDArray[np.float64]:
    """W times the product, by W's rows."""
    applied: NDArray[np.float64] = mixing.matrix() @ product
    return applied


def _within(product: NDArray[np.float64], factor: float) -> bool:
    """Whether ||diag(mass)^-1 P - J||_2 <= factor, with push-sum's mass of each machine: 1 if P's rows sum to 1."""
    mass = product.sum(1, keepdims=True)
    left = product / mass - 1 / len(product)
    together = float(np.linalg.norm(left))  # over all directions, of which at most n - 1 are not 0: quick to know
    if together <= factor or together > factor * math.sqrt(len(product) - 1):
        return together <= factor
    return float(np.linalg.norm(left, 2)) <= factor
