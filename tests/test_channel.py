"""Channels over a part of the group: who gets what, and whose bytes are counted where."""

from __future__ import annotations

import pytest
import torch
from ranks import Rank, run_ranks
from torch import Tensor

from thinwire.comm.channel import Channel, broadcast_bytes


def value(source: int, target: int, numel: int) -> Tensor:
    return torch.full((numel,), 100.0 * source + target)


def exchange(channel: Channel, me: int, ranks: list[int], *, in_rounds: bool) -> None:
    """Sends `target` elements to each rank of the job in `ranks`, and checks what arrives; then gathers."""
    part = channel.among(ranks)
    assert (part.rank, part.size) == (ranks.index(me), len(ranks))
    sent = torch.cat([value(me, r, r) for r in ranks])
    received = torch.empty(me * len(ranks))
    part.all_to_all(received, sent, [me] * len(ranks), ranks, in_rounds=in_rounds)
    assert torch.equal(received, torch.cat([value(r, me, me) for r in ranks]))
    gathered = torch.empty(sum(ranks))
    part.all_gather(gathered, value(me, 0, me), ranks, in_rounds=in_rounds)
    assert torch.equal(gathered, torch.cat([value(r, 0, r) for r in ranks]))
    assert part.all_gather_same(torch.tensor(me)).tolist() == ranks


@pytest.mark.parametrize("in_rounds", [False, True])
@pytest.mark.parametrize("parts", [[[0, 1], [2, 3]], [[0, 3], [1, 2]], [[0, 2, 3], [1]], [[0, 1, 2, 3]]], ids=str)
def test_parts_of_a_group_exchange_at_the_same_time_and_are_metered(parts: list[list[int]], in_rounds: bool) -> None:
    def work(rank: Rank) -> None:
        me = rank.rank
        (ranks,) = (part for part in parts if me in part)
        queue = rank.queue(levels=[f"to {r}" for r in range(rank.size)])
        queue.submit("parts", lambda channel: exchange(channel, me, ranks, in_rounds=in_rounds)).wait()
        sent = {f"to {r}": 4 * (r + me) + 8 for r in ranks if r != me}
        assert {level: count for level, count in queue.meter.sent_bytes().items() if count} == sent
        queue.close()

    run_ranks(4, work)


def test_only_some_ranks_may_have_something_to_say() -> None:
    """The others neither take part nor wait; afterwards all meet in an exchange of the whole group."""

    def work(rank: Rank) -> None:
        def run(channel: Channel) -> list[int]:
            if rank.rank != 1:
                exchange(channel, rank.rank, [0, 2], in_rounds=False)
            return channel.all_gather_same(torch.tensor(rank.rank)).tolist()

        queue = rank.queue()
        assert queue.submit("some", run).wait() == [0, 1, 2]
        queue.close()

    run_ranks(3, work)


def test_a_part_of_a_part() -> None:
    def work(rank: Rank) -> None:
        def run(channel: Channel) -> list[int]:
            if rank.rank == 1:
                return []
            outer = channel.among([0, 2, 3])
            return outer.among([0, 2]).all_gather_same(torch.tensor(rank.rank)).tolist() if rank.rank != 2 else []

        queue = rank.queue()
        assert queue.submit("nested", run).wait() == ([0, 3] if rank.rank in (0, 3) else [])
        queue.close()

    run_ranks(4, work)


@pytest.mark.parametrize("ranks", [[1], [1, 0], [0, 0], [0, 2], [-1, 0], []], ids=str)
def test_ranks_that_make_no_part_are_refused(ranks: list[int]) -> None:
    def work(rank: Rank) -> None:
        queue = rank.queue()
        if rank.rank == 0:
            with pytest.raises(ValueError, match="must be ascending, below 2"):
                queue.submit("part", lambda channel: channel.among(ranks)).wait()

    run_ranks(2, work)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("numel", [0, 1, 7, 100])
def test_broadcast_reaches_all_and_costs_the_source_two_tensors_at_most(size: int, numel: int) -> None:
    def work(rank: Rank) -> None:
        queue = rank.queue()
        for source in range(size):
            tensor = torch.full((numel,), rank.rank, dtype=torch.uint8)
            before = sum(queue.meter.sent_bytes().values())
            queue.submit("broadcast", lambda channel, x=tensor, s=source: channel.broadcast(x, s)).wait()
            assert torch.equal(tensor, torch.full((numel,), source, dtype=torch.uint8))
            sent = sum(queue.meter.sent_bytes().values()) - before
            assert sent == sum(broadcast_bytes(numel, source, rank.rank, size).values())
            assert sent <= 2 * numel + size  # slices are whole bytes
        queue.close()

    run_ranks(size, work)
