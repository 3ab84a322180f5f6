"""Shared places: one rank's choice, everybody's values, traffic that does not grow with the ranks."""

from __future__ import annotations

import pytest
import torch
from collective_cases import SHAPES, all_nan, call, draws_of, inputs_of, same_bits
from torch import Tensor

from thinwire.comm.compress.collectives.leader_indices import LeaderIndices
from thinwire.comm.compress.compressor import Compressor
from thinwire.comm.compress.compressors.rand_k import RandK
from thinwire.comm.compress.compressors.threshold import Threshold
from thinwire.comm.compress.compressors.top_k import TopK
from thinwire.comm.compress.decoded import Sparse

COMPRESSORS: dict[str, Compressor] = {
    "topk": TopK(density=0.2),
    "topk-bf16": TopK(density=0.2, values="bf16"),
    "topk-int8": TopK(density=0.2, values="int8"),
    "threshold": Threshold(density=0.2, values="fp16"),
    "randk": RandK(density=0.2),
    "randk-unbiased": RandK(density=0.2, unbiased=True, values="fp16"),
}
every_compressor = pytest.mark.parametrize("compressor", COMPRESSORS.values(), ids=COMPRESSORS)


def places(compressor: Compressor, leader: int, inputs: list[Tensor], step: int) -> list[Tensor]:
    """Where the leader's own payload says that something is."""
    found = []
    for x, draw in zip(inputs, draws_of(leader, step), strict=True):
        if not x.numel():
            found.append(torch.empty(0, dtype=torch.int64))
            continue
        decoded = compressor.decode(compressor.encode(x, draw), x.shape, draw)
        assert isinstance(decoded, Sparse)
        found.append(decoded.indices)
    return found


@every_compressor
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_every_rank_sends_its_values_at_the_leaders_places(compressor: Compressor, size: int) -> None:
    step = 4
    outcomes = call(size, lambda: LeaderIndices(compressor), step=step)
    chosen = places(compressor, step % size, inputs_of(step % size), step)
    tolerance = {"fp32": 1e-6, "bf16": 4e-2, "fp16": 4e-3, "int8": 5e-2}[compressor.values]
    for i, indices in enumerate(chosen):
        scale = 1.0
        if isinstance(compressor, RandK) and compressor.unbiased and len(indices):
            scale = torch.Size(SHAPES[i]).numel() / len(indices)
        terms = []
        for r, outcome in enumerate(outcomes):
            x = inputs_of(r)[i].view(-1)
            expected = torch.zeros_like(x)
            expected[indices] = x[indices] * scale
            torch.testing.assert_close(outcome.contributed[i], expected, rtol=tolerance, atol=tolerance)
            terms.append(outcome.contributed[i])
        mean = torch.stack(terms).mean(0)
        torch.testing.assert_close(outcomes[0].outputs[i].view(-1), mean, rtol=tolerance, atol=tolerance)


def test_the_leader_changes_with_the_step_and_is_never_absent() -> None:
    compressor = TopK(density=0.2)
    weights = [1.0, 0.0, 2.0]
    for step, leader in enumerate([0, 2, 0]):
        outcomes = call(3, lambda: LeaderIndices(compressor), weights=weights, step=step)
        for i, indices in enumerate(places(compressor, leader, inputs_of(leader), step)):
            expected = torch.zeros(torch.Size(SHAPES[i]).numel())
            for r, weight in enumerate(weights):
                expected[indices] += weight * inputs_of(r)[i].view(-1)[indices] / 3
            torch.testing.assert_close(outcomes[1].outputs[i].view(-1), expected)
            assert not outcomes[1].contributed[i].any()


@every_compressor
@pytest.mark.parametrize("one_bucket", [False, True])
def test_memories_give_what_adding_before_and_subtracting_after_gives(compressor: Compressor, one_bucket: bool) -> None:
    def memories(rank: int) -> list[Tensor]:
        return inputs_of(rank, step=9)

    def sums(rank: int) -> list[Tensor]:
        return [x + m for x, m in zip(inputs_of(rank), memories(rank), strict=True)]

    fused = call(3, lambda: LeaderIndices(compressor), memories=memories, one_bucket=one_bucket)
    plain = call(3, lambda: LeaderIndices(compressor), sums)
    assert same_bits(fused[0].outputs, plain[0].outputs)
    for r in range(3):
        left = [c - sent.view_as(c) for c, sent in zip(sums(r), plain[r].contributed, strict=True)]
        assert same_bits(fused[r].next_memories, left)


@every_compressor
@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_input_is_known_everywhere(compressor: Compressor, who: int, bad: float) -> None:
    def inputs(rank: int) -> list[Tensor]:
        tensors = inputs_of(rank)
        if rank == who:
            tensors[3].view(-1)[5] = bad
        return tensors

    for outcome in call(3, lambda: LeaderIndices(compressor), inputs):
        assert outcome.contributed is None
        assert all_nan(outcome.outputs)


def test_traffic_does_not_grow_with_the_ranks() -> None:
    shapes = {"w": (2_000_000,)}
    collective = LeaderIndices(TopK(density=0.01, values="int8"))
    of_pair = max(sum(collective.sent_bytes(shapes, r, 2).values()) for r in range(2))
    of_many = max(sum(collective.sent_bytes(shapes, r, 32).values()) for r in range(32))
    assert of_many < 2.2 * of_pair  # twice: 2 (n-1)/n of the values against 1, 2 index sets against 1
    assert of_pair < 20_000 * (1 + 8.2 / 8 + 4 / 256) + 200


def test_what_chooses_no_places_is_refused() -> None:
    with pytest.raises(ValueError, match=r"compressor: TopK.*|compressor.values: '2bit' cannot be averaged"):
        LeaderIndices(TopK(density=0.1, values="2bit"))
