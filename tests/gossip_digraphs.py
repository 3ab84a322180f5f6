"""Directed graphs for tests of gossip."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from thinwire.comm.gossip.mixing import Mixing


def digraph(n: int, seed: int) -> Mixing:
    """A random strongly connected digraph whose columns sum to 1 and whose rows do not."""
    chance = np.random.default_rng(seed)
    rows: list[dict[int, float]] = [{} for _ in range(n)]
    for j in range(n):
        targets = {j, (j + 1) % n, *chance.choice(n, size=1).tolist()}
        weights = chance.dirichlet(np.full(len(targets), 5.0))
        for i, weight in zip(sorted(targets), weights, strict=True):
            rows[i][j] = float(weight)
    return Mixing(rows, symmetric=False)


def one_peer(n: int, round: int) -> Mixing:
    """One-peer exponential: i -> i + 2^round."""
    shift = 2 ** (round % max(1, (n - 1).bit_length())) % n
    return Mixing([{i: 0.5, (i - shift) % n: 0.5} for i in range(n)], symmetric=False)


class Directed:
    """Graph of a function of the round."""

    name = "directed"
    period = 0
    symmetric = False

    def __init__(self, size: int, mixing: Callable[[int], Mixing]) -> None:
        self.size = size
        self._mixing = mixing

    def mixing(self, round: int) -> Mixing:
        return self._mixing(round)
