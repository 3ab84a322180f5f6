"""Claim: base-(k+1) is an exact mean for any number of machines, and links used at the right rates save most messages.

    python benchmarks/gossip_graphs.py [--trials 20] [--json FILE]

Four tables; the JSON has the third, and files beside it, with _exact, _gaps and _rates in their names, the others.

    exact   base-(k+1) for all n of 1..100: the largest error of a period's product, its rounds, and neighbours
    gaps    spectral gap of one round against its closed form, the largest difference over many n
    rounds  to 1e-3 of the distance from consensus, from any start, by graph and n; matching and equi by their first
            draws; "copies" is what a machine has then sent, in copies of the model
    rates   two sites of n/2 machines, complete graphs joined by one link. predicted: messages of DADAO's bound,
            sum(r) sqrt(2 chi_1 chi_2), and of pairs that average, sum(r) chi_1. measured: exchanges until the distance
            is 1e-6 of what it was, with A2CiD2 and with pairs, at Poisson times of these rates, from normal starts
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from runner import Row, arguments, report

from thinwire.comm.gossip.graphs import EachGraph, GraphSettings, build_graph
from thinwire.comm.gossip.graphs.consensus import rounds_to_consensus
from thinwire.comm.gossip.graphs.edge_rates import optimal_rates
from thinwire.comm.gossip.graphs.spectrum import Resistance, period_product, spectral_gap
from thinwire.comm.gossip.graphs.weights import Edge
from thinwire.comm.gossip.mixing import Graph

READ: TypeAdapter[EachGraph] = TypeAdapter(GraphSettings)
SIZES = (4, 6, 8, 12, 16, 25, 32, 33, 64, 100)
KINDS: dict[str, object] = {
    "path": "path",
    "ring": "ring",
    "star": "star",
    "torus": "torus",
    "hypercube": "hypercube",
    "exponential": "exponential",
    "erdos_renyi": "erdos_renyi",
    "matching": "matching",
    "equi": "equi",
    "one_peer_exponential": "one_peer_exponential",
    **{f"base_k k={k}": {"kind": "base_k", "k": k} for k in (1, 2, 3, 4)},
    "complete": "complete",
}
CLOSED_FORMS: dict[str, tuple[Callable[[int], float], Sequence[int]]] = {
    "ring": (lambda n: (1 + 2 * math.cos(2 * math.pi / n)) / 3, range(4, 101)),
    "path": (lambda n: (1 + 2 * math.cos(math.pi / n)) / 3, range(3, 101)),
    "torus": (lambda n: (3 + 2 * math.cos(2 * math.pi / math.isqrt(n))) / 5, [side * side for side in range(4, 11)]),
    "hypercube": (lambda n: (n.bit_length() - 2) / n.bit_length(), [4, 8, 16, 32, 64]),
    "exponential": (lambda n: 1 - 2 / ((n - 1).bit_length() + 1), range(2, 101, 2)),
    "star": (lambda n: 1 - 1 / n, range(3, 101)),
    "complete": (lambda n: 0.0, range(2, 101)),
}
SEEDS = 5  # of graphs that are drawn


def main() -> None:
    parser = arguments(str(__doc__).splitlines()[0])
    parser.set_defaults(device="cpu", threads=1)
    parser.add_argument("--trials", type=int, default=20, help="starts of each measured consensus")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tables = {
        "exact": [exact(k) for k in (1, 2, 3, 4)],
        "gaps": [gaps(kind) for kind in CLOSED_FORMS],
        "": [rounds(kind) for kind in KINDS],
        "rates": [rates(size, options.trials) for size in (8, 16, 32)],
    }
    for name, rows in tables.items():
        path: Path | None = options.json
        if path is not None and name:
            path = path.with_stem(f"{path.stem}_{name}")
        report(str(__doc__).splitlines()[0], rows, device=torch.device("cpu"), path=path)
        print()


def build(given: object, size: int, seed: int = 0) -> Graph:
    return build_graph(READ.validate_python(given), size, seed)


def exact(k: int) -> Row:
    error, most, longest, bound = 0.0, 0, 0, 0.0
    for size in range(1, 101):
        graph = build({"kind": "base_k", "k": k}, size)
        error = max(error, float(np.abs(period_product(graph) - 1 / size).max()) * size)
        most = max(most, *(len(graph.mixing(t).sources(i)) for t in range(graph.period) for i in range(size)))
        longest = max(longest, graph.period)
        bound = max(bound, graph.period / (2 * math.log(size, k + 1) + 2))
    return {
        "graph": f"base_k k={k}",
        "machines": "1..100",
        "largest error, of 1/n": error,
        "most neighbours": most,
        "most rounds": longest,
        "of 2 log_(k+1) n + 2, at most": bound,
    }


def gaps(kind: str) -> Row:
    rho, sizes = CLOSED_FORMS[kind]
    found = {n: spectral_gap(build(kind, n).mixing(0)) for n in sizes}
    return {
        "graph": kind,
        "machines": f"{len(sizes)} of {min(sizes)}..{max(sizes)}",
        "largest difference": max(abs(gap - 1 + rho(n)) for n, gap in found.items()),
        "gap at 16": found[16],
        "gap at 64": found[64],
    }


def rounds(kind: str) -> Row:
    row: dict[str, str | int | float] = {"graph": kind}
    copies: dict[str, str | float] = {}
    for size in SIZES:
        try:
            graphs = [build(KINDS[kind], size, seed) for seed in range(SEEDS)]
        except ValueError:
            row[f"n={size}"], copies[f"copies, n={size}"] = "-", "-"  # there is none of so many
            continue
        if graphs[0].period and kind != "erdos_renyi":
            graphs = graphs[:1]
        needed = [rounds_to_consensus(graph) for graph in graphs]
        assert all(count is not None for count in needed)
        sent = [_copies(graph, count or 0) for graph, count in zip(graphs, needed, strict=True)]
        row[f"n={size}"] = float(np.mean([count or 0 for count in needed]))
        if size in (16, 33, 100):
            copies[f"copies, n={size}"] = float(np.mean(sent))
    return row | {name: copies[name] for name in (f"copies, n={size}" for size in (16, 33, 100))}


def _copies(graph: Graph, rounds: int) -> float:
    """Messages that a machine has sent on average."""
    period = graph.period or rounds
    each = [sum(len(graph.mixing(t).targets(i)) for i in range(graph.size)) / graph.size for t in range(period)]
    return sum(each[t % period] for t in range(rounds))


def rates(size: int, trials: int) -> Row:
    edges = two_sites(size)
    uniform = dict.fromkeys(edges, 1.0)
    every, fewer = optimal_rates(edges, size, drop=False), optimal_rates(edges, size)
    plain = optimal_rates(edges, size, accelerated=False)
    measured = {
        name: exchanges(r, size, accelerated, trials)
        for name, r, accelerated in (
            ("uniform", uniform, True),
            ("every", every.rates, True),
            ("fewer", fewer.rates, True),
            ("pairs uniform", uniform, False),
            ("pairs", plain.rates, False),
        )
    }
    link = (size // 2 - 1, size // 2)
    return {
        "machines": size,
        "predicted uniform": every.uniform_cost,
        "two rates": two_rates(edges, size),
        "all edges": every.cost,
        "fewer edges": fewer.cost,
        "saved, two rates": every.uniform_cost / two_rates(edges, size),
        "saved, all edges": every.uniform_cost / every.cost,
        "saved, fewer edges": every.uniform_cost / fewer.cost,
        "edges used": sum(rate > 0 for rate in fewer.rates.values()),
        "of": len(edges),
        "share of the link": fewer.rates[link] / sum(fewer.rates.values()),
        "measured uniform": measured["uniform"],
        "saved, all edges, measured": measured["uniform"] / measured["every"],
        "saved, fewer edges, measured": measured["uniform"] / measured["fewer"],
        "saved by pairs": plain.uniform_cost / plain.cost,
        "saved by pairs, measured": measured["pairs uniform"] / measured["pairs"],
    }


def two_sites(size: int) -> list[Edge]:
    half = size // 2
    cliques = [(start + i, start + j) for start in (0, half) for j in range(half) for i in range(j)]
    return [*cliques, (half - 1, half)]


def two_rates(edges: Sequence[Edge], size: int) -> float:
    """The best with one rate for the link and one for all other edges: by trial of ratios."""
    link = (size // 2 - 1, size // 2)
    ratios = np.geomspace(0.3, 300, 2000)
    return min(Resistance({**dict.fromkeys(edges, 1.0), link: float(ratio)}, size).exchanges for ratio in ratios)


def exchanges(rates: dict[Edge, float], size: int, accelerated: bool, trials: int, factor: float = 1e-6) -> float:
    """Exchanges until the distance from consensus is `factor` of what it was; the mean of several starts."""
    return float(np.mean([_exchanges(rates, size, accelerated, factor, seed) for seed in range(trials)]))


def _exchanges(rates: dict[Edge, float], size: int, accelerated: bool, factor: float, seed: int) -> int:
    chance = np.random.default_rng(seed)
    used = [edge for edge, rate in rates.items() if rate > 0]
    total = sum(rates.values())
    shares = np.array([rates[edge] for edge in used]) / total
    network = Resistance(rates, size)
    eta = 1 / (2 * math.sqrt(network.chi_1 * network.chi_2))
    pull = math.sqrt(network.chi_1 / network.chi_2) / 2 if accelerated else 0.5
    x: NDArray[np.float64] = chance.normal(size=(size, 16))
    other, seen, now, count = x.copy(), np.zeros(size), 0.0, 0
    start = _distance(x)
    while True:
        picks, waits = chance.choice(len(used), 64, p=shares), chance.exponential(1 / total, 64)
        for pick, wait in zip(picks.tolist(), waits.tolist(), strict=True):
            now += wait
            ends = list(used[pick])
            if accelerated:
                _drift(x, other, eta * (now - seen[ends]), ends)
                seen[ends] = now
            difference = x[ends[0]] - x[ends[1]]
            for end, sign in zip(ends, (-1, 1), strict=True):
                x[end] += sign * difference / 2
                other[end] += sign * difference * pull
            count += 1
        level = x.copy(), other.copy()
        if accelerated:  # machines hold states of different times until they are brought to one
            _drift(*level, eta * (now - seen), list(range(size)))
        if max(_distance(level[0]), _distance(level[1]) if accelerated else 0.0) <= factor * start:
            return count


def _drift(x: NDArray[np.float64], other: NDArray[np.float64], turns: NDArray[np.float64], ends: list[int]) -> None:
    """x' = eta (other - x), other' = eta (x - other) for the given eta * time, in place."""
    middle, half = (x[ends] + other[ends]) / 2, (x[ends] - other[ends]) / 2 * np.exp(-2 * turns)[:, None]
    x[ends], other[ends] = middle + half, middle - half


def _distance(x: NDArray[np.float64]) -> float:
    return float(np.sqrt(((x - x.mean(0)) ** 2).sum(1).mean()))


if __name__ == "__main__":
    main()
