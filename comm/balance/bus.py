"""The one message: what all ranks have counted in all layers, summed, with faults found on the way."""

from __future__ import annotations

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from thinwire.comm.balance.columns import Columns
from thinwire.comm.balance.count_sum import sent_bytes, shots, sum_counts
from thinwire.comm.balance.errors import NonFiniteLogitsError, RouterError
from thinwire.comm.balance.layer_map import LayerMap
from thinwire.comm.channel import Channel
from thinwire.comm.queue import CommQueue, Pending

COUNTS = "balance/counts"
_HASH_INTS = 4
_TAIL_INTS = 3  # after the rows: tokens announced, the micro-batch's place in its step, and that squared
_PLACES = 1 << 14  # whose square fits, and whose sum over many ranks stays exact


class Totals:
    """The sum over ranks of what was counted.

    rows: (layers, columns.width) int64. announced: valid tokens of the whole step, as the ranks announced them; 0 = no.
    """

    def __init__(self, rows: Tensor, announced: Tensor) -> None:
        self.rows = rows
        self.announced = announced

    def __add__(self, other: Totals) -> Totals:
        """Of two micro-batches; what was announced comes with the first."""
        return Totals(self.rows + other.rows, self.announced + other.announced)


class Sent:
    """A message under way."""

    def __init__(self, pending: Pending[Totals | Exception]) -> None:
        self._pending = pending
        self._totals: Totals | None = None

    def wait(self) -> Totals:
        """The totals.

        Raises:
            RouterError, NonFiniteLogitsError: a router of some rank is at fault; on every rank.
            ValueError: the ranks have different layers; on every rank.
            PeerLostError, PeerLateError, PeerFailedError: another rank is gone.
        """
        if self._totals is None:
            result = self._pending.wait()
            if isinstance(result, Exception):
                raise result
            self._totals = result
        return self._totals


class StatisticsBus:
    """Sends rows of counts over a CommQueue, int32, and gives their sums.

    Before the first message the ranks compare a hash of their settings and layers; where they differ all are told what
    does. Every message says which micro-batch of a step it is about, so that counts of two are never added.

    Args:
        settings: lines that are the same on all ranks.
        inner: this rank's group of near ranks, ascending, for messages that go no farther; None = all.
    """

    def __init__(
        self,
        queue: CommQueue,
        layers: LayerMap,
        columns: Columns,
        inner: Sequence[int] | None,
        settings: Sequence[str] = (),
    ) -> None:
        self.queue = queue
        self.layers = layers
        self.columns = columns
        self.settings = list(settings)
        self.inner = list(inner) if inner is not None else list(range(queue.size))
        self.messages = 0
        self._agreements: dict[bool, Pending[Exception | None]] = {}

    def send(self, rows: Tensor, announced: int = 0, *, near: bool = False, place: int = 0) -> Sent:
        """Add these rows to those of the other ranks. Every rank calls it alike.

        Args:
            rows: (layers, columns.width) int32.
            announced: valid tokens of this rank's whole step; 0 = not announced.
            near: only within `inner`.
            place: of the micro-batch in its step, which must be the same on all ranks.
        """
        self.messages += 1
        place %= _PLACES
        message = torch.cat((rows.flatten(), rows.new_tensor([announced, place, place * place])))
        agreement = self._agreement(near)

        def exchange(channel: Channel) -> Totals | Exception:
            return agreement.wait() or self._sum(self._reach(channel, near), message)

        return Sent(self.queue.submit(COUNTS, exchange))

    def check(self, rows: Tensor) -> None:
        """Of this rank alone, where nothing is sent.

        Raises:
            RouterError, NonFiniteLogitsError: on this rank.
        """
        faults = rows[:, self.columns.faults].cpu()
        if faults.any():
            raise self._describe_faults(faults[None], [self.queue.peers[self.queue.rank]])

    def sent_bytes(self, *, near: bool = False) -> dict[str, int]:
        """Payload bytes of one message, by level."""
        ranks = self.inner if near else list(range(self.queue.size))
        levels: dict[str, int] = defaultdict(int)
        sent = message_bytes(len(self.layers), self.columns, ranks.index(self.queue.rank), len(ranks))
        for place, count in sent.items():
            levels[self.queue.meter.level_of(self.queue.peers[ranks[place]])] += count
        return dict(levels)

    def _reach(self, channel: Channel, near: bool) -> Channel:
        return channel.among(self.inner) if near else channel

    def _agreement(self, near: bool) -> Pending[Exception | None]:
        """Submitted before the first message to these ranks, so that it has ended when a message begins."""
        if near not in self._agreements:
            self._agreements[near] = self.queue.submit(
                "control/balance_layers", lambda channel: self._compare_layers(self._reach(channel, near))
            )
        return self._agreements[near]

    def _sum(self, channel: Channel, message: Tensor) -> Totals | Exception:
        total = sum_counts(channel, message)
        rows = total[:-_TAIL_INTS].view(len(self.layers), self.columns.width)
        *faults, places, squares = torch.cat((rows[:, self.columns.faults].flatten(), total[-2:])).tolist()
        # n * (sum of squares) = (sum)^2 only where all are equal: every rank knows it from the sums alone.
        if channel.size * squares != places * places:
            told = channel.all_gather_same(message[-2:-1]).flatten().tolist()
            return ValueError(_out_of_step(told, self._ranks(channel)))
        if not any(faults):
            return Totals(rows, total[-_TAIL_INTS])
        own = message[:-_TAIL_INTS].view(rows.shape)[:, self.columns.faults].contiguous()
        by_rank = channel.all_gather_same(own).cpu()  # (ranks, layers, 2)
        return self._describe_faults(by_rank, self._ranks(channel))

    def _ranks(self, channel: Channel) -> list[int]:
        """The ranks of the job that a channel reaches."""
        ranks = self.inner if channel.size < self.queue.size else range(self.queue.size)
        return [self.queue.peers[r] for r in ranks]

    def _describe_faults(self, by_rank: Tensor, ranks: Sequence[int]) -> Exception:
        kind = 0 if by_rank[:, :, 0].any() else 1
        bad = by_rank[:, :, kind] > 0
        who = [ranks[r] for r in bad.any(1).nonzero().flatten().tolist()]
        which = [self.layers.names[number] for number in bad.any(0).nonzero().flatten().tolist()]
        return NonFiniteLogitsError(who, which) if kind else RouterError(who, which, self.columns.num_experts)

    def _compare_layers(self, channel: Channel) -> Exception | None:
        """Do all ranks count the same layers, alike? Where not, all that is compared is sent, to say what differs."""
        lines = [str(self.columns), *self.settings, *(f"layer {name!r}" for name in self.layers.names)]
        text = "\n".join(lines).encode()
        digest = torch.frombuffer(bytearray(hashlib.sha256(text).digest()), dtype=torch.int32)[:_HASH_INTS]
        mine = torch.cat((digest, torch.tensor([len(text)], dtype=torch.int32)))
        device = "cuda" if channel_needs_gpu(self.queue) else "cpu"
        told = channel.all_gather_same(mine.to(device)).cpu()
        if bool((told == told[0]).all()):
            return None
        padded = torch.zeros(int(told[:, -1].max()), dtype=torch.uint8)
        padded[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        texts = channel.all_gather_same(padded.to(device)).cpu()
        lists = [bytes(t[: int(n)].tolist()).decode().split("\n") for t, n in zip(texts, told[:, -1], strict=True)]
        return ValueError(_difference(lists, self._ranks(channel)))


def message_bytes(layers: int, columns: Columns, place: int, size: int) -> dict[int, int]:
    """Payload bytes of one message from the rank in this place among `size`, by the place of the receiver."""
    return sent_bytes(layers * columns.width + _TAIL_INTS, place, size)


def message_shots(layers: int, columns: Columns, size: int) -> int:
    """How many latencies one message among so many ranks takes."""
    return shots(layers * columns.width + _TAIL_INTS, size)


def channel_needs_gpu(queue: CommQueue) -> bool:
    """NCCL moves device tensors only."""
    return queue.group.name() == "nccl"


def _difference(lists: Sequence[Sequence[str]], ranks: Sequence[int]) -> str:
    """What the first rank that differs from the first one has in another place."""
    other = next(number for number, lines in enumerate(lists) if lines != lists[0])
    pairs = itertools.zip_longest(lists[0], lists[other], fillvalue="nothing more")
    here, there = next(pair for pair in pairs if pair[0] != pair[1])
    return (
        f"balance: ranks {ranks[0]} and {ranks[other]} do not balance alike: {here} on rank {ranks[0]}, {there} on "
        f"rank {ranks[other]}; give the same settings on all ranks, and the group of ranks that hold the same layers "
        "(with pipeline stages: those of one stage)"
    )


def _out_of_step(places: Sequence[int], ranks: Sequence[int]) -> str:
    other = next(number for number, place in enumerate(places) if place != places[0])
    return (
        f"micro_batches: rank {ranks[0]} is at the forward pass {places[0] + 1} of its step, rank {ranks[other]} at "
        f"{places[other] + 1}; give micro_batches the number of forward passes in a step, the same on all ranks, and "
        "let a rank that has no more data go on with a valid_mask that is all false"
    )
