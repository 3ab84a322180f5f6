"""Ok-Topk: the largest sums of all, from what each rank keeps, at a traffic that does not grow."""

from __future__ import annotations

import pytest
import torch
from collective_cases import SHAPES, Outcome, call, call_on, inputs_of, same_bits
from ranks import Rank, run_ranks
from torch import Tensor

from thinwire.comm.compress.collectives.balanced import Balanced
from thinwire.comm.compress.compressors.dense import Dense
from thinwire.comm.compress.compressors.threshold import Threshold
from thinwire.comm.compress.compressors.top_k import TopK

NUMELS = [torch.Size(shape).numel() for shape in SHAPES]
TOLERANCE = {"fp32": 1e-6, "bf16": 4e-2, "int8": 5e-2, "int4": 0.8}


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([x.reshape(-1) for x in tensors])


def local_choice(compressor: TopK, rank: int, step: int = 0) -> Tensor:
    """What the rank keeps of its inputs, unrounded, flat."""
    parts = []
    for x in inputs_of(rank, step):
        kept = torch.zeros(x.numel())
        if x.numel():
            k = compressor.expected_count(x.numel())
            indices = x.view(-1).abs().sort(descending=True, stable=True).indices[:k]
            kept[indices] = x.view(-1)[indices]
        parts.append(kept)
    return torch.cat(parts)


def largest(x: Tensor, k: int) -> Tensor:
    kept = torch.zeros_like(x)
    indices = x.abs().topk(k).indices
    kept[indices] = x[indices]
    return kept


@pytest.mark.parametrize("values", TOLERANCE)
@pytest.mark.parametrize(
    ("size", "weights"), [(1, None), (2, None), (3, None), (3, [0.5, 0.0, 2.0]), (5, None)], ids=str
)
def test_it_is_the_largest_sums_of_what_the_ranks_keep(size: int, weights: list[float] | None, values: str) -> None:
    compressor = TopK(density=0.2, values=values)
    outcomes = call(size, lambda: Balanced(compressor), weights=weights)
    w = weights or [1.0] * size
    choices = [local_choice(compressor, r) for r in range(size)]
    mean = sum(w[r] * choices[r] for r in range(size)) / size
    k = sum(compressor.expected_count(numel) for numel in NUMELS if numel)
    tolerance = TOLERANCE[values]
    found = flat(outcomes[0].outputs)
    if values == "fp32":
        torch.testing.assert_close(found, largest(mean, k), rtol=tolerance, atol=1e-6)
    torch.testing.assert_close(found, torch.where(found != 0, mean, 0.0), rtol=tolerance, atol=tolerance)
    for r, outcome in enumerate(outcomes):
        expected = torch.where(found != 0, choices[r], 0.0) * (w[r] != 0)
        torch.testing.assert_close(flat(outcome.contributed), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("compressor", [TopK(density=0.2), TopK(density=0.2, values="int8"), Threshold(density=0.2)])
@pytest.mark.parametrize("one_bucket", [False, True])
def test_memories_give_what_adding_before_and_subtracting_after_gives(compressor, one_bucket: bool) -> None:
    def memories(rank: int) -> list[Tensor]:
        return inputs_of(rank, step=9)

    def sums(rank: int) -> list[Tensor]:
        return [x + m for x, m in zip(inputs_of(rank), memories(rank), strict=True)]

    fused = call(3, lambda: Balanced(compressor), memories=memories, one_bucket=one_bucket)
    plain = call(3, lambda: Balanced(compressor), sums)
    assert same_bits(fused[0].outputs, plain[0].outputs)
    for r in range(3):
        left = [c - sent.view_as(c) for c, sent in zip(sums(r), plain[r].contributed, strict=True)]
        assert same_bits(fused[r].next_memories, left)


def clustered(rank: int, step: int, numel: int) -> Tensor:
    """Entries whose magnitude falls along the tensor: even regions would be very uneven."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(numel, generator=generator) * torch.exp(-torch.arange(numel) / (0.1 * numel))


@pytest.mark.parametrize("size", [2, 5])
def test_traffic_stays_below_six_words_an_entry(size: int) -> None:
    """On average over the steps, those that look for thresholds and regions included; all ranks much alike."""
    numel, steps = 40_000, 8
    compressor = TopK(density=0.05)
    k = compressor.expected_count(numel)

    def work(rank: Rank) -> tuple[int, int, list[Tensor]]:
        queue = rank.queue()
        collective = Balanced(compressor)
        counts = []
        for step in range(steps):
            outcome = call_on(
                rank,
                lambda exchange: queue.submit("mean", exchange).wait(),
                collective,
                [clustered(rank.rank, step, numel)],
                step=step,
                sent_bytes=lambda: sum(queue.meter.sent_bytes().values()),
            )
            collective.commit()
            counts.append(int(outcome.outputs[0].count_nonzero()))
        assert all(k / 1.5 < count < 1.5 * k for count in counts)
        assert counts[0] == k
        assert counts[1] != k  # by the threshold of the step before
        sent, received = queue.meter.sent_bytes()["world"], queue.meter.received_bytes()["world"]
        queue.close()
        return sent, received, collective.state_dict()

    results = run_ranks(size, work)
    bound = steps * 6 * k * (size - 1) / size * 4
    assert all(max(sent, received) < bound for sent, received, _ in results)
    assert max(sent for sent, _, _ in results) < 1.6 * min(sent for sent, _, _ in results)
    assert all(state == results[0][2] for _, _, state in results)


def run_steps(rank: Rank, steps: int, stop_at: int | None = None, undo: bool = False) -> list[Outcome]:
    queue = rank.queue(name=f"queue-{stop_at}-{undo}")
    collective = Balanced(TopK(density=0.1))
    outcomes = []
    for step in range(steps):
        if step == stop_at:
            state = collective.state_dict()
            collective = Balanced(TopK(density=0.1))
            collective.load_state_dict(state)
        for other in [7, None] if undo else [None]:
            outcome = call_on(
                rank,
                lambda exchange: queue.submit("mean", exchange).wait(),
                collective,
                inputs_of(rank.rank, step if other is None else other),
                step=step,
                sent_bytes=lambda: sum(queue.meter.sent_bytes().values()),
            )
            if other is not None:
                collective.rollback()
        collective.commit()
        outcomes.append(outcome)
    queue.close()
    return outcomes


def test_resuming_and_rolling_back_leave_no_trace() -> None:
    def work(rank: Rank) -> None:
        plain = run_steps(rank, 4)
        for other in (run_steps(rank, 4, stop_at=2), run_steps(rank, 4, undo=True)):
            for a, b in zip(plain, other, strict=True):
                assert same_bits(a.outputs, b.outputs)

    run_ranks(2, work)


def test_a_gradient_that_shrinks_gets_a_new_threshold() -> None:
    def work(rank: Rank) -> list[int]:
        queue = rank.queue()
        collective = Balanced(TopK(density=0.1))
        counts = []
        for scale in (1.0, 0.01, 0.01):
            outcome = call_on(
                rank,
                lambda exchange: queue.submit("mean", exchange).wait(),
                collective,
                [scale * inputs_of(rank.rank, shapes=[(1000,)])[0]],
                sent_bytes=lambda: sum(queue.meter.sent_bytes().values()),
            )
            collective.commit()
            counts.append(int(outcome.outputs[0].count_nonzero()))
        queue.close()
        return counts

    assert run_ranks(2, work)[0] == [100, 0, 100]


def test_dense_compressors_are_refused() -> None:
    with pytest.raises(ValueError, match="does not choose the largest entries"):
        Balanced(Dense())
