"""The mean of what all ranks count, without a message to all: neighbours in a graph even out what they have."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from thinwire.comm.balance.bus import Sent, StatisticsBus, Totals
from thinwire.comm.balance.columns import Columns
from thinwire.comm.balance.layer_map import LayerMap
from thinwire.comm.channel import Channel
from thinwire.comm.gossip.mixing import Graph, Mixing
from thinwire.comm.queue import CommQueue

# Of a count; a flow of less than half of the last one is rounded away.
_FRACTION_BITS = 16
_INT64_BYTES = 8
CONSENSUS = "balance/consensus"


class ConsensusBus(StatisticsBus):
    """A StatisticsBus whose messages go to neighbours alone: dynamic average consensus.

    Zhu and Martinez 2010 (Automatica 46, 322). With c_j(t) what rank j counts in step t, and W symmetric,

        s_j(t) = sum_l W_jl (s_l(t-1) + c_l(t) - c_l(t-1)),    c_j(-1) = s_j(-1) = 0,

    so that sum_j s_j = sum_j c_j in every step, and while counts stay the same every s_j goes to their mean as fast as
    powers of W's second eigenvalue. Totals are n * s_j: each rank's own estimate. Where we differ: counts of this step
    are mixed in the message that tells of them, and not only in the next one; and numbers are integers (fixed-point,
    16 bits after the point, int64), where neighbours j and l compute the same flow round(W_jl (s_l - s_j)), which one
    gains and the other loses, so that the sum is kept exactly and for ever.

    A fault of a rank's routers ends the queue: that rank raises it, and all others an error that names the rank and
    tells the fault.

    Args:
        graph: of all ranks of the queue, undirected in every round.
    """

    def __init__(
        self,
        queue: CommQueue,
        layers: LayerMap,
        columns: Columns,
        settings: Sequence[str],
        graph: Graph,
    ) -> None:
        super().__init__(queue, layers, columns, None, settings)
        self._graph = graph
        self._round = 0
        self._counts: Tensor | None = None  # c_j of the last step, (layers, num_experts + 1), scaled
        self._shares: Tensor | None = None  # s_j

    def send(self, rows: Tensor, announced: int = 0, *, near: bool = False, place: int = 0) -> Sent:
        """Even out with the neighbours. Every rank calls it alike, once per step; only rows is used."""
        self.messages += 1
        agreement = self._agreement(near=False)

        def exchange(channel: Channel) -> Totals | Exception:
            return agreement.wait() or self._even_out(channel, rows)

        return Sent(self.queue.submit(CONSENSUS, exchange))

    def sent_bytes(self, *, near: bool = False) -> dict[str, int]:
        """Payload bytes of the next message, by level."""
        levels: dict[str, int] = defaultdict(int)
        for neighbour in self._graph.mixing(self._round).sources(self.queue.rank):
            level = self.queue.meter.level_of(self.queue.peers[neighbour])
            levels[level] += neighbour_bytes(len(self.layers), self.columns)
        return dict(levels)

    def state_dict(self) -> dict[str, Any]:
        """c_j and s_j of the last step; nothing is under way."""
        return {"round": self._round, "counts": self._counts, "shares": self._shares}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what state_dict() gave on this rank; of another mode: nothing."""
        self._round = state.get("round", 0)
        self._counts, self._shares = state.get("counts"), state.get("shares")

    def resized(self, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """This rank's state where other ranks were before: an even part of all that they counted.

        Each s_j begins at c_j, and so their sums are equal.
        """
        if any(state["counts"] is None for state in states):
            return {}
        total = torch.stack([state["counts"] for state in states]).sum(0)
        size, rank = self.queue.size, self.queue.rank
        own = total // size + (rank < total % size)
        return {"round": states[0]["round"], "counts": own, "shares": own}

    def _even_out(self, channel: Channel, rows: Tensor) -> Totals:
        self.check(rows)
        counts = rows[:, : self.columns.tokens + 1].long() << _FRACTION_BITS
        shares = counts.clone()
        if self._counts is not None and self._shares is not None:
            shares += self._shares.to(rows.device) - self._counts.to(rows.device)
        mixing = self._graph.mixing(self._round)
        self._counts, self._shares, self._round = counts, self._mixed(channel, shares, mixing), self._round + 1
        totals = torch.zeros(rows.shape, dtype=torch.int64, device=rows.device)
        # Where counts have fallen since the last step an estimate may be below 0.
        estimate = self._shares.clamp(min=0) * self.queue.size
        totals[:, : self.columns.tokens + 1] = (estimate + (1 << _FRACTION_BITS - 1)) >> _FRACTION_BITS
        return Totals(totals, totals.new_zeros(()))

    def _mixed(self, channel: Channel, shares: Tensor, mixing: Mixing) -> Tensor:
        """s_j + sum_l round(W_jl (s_l - s_j)): what one rank gains in a flow, its neighbour loses."""
        neighbours = mixing.sources(channel.rank)
        splits = [shares.numel() if rank in neighbours else 0 for rank in range(channel.size)]
        received = shares.new_empty(len(neighbours) * shares.numel())
        channel.all_to_all(received, shares.flatten().repeat(len(neighbours)), splits, splits, in_rounds=True)
        mixed = shares.clone()
        for neighbour, theirs in zip(neighbours, received.view(len(neighbours), *shares.shape), strict=True):
            # Both ends compute it from the same numbers, up to the sign, in fp64, and rounding half to even is odd.
            mixed += (mixing.rows[channel.rank][neighbour] * (theirs - shares).double()).round().long()
        return mixed


def neighbour_bytes(layers: int, columns: Columns) -> int:
    """Payload bytes of one message to one neighbour."""
    return layers * (columns.tokens + 1) * _INT64_BYTES
