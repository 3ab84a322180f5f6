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

    def reduce_scatter(
        self,
        channel: Channel,
        values: Tensor,
        counts: Sequence[int],
        wire: Wire,
        *,
        scale: float = 1.0,
        key: int = 0,
        memory: Tensor | None = None,
    ) -> Tensor:
        """The scaled sum of the peers' values, of which this rank gets its slice: fp32, new memory.

        Each rank encodes one slice for every peer, its own included, and sends them; the owner adds up what the peers'
        payloads decode to, in the order of the peers. So each value is quantised once, and added in fp32.

        Args:
            values: fp32, flat: the slices of all peers, in their order.
            counts: elements of each slice, the same on all peers.
        """
        sizes = [wire.payload_bytes(count) for count in counts]
        sent = wire.encode(values, counts, key=key, memory=memory)
        received = torch.empty(len(counts) * sizes[self.digit], dtype=torch.uint8, device=values.device)
        parts = channel.among(self.peers)
        own = [sizes[self.digit]] * len(counts)
        parts.all_to_all(received, sent, own, sizes, in_rounds=is_worth_rounds(max(sizes)))
        reduced = torch.empty(counts[self.digit], dtype=torch.float32, device=values.device)
        if reduced.numel():
            wire.reduce(received.view(len(counts), -1), reduced, scale=scale)
        return reduced

    def all_gather(self, channel: Channel, own: Tensor, sizes: Sequence[int]) -> Tensor:
        """Every peer's bytes, in the order of the peers: uint8, new memory.

        Args:
            own: uint8 (sizes[digit],).
            sizes: bytes of each peer, the same on all.
        """
        gathered = torch.empty(sum(sizes), dtype=torch.uint8, device=own.device)
        channel.among(self.peers).all_gather(gathered, own, sizes, in_rounds=is_worth_rounds(max(sizes)))
        return gathered

    def reduce_scatter_bytes(self, counts: Sequence[int], wire: Wire) -> int:
        """Payload bytes that this rank sends in reduce_scatter()."""
        return sum(wire.payload_bytes(count) for peer, count in enumerate(counts) if peer != self.digit)

    def all_gather_bytes(self, own_bytes: int) -> int:
        """Payload bytes that this rank sends in all_gather()."""
        return own_bytes * (len(self.peers) - 1)
