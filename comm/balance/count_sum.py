"""The sum of small integers over the ranks, exact, in as few latencies as its size allows."""

from __future__ import annotations

import torch
from torch import Tensor

from thinwire.comm.channel import Channel
from thinwire.comm.two_shot import split_evenly

# Up to here a rank sends its counts to every other one: more bytes than a ring, but one latency.
_DIRECT_UP_TO_BYTES = 1 << 18
_INT32_BYTES, _INT64_BYTES = 4, 8


def sum_counts(channel: Channel, counts: Tensor) -> Tensor:
    """out = sum_r counts_r, the same on every rank.

    Small messages go straight to every other rank. Large ones are summed by slices: each rank adds up one slice and
    sends it to all, in int64, since a sum over many ranks need not fit in 32 bits.

    Args:
        counts: (m,) int32, contiguous.
    Returns: (m,) int64.
    """
    if _is_direct(counts.numel(), channel.size):
        return channel.all_gather_same(counts).sum(0, dtype=torch.int64)
    splits = split_evenly(counts.numel(), channel.size)
    own = splits[channel.rank]
    received = counts.new_empty(channel.size * own)
    channel.all_to_all(received, counts, [own] * channel.size, splits)
    total = received.view(channel.size, own).sum(0, dtype=torch.int64)
    gathered = total.new_empty(counts.numel())
    channel.all_gather(gathered, total, splits)
    return gathered


def sent_bytes(numel: int, rank: int, size: int) -> dict[int, int]:
    """Payload bytes that `rank` sends in sum_counts() of so many integers, by receiving rank."""
    others = [r for r in range(size) if r != rank]
    if _is_direct(numel, size):
        return dict.fromkeys(others, numel * _INT32_BYTES)
    splits = split_evenly(numel, size)
    return {r: splits[r] * _INT32_BYTES + splits[rank] * _INT64_BYTES for r in others}


def shots(numel: int, size: int) -> int:
    """Messages of sum_counts() that come one after another."""
    return 1 if _is_direct(numel, size) else 2


def _is_direct(numel: int, size: int) -> bool:
    return (size - 1) * numel * _INT32_BYTES <= _DIRECT_UP_TO_BYTES
