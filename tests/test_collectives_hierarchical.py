"""Exact within hosts, compressed between them: the same result everywhere, and no error lost."""

from __future__ import annotations

import pytest
import torch
from collective_cases import all_nan, call, call_on, inputs_of, same_bits
from ranks import Rank, run_ranks
from torch import Tensor
from toy_compressors import ToyGrid, ToyTop

from thinwire.comm.compress.collectives.all_gather import AllGather
from thinwire.comm.compress.collectives.hierarchical import Hierarchical
from thinwire.comm.compress.collectives.two_shot import TwoShot
from thinwire.comm.compress.compressors.dense import Dense
from thinwire.comm.errors import PeerFailedError

HOSTS = [[[0, 1], [2, 3]], [[0, 2], [1, 3]], [[0], [1]], [[0, 1, 2]], [[0, 3], [1, 2]]]


def mean_of(tensors: list[list[Tensor]]) -> list[Tensor]:
    return [torch.stack(same).mean(0) for same in zip(*tensors, strict=True)]


@pytest.mark.parametrize("hosts", HOSTS, ids=str)
@pytest.mark.parametrize("outer", [AllGather, TwoShot])
def test_without_loss_it_is_the_plain_mean(hosts: list[list[int]], outer: type) -> None:
    size = sum(map(len, hosts))
    outcomes = call(size, lambda: Hierarchical(hosts, outer(Dense())), one_bucket=True)
    for mean, expected in zip(outcomes[0].outputs, mean_of([inputs_of(r) for r in range(size)]), strict=True):
        torch.testing.assert_close(mean, expected)


@pytest.mark.parametrize("outer", [lambda: AllGather(ToyTop()), lambda: TwoShot(ToyGrid())], ids=["top", "grid"])
@pytest.mark.parametrize("weights", [None, [0.5, 0.5, 0.0, 0.0]], ids=["plain", "absent"])
def test_what_the_ranks_contribute_and_keep_adds_up(outer, weights: list[float] | None) -> None:
    """mean of contributions = the outputs (the first encoding's, if there are two); contributed + kept = input."""
    hosts = [[0, 1], [2, 3]]

    def make() -> Hierarchical:
        return Hierarchical(hosts, outer())

    def memories(rank: int) -> list[Tensor]:
        return inputs_of(rank, step=9)

    def sums(rank: int) -> list[Tensor]:
        return [x + m for x, m in zip(inputs_of(rank), memories(rank), strict=True)]

    fused = call(4, make, memories=memories, weights=weights)
    plain = call(4, make, sums, weights=weights)
    assert same_bits(fused[0].outputs, plain[0].outputs)
    for host in hosts:
        wanted = mean_of([sums(r) for r in host])
        sent = mean_of([plain[r].contributed for r in host])
        left = mean_of([fused[r].next_memories for r in host])
        for x, s, e in zip(wanted, sent, left, strict=True):
            torch.testing.assert_close(s.view_as(x) + e, x)
    w = weights or [1.0] * 4
    weighted = [[w[r] * x for x in plain[r].contributed] for r in range(4)]
    for mean, expected in zip(plain[0].outputs, mean_of(weighted), strict=True):
        tolerance = 1.3e-1 if isinstance(make().outer, TwoShot) else 1e-6
        torch.testing.assert_close(mean.view(-1), expected, rtol=1e-6, atol=tolerance)


def test_a_rank_keeps_errors_of_its_shard_alone() -> None:
    outcomes = call(
        4,
        lambda: Hierarchical([[0, 1], [2, 3]], AllGather(ToyTop())),
        memories=lambda rank: [torch.zeros_like(x) for x in inputs_of(rank)],
    )
    kept = [torch.cat([x.view(-1) for x in o.next_memories]) != 0 for o in outcomes]
    assert not (kept[0] & kept[1]).any()
    assert not (kept[2] & kept[3]).any()
    assert kept[0].any()
    assert kept[1].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 4])
def test_one_bad_input_is_known_everywhere(bad: float, place: int) -> None:
    def inputs(rank: int) -> list[Tensor]:
        tensors = inputs_of(rank)
        if rank == 2:
            tensors[place].view(-1)[-1] = bad
        return tensors

    for outcome in call(4, lambda: Hierarchical([[0, 1], [2, 3]], AllGather(ToyTop())), inputs):
        assert outcome.contributed is None
        assert all_nan(outcome.outputs)


def test_traffic_between_hosts_is_the_compressed_one_alone() -> None:
    def work(rank: Rank) -> dict[str, int]:
        host = rank.rank // 2
        queue = rank.queue(levels=["node" if r // 2 == host else "world" for r in range(4)])
        call_on(
            rank,
            lambda exchange: queue.submit("mean", exchange).wait(),
            Hierarchical([[0, 1], [2, 3]], AllGather(ToyGrid())),
            [torch.randn(1000)],
            sent_bytes=lambda: sum(queue.meter.sent_bytes().values()),
        )
        queue.close()
        return queue.meter.sent_bytes()

    for rank, sent in enumerate(run_ranks(4, work)):
        shard = [504, 496][rank % 2]
        assert sent == {"node": 4 * 496 + 4 * 504, "world": 24 + 2 * shard}


@pytest.mark.parametrize(
    ("hosts", "message"),
    [([[0, 1], [2]], "equally many"), ([[0, 0]], "each rank"), ([[1, 2]], "each rank"), ([], "each rank")],
)
def test_other_hosts_are_refused(hosts: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Hierarchical(hosts, AllGather(ToyTop()))


@pytest.mark.parametrize(
    ("size", "weights", "message"),
    [(2, [1.0, 2.0], "differ between ranks of one host"), (3, None, "name 2 ranks, but the group has 3")],
)
def test_what_it_cannot_do_is_refused_before_anything_is_sent(
    size: int, weights: list[float] | None, message: str
) -> None:
    def work(rank: Rank) -> None:
        queue = rank.queue()
        collective = Hierarchical([[0, 1]], AllGather(ToyTop()))
        with pytest.raises((ValueError, PeerFailedError), match=message):
            call_on(
                rank,
                lambda exchange: queue.submit("mean", exchange).wait(),
                collective,
                inputs_of(rank.rank),
                weights=weights,
                sent_bytes=lambda: 0,
            )
        assert queue.meter.snapshot()["operations"] == {}

    run_ranks(size, work)
