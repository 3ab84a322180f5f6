"""One level's part of a hierarchical collective: among the ranks that differ in this level's digit alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from thinwire.comm.channel import Channel
from thinwire.comm.partition.levels import Levels
from thinwire.comm.partition.wires.wire import Wire
from thinwire.comm.two_shot import is_worth_rounds


class Hop:
    """Reduce-scatter and all-gather at one level.

    Attributes: peers, the ranks that take part; digit, this rank's place among them.
    """

    def __init__(self, levels: Levels, level: int) -> None:
        self.name = levels.names[level]
        self.peers = levels.peers(level)
        self.digit = self.peers.index(levels.rank)

    def swap(self, channel: Channel, sent: Tensor, counts: Sequence[int], wire: Wire) -> Tensor:
        """Every peer's payload for this rank, in the order of the peers: uint8 (peers, bytes), new memory.

        The first half of a reduce-scatter; the other is that the owner of a slice adds up what its payloads decode to,
        in this order. So each value is quantised once, and added in fp32.

        Args:
            sent: uint8: a payload for every peer, this rank included, as `wire` encodes slices.
            counts: elements of each slice, the same on all peers.
        """
        sizes = [wire.payload_bytes(count) for count in counts]
        received = torch.empty(len(counts), sizes[self.digit], dtype=torch.uint8, device=sent.device)
        own = [sizes[self.digit]] * len(counts)
        parts = channel.among(self.peers)
        parts.all_to_all(received.view(-1), sent, own, sizes, in_rounds=is_worth_rounds(max(sizes)))
        return received

    def all_gather(self, channel: Channel, own: Tensor, sizes: Sequence[int], out: Tensor | None = None) -> Tensor:
        """Every peer's bytes, in the order of the peers: uint8.

        Args:
            own: uint8 (sizes[digit],); may be its part of `out`.
            sizes: bytes of each peer, the same on all.
            out: where to write them; otherwise new memory.
        """
        gathered = torch.empty(sum(sizes), dtype=torch.uint8, device=own.device) if out is None else out
        channel.among(self.peers).all_gather(gathered, own, sizes, in_rounds=is_worth_rounds(max(sizes)))
        return gathered

    def swap_bytes(self, counts: Sequence[int], wire: Wire) -> int:
        """Payload bytes that this rank sends in swap()."""
        return sum(wire.payload_bytes(count) for peer, count in enumerate(counts) if peer != self.digit)

    def all_gather_bytes(self, own_bytes: int) -> int:
        """Payload bytes that this rank sends in all_gather()."""
        return own_bytes * (len(self.peers) - 1)
