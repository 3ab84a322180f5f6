"""Who owns which rows of a unit's parameters, and how they lie in flat buffers. Integers only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from thinwire.kernels.block_payload import Runs


def chunk(rows: int, parts: int, part: int) -> tuple[int, int]:
    """Rows [start, stop) of a part, as torch.chunk and DTensor's Shard(0) cut them: the first parts are the larger."""
    each = -(-rows // parts)
    return min(part * each, rows), min((part + 1) * each, rows)


class Ownership:
    """The rows of each parameter that each owner has, cut first for the params level, then grads, then optim.

    Owners are numbered as Levels numbers the ranks of a group. Every cut is along the first dimension and keeps rows
    whole, so that an owner's rows of a parameter are the local shard of a DTensor with placements [Shard(0)] * 3 on the
    mesh (params, grads, optim), or on that mesh without dimensions of one rank: other programs can load them. In the
    flat order of a unit, owner after owner, each has its rows of every parameter, one after another.

    Args:
        shapes: of the unit's parameters, by name; a scalar counts as one row.
        cuts: s_p, s_g / s_p, s_o / s_g: into how many parts each of the three cuts.
    Attributes:
        owners: s_o.
        offsets: where in the flat order each owner's elements begin, and, last, where they end.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], cuts: Sequence[int]) -> None:
        self.shapes = dict(shapes)
        self.cuts = tuple(cuts)
        self.owners = math.prod(cuts)
        self._row_numel = {name: math.prod(shape[1:]) for name, shape in self.shapes.items()}
        self._rows = {name: [self._cut(name, owner) for owner in range(self.owners)] for name in self.shapes}
        counts = [sum(self.numel(name, owner) for name in self.shapes) for owner in range(self.owners)]
        self.offsets = [0, *accumulate(counts)]

    def rows(self, name: str, owner: int) -> tuple[int, int]:
        """Rows [start, stop) of a parameter that an owner has."""
        return self._rows[name][owner]

    def numel(self, name: str, owner: int) -> int:
        """Elements of a parameter that an owner has."""
        start, stop = self._rows[name][owner]
        return (stop - start) * self._row_numel[name]

    def count(self, first: int, last: int) -> int:
        """Elements of the owners first, ..., last - 1."""
        return self.offsets[last] - self.offsets[first]

    def counts(self, first: int, last: int) -> list[int]:
        """Elements of each of the owners first, ..., last - 1."""
        return [self.count(owner, owner + 1) for owner in range(first, last)]

    def pieces(self, sources: Mapping[str, Tensor], first: int, last: int) -> list[Tensor]:
        """What the owners first, ..., last - 1 have, in flat order: views, the empty ones left out.

        Args:
            sources: for each parameter, contiguous rows that begin with those of owner `first`.
        """
        found = []
        for owner in range(first, last):
            for name, source in sources.items():
                start, stop = self._rows[name][owner]
                if start < stop:
                    begin, width = self._rows[name][first][0], self._row_numel[name]
                    found.append(source.view(-1)[(start - begin) * width : (stop - begin) * width])
        return found

    def named_pieces(self, flat: Tensor, owner: int) -> dict[str, Tensor]:
        """One owner's flat elements, parameter by parameter, each in its shape: views; empty ones included."""
        parts = flat.split([self.numel(name, owner) for name in self.shapes])
        found = {}
        for (name, shape), part in zip(self.shapes.items(), parts, strict=True):
            start, stop = self._rows[name][owner]
            found[name] = part.view(stop - start, *shape[1:])  # -1 would not do for rows of no element
        return found

    def order_of_fsdp(self, counts: Sequence[int]) -> Runs:
        """Where the values of the flat order lie in FSDP2's flat gradient of the unit.

        FSDP2 puts the chunks of the params level one after another, and in each the parameters, padded to the rows of
        the largest chunk.

        Args:
            counts: into which runs the flat order is cut.
        """
        each = {name: -(-self._count_rows(name) // self.cuts[0]) * self._row_numel[name] for name in self.shapes}
        per_chunk, segments = self.owners // self.cuts[0], []
        for owner in range(self.owners):
            first = owner // per_chunk * per_chunk
            at = owner // per_chunk * sum(each.values())
            for name, size in each.items():
                skipped = self._rows[name][owner][0] - self._rows[name][first][0]
                segments.append((at + skipped * self._row_numel[name], self.numel(name, owner)))
                at += size
        return Runs(counts, segments)

    def _count_rows(self, name: str) -> int:
        shape = self.shapes[name]
        return shape[0] if shape else 1

    def _cut(self, name: str, owner: int) -> tuple[int, int]:
        start, stop = 0, self._count_rows(name)
        below = self.owners
        for parts in self.cuts:
            below //= parts
            begin, end = chunk(stop - start, parts, owner // below % parts)
            start, stop = start + begin, start + end
        return start, stop
