"""The collectives that an exchange may use: metered, and bounded by the deadline of its operation."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from thinwire.comm.meter import TrafficMeter
from thinwire.comm.pace import Pace

_TAG = 0  # of point-to-point messages: a pair's messages keep their order, so one is enough


class Channel:
    """What one operation of a CommQueue sees of its process group. Valid only while that operation runs.

    Attributes: rank and size, within the channel: the group, or the part of it that among() has named.
    """

    def __init__(
        self,
        group: ProcessGroup,
        peers: Sequence[int],
        meter: TrafficMeter,
        operation: str,
        wait: Callable[[Work, bool], None],
        pace: Pace,
        members: Sequence[int] | None = None,
    ) -> None:
        self._members = range(group.size()) if members is None else members  # ranks of the group
        self.rank = self._members.index(group.rank())
        self.size = len(self._members)
        self._group = group
        self._peers = peers
        self._meter = meter
        self._operation = operation
        self._wait = wait
        self._pace = pace

    def among(self, ranks: Sequence[int]) -> Channel:
        """A channel over some ranks of this one, which number themselves in this order.

        Needs no group of its own: what it exchanges concerns its members alone, and other members may use another part
        of the group, or none, at the same time. All members make their calls in the same order.

        Args:
            ranks: of this channel, ascending; this rank is one of them.
        Raises:
            ValueError: other ranks than these.
        """
        ranks = list(ranks)
        if ranks != sorted(set(ranks)) or self.rank not in ranks or not 0 <= ranks[0] <= ranks[-1] < self.size:
            raise ValueError(
                f"ranks: {ranks} among {self.size}; they must be ascending, below {self.size}, and this rank, "
                f"{self.rank}, one of them"
            )
        return Channel(
            self._group,
            [self._peers[r] for r in ranks],
            self._meter,
            self._operation,
            self._wait,
            self._pace,
            [self._members[r] for r in ranks],
        )

    def all_to_all(
        self,
        output: Tensor,
        input: Tensor,
        output_splits: Sequence[int],
        input_splits: Sequence[int],
        *,
        in_rounds: bool = False,
    ) -> None:
        """Send the r-th slice of `input` to rank r, and receive rank r's slice for this rank as r-th slice of `output`.

        Args:
            output, input: contiguous tensors of one dtype on the group's device; not aliases of each other.
            output_splits, input_splits: elements along the first dimension, by rank; slices may be empty.
            in_rounds: exchange with one peer after another instead of with all at once; the same on every rank. All at
                once takes one latency, so it suits small slices. Large ones fill the link only in rounds: many TCP
                streams share it unevenly and leave it idle while the last one ends. How many rounds overlap is the
                Pace's to say. NCCL orders its sends itself.
        """
        began = time.monotonic()
        if in_rounds and not input.is_cuda:
            self._exchange_at_pace(output.split(list(output_splits)), input.split(list(input_splits)))
        else:
            self._exchange(output, input, output_splits, input_splits)
        self._record(output, output_splits, input, input_splits, began)

    def all_gather(self, output: Tensor, local: Tensor, splits: Sequence[int], *, in_rounds: bool = False) -> None:
        """Collect every rank's `local` into `output`, rank after rank.

        Sent straight to every rank and not along a ring: the same bytes per rank, without the ring's latencies.

        Args:
            output: contiguous, sum(splits) elements along the first dimension.
            local: contiguous, splits[rank] elements along the first dimension; may be its own part of `output`.
            splits: elements along the first dimension that each rank contributes.
            in_rounds: as in all_to_all().
        """
        began = time.monotonic()
        same = [splits[self.rank]] * self.size
        if in_rounds and not local.is_cuda:
            self._exchange_at_pace(output.split(list(splits)), [local] * self.size)
        else:
            self._exchange(output, local.repeat(self.size, *([1] * (local.dim() - 1))), splits, same)
        self._record(output, splits, local, same, began)

    def all_gather_same(self, local: Tensor) -> Tensor:
        """Collect tensors of one shape and dtype from every rank: returns a tensor of shape (size, *local.shape)."""
        output = torch.empty((self.size, *local.shape), dtype=local.dtype, device=local.device)
        self.all_gather(output, local.unsqueeze(0).contiguous(), [1] * self.size)
        return output

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Overwrite `tensor` on every rank by that of `source`.

        Each rank gets a slice and hands it on to the others, so that the source sends its tensor no more than twice
        however many ranks there are. broadcast_bytes() says who sends what.

        Args:
            tensor: flat and contiguous, of one length on all ranks; that of the source is left as it is.
        """
        splits = _even_splits(len(tensor), self.size)
        own, is_source = splits[self.rank], self.rank == source
        piece = tensor.new_empty(own)
        nothing = [0] * self.size
        self.all_to_all(
            piece,
            tensor if is_source else tensor[:0],
            [own if r == source else 0 for r in range(self.size)],
            splits if is_source else nothing,
        )
        receivers = [r for r in range(self.size) if r != source]
        gathered = tensor.new_empty(0) if is_source else tensor
        self.all_to_all(
            gathered,
            piece.repeat(len(receivers)),
            nothing if is_source else splits,
            [own if r != source else 0 for r in range(self.size)],
        )

    def _exchange(
        self, output: Tensor, input: Tensor, output_splits: Sequence[int], input_splits: Sequence[int]
    ) -> None:
        whole = self.size == self._group.size()
        if not whole and not input.is_cuda:
            # Gloo's all-to-all waits for empty slices too, and so for ranks that have nothing to do with this.
            self._exchange_in_rounds(
                output.split(list(output_splits)), input.split(list(input_splits)), under_way_at_most=self.size
            )
            return
        work = self._group.alltoall_base(output, input, self._of_group(output_splits), self._of_group(input_splits))
        self._wait(work, input.is_cuda)

    def _of_group(self, splits: Sequence[int]) -> list[int]:
        """Splits by rank of the group; the members ascend, so the slices keep their places."""
        spread = [0] * self._group.size()
        for member, split in zip(self._members, splits, strict=True):
            spread[member] = split
        return spread

    def _exchange_at_pace(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        if self.size == 1:
            self._exchange_in_rounds(outputs, inputs, 1)
            return
        others = [r for r in range(self.size) if r != self.rank]
        sent, received = [inputs[r].nbytes for r in others], [outputs[r].nbytes for r in others]
        under_way = self._pace.choose(self._members, max(*sent, *received))
        began = time.monotonic()
        self._exchange_in_rounds(outputs, inputs, under_way)
        self._pace.tell(self._members, max(sum(sent), sum(received)), under_way, time.monotonic() - began)

    def _exchange_in_rounds(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], under_way_at_most: int) -> None:
        """One peer to send to and one to receive from in each round: one stream each way for every rank."""
        if outputs[self.rank].data_ptr() != inputs[self.rank].data_ptr():
            outputs[self.rank].copy_(inputs[self.rank])
        under_way: deque[list[Work]] = deque()
        for k in range(1, self.size):
            target, source = _partners(self.rank, self.size, k)
            round_k = []
            if len(outputs[source]):
                round_k.append(self._group.recv([outputs[source]], self._members[source], _TAG))
            if len(inputs[target]):
                round_k.append(self._group.send([inputs[target]], self._members[target], _TAG))
            under_way.append(round_k)
            if len(under_way) == under_way_at_most:
                self._wait_for_all(under_way.popleft())
        for remaining in under_way:
            self._wait_for_all(remaining)

    def _wait_for_all(self, works: Sequence[Work]) -> None:
        for work in works:
            self._wait(work, False)

    def _record(
        self,
        output: Tensor,
        output_splits: Sequence[int],
        input: Tensor,
        input_splits: Sequence[int],
        began: float,
    ) -> None:
        sent_row_bytes, received_row_bytes = input[:1].nbytes, output[:1].nbytes
        others = [r for r in range(self.size) if r != self.rank]
        self._meter.record(
            self._operation,
            {self._peers[r]: input_splits[r] * sent_row_bytes for r in others},
            {self._peers[r]: output_splits[r] * received_row_bytes for r in others},
            time.monotonic() - began,
        )


def _partners(rank: int, size: int, k: int) -> tuple[int, int]:
    """Whom a rank sends to in round k = 1 ... size - 1, and whom it receives from: every other rank once.

    Of 2^m ranks these are pairs, numbers that differ in the bits of k. So where each host has a power of two of them,
    who are neighbours, either all ranks of a host send across in a round or none does, and its link carries as much in
    every round that uses it; with rank + k and rank - k it would wait for the host's one rank that crosses alone.
    """
    if size & (size - 1) == 0:
        return rank ^ k, rank ^ k
    return (rank + k) % size, (rank - k) % size


def broadcast_bytes(payload_bytes: int, source: int, rank: int, size: int) -> dict[int, int]:
    """What `rank` sends in Channel.broadcast() of as many bytes, by receiving rank."""
    splits = _even_splits(payload_bytes, size)
    return {
        r: 0 if r == source else splits[rank] + (splits[r] if rank == source else 0) for r in range(size) if r != rank
    }


def _even_splits(numel: int, size: int) -> list[int]:
    return [numel // size + (r < numel % size) for r in range(size)]
