"""The way of rows to the ranks that hold their expert, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thinwire.comm.queue import CommQueue

COUNTS, ROWS, GRADIENTS = "experts/counts", "experts/rows", "experts/gradients"


@dataclass(frozen=True)
class Arrived:
    """What came for the experts of this rank.

    rows: from rank after rank, and of each sorted by expert. experts: of each row, counted from this rank's first.
    splits: rows that came from each rank. sent: rows that this rank sent to each.
    """

    rows: Tensor
    experts: Tensor
    splits: list[int]
    sent: list[int]


class ExpertExchange:
    """Rank j of P that share E experts holds those from j E/P to (j+1) E/P - 1; rows go there and come back.

    Lepikhin et al. 2020, GShard (2006.16668), but dropless: first the numbers of rows, then as many rows as there are.
    In the backward pass gradients take the same way: each rank gets the sum, over the tokens of all P ranks, of what
    their losses say of its experts. Under a deadline and metered, as every exchange on a CommQueue.

    Args:
        queue: nobody else uses it meanwhile. Its order is that of the forward and backward passes, which all P ranks
            must run alike, whether they have tokens or not.
        ranks: of the queue, ascending: those that share the experts.
        experts: E.
    Raises:
        ValueError: the ranks cannot share the experts equally.
    """

    def __init__(self, queue: CommQueue, ranks: Sequence[int], experts: int) -> None:
        self.queue = queue
        self.ranks = list(ranks)
        if experts % len(self.ranks):
            below = experts // len(self.ranks) * len(self.ranks)
            legal = " or ".join(str(n) for n in (below, below + len(self.ranks)) if n)
            raise ValueError(
                f"experts: {experts} cannot be shared equally by the {len(self.ranks)} ranks of a group; "
                f"nearest: {legal}"
            )
        self.held = experts // len(self.ranks)
        self.first = self.ranks.index(queue.rank) * self.held

    def send(self, rows: Tensor, ends: Tensor) -> Arrived:
        """Every row to its expert; differentiable.

        Args:
            rows: (count, width), sorted by expert.
            ends: (E,), where the rows of each expert end.
        """
        size = len(self.ranks)
        counts = torch.diff(ends, prepend=ends.new_zeros(1)).view(size, self.held).contiguous()
        theirs = torch.empty_like(counts)
        ones = [1] * size
        self.queue.submit(
            COUNTS,
            lambda channel: channel.among(self.ranks).all_to_all(theirs, counts, ones, ones),
        ).wait()
        sent, splits = counts.sum(1).tolist(), theirs.sum(1).tolist()
        numbers = torch.arange(self.held, device=rows.device).repeat(size)
        experts = numbers.repeat_interleave(theirs.flatten(), output_size=sum(splits))
        return Arrived(_travel(rows, self, splits, sent), experts, splits, sent)

    def send_back(self, results: Tensor, arrived: Arrived) -> Tensor:
        """A result for every row that came, to where it came from; differentiable.

        Returns: one for every row that was sent, in that order.
        """
        return _travel(results, self, arrived.sent, arrived.splits)

    def all_to_all(self, operation: str, rows: Tensor, output_splits: list[int], input_splits: list[int]) -> Tensor:
        """Send consecutive rows to each rank of the group."""
        rows = rows.detach().contiguous()  # the queue has a thread of its own, on which gradients are on
        out = rows.new_empty(sum(output_splits), rows.shape[-1])
        self.queue.submit(
            operation,
            lambda channel: channel.among(self.ranks).all_to_all(
                out, rows, output_splits, input_splits, in_rounds=True
            ),
        ).wait()
        return out


def count_bytes(held: int) -> int:
    """Payload bytes of the numbers of rows that go to a rank that holds so many experts."""
    return held * torch.int32.itemsize


class _Travel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, exchange: ExpertExchange, output_splits: list[int], input_splits: list[int]
    ) -> Tensor:
        ctx.way_back = exchange, input_splits, output_splits
        return exchange.all_to_all(ROWS, rows, output_splits, input_splits)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        exchange, output_splits, input_splits = ctx.way_back
        return exchange.all_to_all(GRADIENTS, gradient, output_splits, input_splits), None, None, None


def _travel(rows: Tensor, exchange: ExpertExchange, output_splits: list[int], input_splits: list[int]) -> Tensor:
    out: Tensor = _Travel.apply(rows, exchange, output_splits, input_splits)  # type: ignore[no-untyped-call]
    return out
