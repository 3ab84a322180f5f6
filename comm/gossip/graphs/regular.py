"""Graphs of textbooks: ring, path, torus, hypercube, complete, star. Static, undirected, Metropolis weights."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from thinwire.comm.gossip.graphs.sequence import Repeating
from thinwire.comm.gossip.graphs.weights import complete_mixing, metropolis, undirected
from thinwire.comm.settings import Settings


class RingSettings(Settings):
    """`graph: ring`: each machine averages with the two beside it, 1/3 each. With n = 2 it is a pair, 1/2 each."""

    kind: Literal["ring"] = "ring"

    def build(self, size: int, seed: int) -> Repeating:
        """The graph of so many machines."""
        edges = undirected((i, (i + 1) % size) for i in range(size))
        return Repeating(f"ring of {size}", [metropolis(edges, size)])


class PathSettings(Settings):
    """`graph: path`: a ring with one link missing."""

    kind: Literal["path"] = "path"

    def build(self, size: int, seed: int) -> Repeating:
        """The graph of so many machines."""
        return Repeating(f"path of {size}", [metropolis([(i, i + 1) for i in range(size - 1)], size)])


class TorusSettings(Settings):
    """`graph: {kind: torus, rows: 4, columns: 8}`: a grid whose borders are joined; machine r * columns + c.

    rows, columns: of the grid; auto: what the other leaves, or as square as the number of machines allows.
    """

    kind: Literal["torus"] = "torus"
    rows: Literal["auto"] | int = "auto"
    columns: Literal["auto"] | int = "auto"

    def build(self, size: int, seed: int) -> Repeating:
        """The graph of so many machines. Raises ValueError if they do not fill a grid."""
        rows, columns = self._shape(size)
        pairs = []
        for r in range(rows):
            for c in range(columns):
                pairs.append((r * columns + c, r * columns + (c + 1) % columns))
                pairs.append((r * columns + c, (r + 1) % rows * columns + c))
        return Repeating(f"torus of {rows} x {columns}", [metropolis(undirected(pairs), size)])

    def _shape(self, size: int) -> tuple[int, int]:
        given = {name: value for name in ("rows", "columns") if (value := getattr(self, name)) != "auto"}
        for name, value in given.items():
            if value < 1 or size % value:
                raise ValueError(
                    f"method.graph.{name}: {value}, but {size} machines fill a grid only with a divisor of {size} "
                    f"(auto takes {_squarest(size)}), or take base_k, which any number of machines can have"
                )
        if len(given) == 2 and self.rows * self.columns != size:  # type: ignore[operator]
            raise ValueError(
                f"method.graph: a torus of {self.rows} x {self.columns} has other than {size} machines; leave rows or "
                "columns at auto"
            )
        if isinstance(self.rows, int):
            return self.rows, size // self.rows
        if isinstance(self.columns, int):
            return size // self.columns, self.columns
        rows = _squarest(size)
        if rows == 1 and size > 3:
            raise ValueError(
                f"method.graph: {size} machines, a prime number, fill no grid: a torus would be a ring; take ring, or "
                "base_k, which any number of machines can have"
            )
        return rows, size // rows


def _squarest(size: int) -> int:
    """The largest divisor that is at most the square root."""
    return next(rows for rows in range(math.isqrt(size), 0, -1) if size % rows == 0)


class HypercubeSettings(Settings):
    """`graph: hypercube`: 2^d machines, each averages with the d whose number differs in one bit; 1/(d+1) each."""

    kind: Literal["hypercube"] = "hypercube"

    def build(self, size: int, seed: int) -> Repeating:
        """The graph of so many machines. Raises ValueError if they are no power of two."""
        if size & (size - 1):
            below = 1 << (size.bit_length() - 1)
            raise ValueError(
                f"method.graph: a hypercube has a power of two of machines, such as {below} or {2 * below}, not "
                f"{size}; take base_k, which any number of machines can have"
            )
        bits = size.bit_length() - 1
        edges = undirected((i, i ^ (1 << bit)) for i in range(size) for bit in range(bits))
        return Repeating(f"hypercube of {size}", [metropolis(edges, size)])


class CompleteSettings(Settings):
    """`graph: complete`: everybody averages with everybody, 1/n each: consensus in one round of n - 1 messages."""

    kind: Literal["complete"] = "complete"

    def build(self, size: int, seed: int) -> Repeating:
        """The graph of so many machines."""
        return Repeating(f"complete graph of {size}", [complete_mixing(size)])


class StarSettings(Settings):
    """`graph: star`: all average with one machine.

    hub: that machine.
    """

    kind: Literal["star"] = "star"
    hub: int = Field(0, ge=0)

    def build(self, size: int, seed: int) -> Repeating:
        """The graph of so many machines. Raises ValueError if the hub is none of them."""
        if self.hub >= size:
            raise ValueError(f"method.graph.hub: {self.hub}, but the machines are 0..{size - 1}")
        edges = undirected((i, self.hub) for i in range(size))
        return Repeating(f"star of {size}", [metropolis(edges, size)])
