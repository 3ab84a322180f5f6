"""Reduce-scatter from the fastest of some levels to the slowest, and all-gather back, over uneven contiguous slices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate

from torch import Tensor

from thinwire.comm.channel import Channel
from thinwire.comm.partition.hop import Hop
from thinwire.comm.partition.levels import Levels
from thinwire.comm.partition.wires.recode import encode_in_order, encode_sum, gathered, sum_of
from thinwire.comm.partition.wires.wire import Wire
from thinwire.kernels.block_payload import Runs


class Cascade:
    """The levels first, ..., last - 1, as one tree whose leaves are the ranks that differ in their digits there.

    A leaf's number has the fastest level's digit as the most significant one. Every rank of the tree calls in the same
    order.

    Attributes: leaves, their count; leaf, this rank's; names, of the levels.
    """

    def __init__(self, levels: Levels, first: int, last: int) -> None:
        self._hops = [Hop(levels, level) for level in range(first, last)]
        fanouts = levels.fanouts[first:last]
        self._strides = [math.prod(fanouts[i + 1 :]) for i in range(len(fanouts))]
        self.leaves = math.prod(fanouts)
        self.leaf = sum(hop.digit * stride for hop, stride in zip(self._hops, self._strides, strict=True))
        self.names = levels.names[first:last]

    def reduce_scatter(
        self,
        channel: Channel,
        values: Tensor,
        counts: Sequence[int],
        wires: Mapping[str, Wire],
        *,
        key: int = 0,
        memories: Mapping[str, Tensor] | None = None,
        order: Runs | None = None,
    ) -> Tensor:
        """The sum over the tree's ranks of this rank's leaf: fp32, new memory unless the tree is this rank alone.

        Each rank encodes one slice for every peer of a level, its own included; what it gets is added in fp32, in the
        order of the peers, and encoded anew for the next level.

        Args:
            values: fp32, flat: the slices of all leaves, in their order.
            counts: elements of each leaf's slice.
            wires: the format of each level, by its name.
            key: of random numbers; see Wire.encode.
            memories: error feedback by the level's name, fp32, of the size that reduce_scatter_counts() says.
            order: how the slices lie in `values`, if otherwise: runs of the first level.
        """
        if not self._hops:
            return gathered(values, order)
        hop_sums, of = self._hop_sums(counts), memories or {}
        sent = encode_in_order(values, wires[self.names[0]], hop_sums[0], order, key=key, memory=of.get(self.names[0]))
        for index, (hop, sums) in enumerate(zip(self._hops, hop_sums, strict=True)):
            received = hop.swap(channel, sent, sums, wires[hop.name])
            if index + 1 < len(self._hops):
                after = self.names[index + 1]
                wire, sums_after = wires[after], hop_sums[index + 1]
                key += 1
                sent = encode_sum(received, wires[hop.name], wire, sums_after, key=key, memory=of.get(after))
        return sum_of(received, wires[hop.name], counts[self.leaf])

    def all_gather(self, channel: Channel, own: Tensor, sizes: Sequence[int], out: Tensor | None = None) -> Tensor:
        """Every leaf's bytes in the order of the leaves, uint8.

        Args:
            own: uint8 (sizes[leaf],); may be its part of `out`.
            sizes: bytes of each leaf.
            out: where to write them, unless the tree is this rank alone; otherwise new memory.
        """
        hop_sums = self._hop_sums(sizes)
        for index in reversed(range(len(self._hops))):
            own = self._hops[index].all_gather(channel, own, hop_sums[index], None if index else out)
        return own

    def first_counts(self, counts: Sequence[int]) -> list[int]:
        """Elements of each slice that reduce_scatter() encodes for the first level."""
        return self._hop_sums(counts)[0] if self._hops else [sum(counts)]

    def reduce_scatter_counts(self, counts: Sequence[int]) -> dict[str, int]:
        """Elements that enter each level of reduce_scatter() on this rank, by its name."""
        return {hop.name: sum(sums) for hop, sums in zip(self._hops, self._hop_sums(counts), strict=True)}

    def reduce_scatter_bytes(self, counts: Sequence[int], wires: Mapping[str, Wire]) -> dict[str, int]:
        """Payload bytes that this rank sends in reduce_scatter(), by level."""
        return {
            hop.name: hop.swap_bytes(sums, wires[hop.name])
            for hop, sums in zip(self._hops, self._hop_sums(counts), strict=True)
        }

    def all_gather_bytes(self, sizes: Sequence[int]) -> dict[str, int]:
        """Payload bytes that this rank sends in all_gather(), by level."""
        return {
            hop.name: hop.all_gather_bytes(sums[hop.digit])
            for hop, sums in zip(self._hops, self._hop_sums(sizes), strict=True)
        }

    def _hop_sums(self, counts: Sequence[int]) -> list[list[int]]:
        """For each level, what each of its peers stands for: the sums of the leaves below it."""
        assert len(counts) == self.leaves, (len(counts), self.leaves)
        before = [0, *accumulate(counts)]
        sums, base = [], 0
        for hop, stride in zip(self._hops, self._strides, strict=True):
            starts = [base + digit * stride for digit in range(len(hop.peers))]
            sums.append([before[start + stride] - before[start] for start in starts])
            base += hop.digit * stride
        return sums
