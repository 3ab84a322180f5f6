"""Hierarchical reduce-scatter, all-gather and all-reduce over a group of ranks, slices in the order of its ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor

from thinwire.comm.channel import Channel
from thinwire.comm.partition.cascade import Cascade
from thinwire.comm.partition.levels import Levels
from thinwire.comm.partition.wires.wire import Wire
from thinwire.comm.two_shot import split_evenly

_PIECE = 256  # elements: what the ranks of an all-reduce share is cut in steps of this, so that blocks are whole


class RankOrder:
    """A Cascade for callers that know ranks only: slice r belongs to the r-th rank of the group, as in torch.

    The cascade itself needs the order in which the fastest level's digit counts most; slices are moved on the way in
    and out. A value is quantised once for each level, and added in fp32.

    Args:
        ranks: of the job, in the group's order; those of a group of levels, or ranks that differ at some neighbouring
            levels only.
    Raises:
        ValueError: levels do not make this group.
    """

    def __init__(self, levels: Levels, ranks: Sequence[int]) -> None:
        self.ranks = tuple(ranks)
        first, last = _span(levels, self.ranks)
        self._cascade = Cascade(levels, first, last)
        leaves = sorted(self.ranks, key=lambda rank: levels.digits[rank][first:last])
        self._rank_of_leaf = [self.ranks.index(rank) for rank in leaves]
        self._leaf_of_rank = [leaves.index(rank) for rank in self.ranks]
        self.names = self._cascade.names

    @property
    def size(self) -> int:
        """Ranks in the group."""
        return len(self.ranks)

    def reduce_scatter(self, channel: Channel, values: Tensor, wires: Mapping[str, Wire], *, key: int) -> Tensor:
        """The sum over the group of this rank's slice: fp32.

        Args:
            values: fp32, flat: one slice for each rank, all of one size.
            wires: the format of every level in `names`.
            key: of random numbers; see Wire.encode.
        """
        table = values.view(self.size, -1)
        moved = table if self._in_order else table[self._rank_of_leaf]
        return self._cascade.reduce_scatter(channel, moved.view(-1), [table.shape[1]] * self.size, wires, key=key)

    def all_gather(self, channel: Channel, own: Tensor) -> Tensor:
        """Every rank's bytes: uint8 (size, own.numel()).

        Args:
            own: uint8, flat, of one size on all ranks.
        """
        gathered = self._cascade.all_gather(channel, own, [own.numel()] * self.size).view(self.size, -1)
        return gathered if self._in_order else gathered[self._leaf_of_rank]

    def all_reduce(self, channel: Channel, values: Tensor, wires: Mapping[str, Wire], *, key: int) -> Tensor:
        """The sum over the group, the same bits on all its ranks: fp32. The sums travel in the slowest level's format.

        Args:
            values: fp32, flat.
        """
        counts = self._pieces(values.numel())
        own = self._cascade.reduce_scatter(channel, values, counts, wires, key=key)
        wire = wires[self.names[-1]] if self.names else None
        if wire is None:
            return own
        payload = wire.encode(own, [own.numel()], key=key + len(self.names))
        sizes = [wire.payload_bytes(count) for count in counts]
        gathered = self._cascade.all_gather(channel, payload, sizes)
        total = torch.empty_like(values)
        for part, into in zip(gathered.split(sizes), total.split(counts), strict=True):
            if into.numel():
                wire.decode(part, into)
        return total

    def reduce_scatter_bytes(self, numel: int, wires: Mapping[str, Wire]) -> dict[str, int]:
        """Payload bytes that this rank sends for `numel` values, by level."""
        return self._cascade.reduce_scatter_bytes([numel // self.size] * self.size, wires)

    def all_gather_bytes(self, own_bytes: int) -> dict[str, int]:
        """Payload bytes that this rank sends for as many bytes of its own, by level."""
        return self._cascade.all_gather_bytes([own_bytes] * self.size)

    def all_reduce_bytes(self, numel: int, wires: Mapping[str, Wire]) -> dict[str, int]:
        """Payload bytes that this rank sends for `numel` values, by level."""
        if not self.names:
            return {}
        counts = self._pieces(numel)
        sent = self._cascade.reduce_scatter_bytes(counts, wires)
        sizes = [wires[self.names[-1]].payload_bytes(count) for count in counts]
        back = self._cascade.all_gather_bytes(sizes)
        return {level: count + back[level] for level, count in sent.items()}

    def _pieces(self, numel: int) -> list[int]:
        return split_evenly(numel, self.size, _PIECE)

    @property
    def _in_order(self) -> bool:
        return self._rank_of_leaf == sorted(self._rank_of_leaf)


def _span(levels: Levels, ranks: Sequence[int]) -> tuple[int, int]:
    """The levels first, ..., last - 1 in whose digits alone the ranks differ."""
    mine = levels.digits[levels.rank]
    spans = [(0, 0), *combinations(range(levels.depth + 1), 2)]
    for first, last in spans:
        alike = [
            rank
            for rank, digits in enumerate(levels.digits)
            if digits[:first] == mine[:first] and digits[last:] == mine[last:]
        ]
        if alike == sorted(ranks):
            return first, last
    groups = "; ".join(
        f"{name} {list(sorted(levels.group(depth)))}" for depth, name in enumerate(levels.names, start=1)
    )
    raise ValueError(
        f"mesh.levels: a collective joins the ranks {list(ranks)}, which no level does: rank {levels.rank} is in "
        f"{groups}; name a level that joins them"
    )
