"""What holds for the all-gather and the two-shot mean alike, and what is their own."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from collective_cases import SHAPES, all_nan, call, draws_of, inputs_of, same_bits
from ranks import Rank, run_ranks_to_the_end
from torch import Tensor
from toy_compressors import ToyGrid, ToyTop

from thinwire.comm import two_shot
from thinwire.comm.compress.collective import Collective, Job
from thinwire.comm.compress.collectives.all_gather import AllGather
from thinwire.comm.compress.collectives.balanced import Balanced
from thinwire.comm.compress.collectives.leader_indices import LeaderIndices
from thinwire.comm.compress.collectives.two_shot import TwoShot
from thinwire.comm.compress.compressor import Compressor
from thinwire.comm.compress.compressors.block_quantized import Int4, Int8, Ternary
from thinwire.comm.compress.compressors.dense import BF16
from thinwire.comm.compress.compressors.sign import Sign
from thinwire.comm.compress.compressors.threshold import Threshold
from thinwire.comm.compress.compressors.top_k import TopK
from thinwire.comm.compress.decoded import to_dense
from thinwire.comm.compress.draw import Draw
from thinwire.comm.errors import PeerFailedError
from thinwire.comm.two_shot import split_evenly
from thinwire.comm.wire import PayloadError

COLLECTIVES: dict[str, Callable[[], Collective]] = {
    "all_gather-sparse": lambda: AllGather(ToyTop()),
    "all_gather-dense": lambda: AllGather(ToyGrid()),
    "all_gather-topk-int8": lambda: AllGather(TopK(density=0.2, values="int8")),
    "all_gather-topk-all": lambda: AllGather(TopK(density=1.0)),
    "two_shot": lambda: TwoShot(ToyGrid()),
    "two_shot-server_error": lambda: TwoShot(ToyGrid(), server_error=True),
    "leader_indices": lambda: LeaderIndices(TopK(density=0.3)),
    "balanced": lambda: Balanced(TopK(density=0.3)),
}
every_collective = pytest.mark.parametrize("make", COLLECTIVES.values(), ids=COLLECTIVES)
gathering = pytest.mark.parametrize(
    "compressor",
    [
        ToyTop(),
        ToyGrid(),
        ToyTop(threshold=1e9),
        TopK(density=0.2),
        TopK(density=0.2, values="int8_stochastic"),
        TopK(density=0.3, values="2bit"),
        TopK(density=1.0),
        Threshold(density=0.1, values="bf16"),
    ],
    ids=["sparse", "dense", "empty", "topk", "topk-int8", "topk-2bit", "topk-all", "threshold"],
)


def coded(compressor: Compressor, x: Tensor, draw: Draw) -> Tensor:
    """C(x), flat."""
    return to_dense(compressor.decode(compressor.encode(x, draw), x.shape, draw)) if x.numel() else x.view(-1)


def weighted_mean(terms: list[Tensor], weights: list[float]) -> Tensor:
    """The definition: a sum in rank order, in fp32, divided by the number of ranks."""
    total = torch.zeros_like(terms[0])
    for term, weight in zip(terms, weights, strict=True):
        total = total + term * weight if weight else total
    return total * (1.0 / len(terms))


@gathering
@pytest.mark.parametrize(
    ("size", "weights"), [(1, None), (2, None), (3, None), (5, None), (3, [0.5, 0.0, 2.0])], ids=str
)
def test_all_gather_is_the_rank_ordered_mean_of_what_is_decoded(
    compressor: Compressor, size: int, weights: list[float] | None
) -> None:
    outcomes = call(size, lambda: AllGather(compressor), weights=weights)
    for i in range(len(SHAPES)):
        terms = [coded(compressor, inputs_of(r)[i], draws_of(r)[i]) for r in range(size)]
        assert torch.equal(outcomes[0].outputs[i].view(-1), weighted_mean(terms, weights or [1.0] * size))
        for r, outcome in enumerate(outcomes):
            absent = weights is not None and weights[r] == 0
            assert torch.equal(outcome.contributed[i], torch.zeros_like(terms[r]) if absent else terms[r])


@pytest.mark.parametrize("compressor", [ToyTop(), ToyTop(threshold=1e9), ToyTop(threshold=0.0)], ids=str)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_each_element_is_the_mean_over_the_ranks_that_sent_it(compressor: Compressor, size: int) -> None:
    outcomes = call(size, lambda: AllGather(compressor, contributors_only=True))
    for i in range(len(SHAPES)):
        terms = [coded(compressor, inputs_of(r)[i], draws_of(r)[i]) for r in range(size)]
        total = terms[0].clone()
        for term in terms[1:]:
            total += term
        senders = torch.stack([(term != 0).float() for term in terms]).sum(0)
        for outcome in outcomes:
            assert torch.equal(outcome.outputs[i].view(-1), total / senders.clamp(min=1))


def two_shot_reference(
    compressor: Compressor, flats: list[Tensor], step: int, weights: list[float], errors: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """The mean, and what each rank contributed, of the joined tensors."""
    size = len(flats)
    splits = split_evenly(flats[0].numel(), size, math.lcm(16, compressor.granule))
    means, contributed = [], [[] for _ in flats]
    for owner, parts in enumerate(zip(*(flat.split(splits) for flat in flats), strict=True)):
        name = f"tensor0/slice{owner}"
        terms = [coded(compressor, x, Draw(7, step, name, r)) for r, x in enumerate(parts)]
        mean = weighted_mean(terms, weights)
        if errors is not None:
            mean = mean + errors.split(splits)[owner]
        means.append(coded(compressor, mean, Draw(7, step, f"{name}/mean", owner)))
        for mine, term in zip(contributed, terms, strict=True):
            mine.append(term)
    return torch.cat(means), [torch.cat(mine) for mine in contributed]


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([x.reshape(-1) for x in tensors])


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("cell", [1, 24])
@pytest.mark.parametrize(("one_bucket", "rounds_from_bytes"), [(False, 1 << 18), (True, 0)])
def test_two_shot_encodes_twice_and_adds_in_rank_order(
    size: int, cell: int, one_bucket: bool, rounds_from_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(two_shot, "_ROUNDS_FROM_BYTES", rounds_from_bytes)
    compressor = ToyGrid(cell=cell)
    outcomes = call(size, lambda: TwoShot(compressor), one_bucket=one_bucket)
    mean, contributed = two_shot_reference(compressor, [flat(inputs_of(r)) for r in range(size)], 0, [1.0] * size)
    assert torch.equal(flat(outcomes[0].outputs), mean)
    for outcome, expected in zip(outcomes, contributed, strict=True):
        assert torch.equal(flat(outcome.contributed), expected)


@pytest.mark.parametrize("server_error", [False, True])
@pytest.mark.parametrize(
    "compressor",
    [Int8(), Int8(block=24, rounding="stochastic"), Int4(block=8), Ternary(), Sign(block=32), BF16()],
    ids=lambda compressor: f"{compressor.kind}-{compressor.granule}",
)
def test_two_shot_sums_codes_as_it_would_sum_what_they_stand_for(compressor: Compressor, server_error: bool) -> None:
    outcomes = call(3, lambda: TwoShot(compressor, server_error=server_error), one_bucket=True)
    mean, contributed = two_shot_reference(compressor, [flat(inputs_of(r)) for r in range(3)], 0, [1.0] * 3)
    assert torch.equal(flat(outcomes[0].outputs), mean)
    assert torch.equal(flat(outcomes[2].contributed), contributed[2])


@pytest.mark.parametrize("compressor", [ToyGrid(), Int8(block=24)], ids=["toy", "int8"])
def test_two_shot_with_weights_and_an_absent_rank(compressor: Compressor) -> None:
    weights = [0.5, 0.0, 2.0]
    outcomes = call(3, lambda: TwoShot(compressor), weights=weights)
    mean, contributed = two_shot_reference(compressor, [flat(inputs_of(r)) for r in range(3)], 0, weights)
    assert torch.equal(flat(outcomes[0].outputs), mean)
    assert torch.equal(flat(outcomes[2].contributed), contributed[2])
    assert not flat(outcomes[1].contributed).any()


@every_collective
@pytest.mark.parametrize(("one_bucket", "weights"), [(False, None), (True, None), (True, [1.0, 0.0, 1.0])], ids=str)
def test_memories_give_what_adding_before_and_subtracting_after_gives(
    make: Callable[[], Collective], one_bucket: bool, weights: list[float] | None
) -> None:
    def memories(rank: int) -> list[Tensor]:
        return inputs_of(rank, step=9)

    def sums(rank: int) -> list[Tensor]:
        return [x + m for x, m in zip(inputs_of(rank), memories(rank), strict=True)]

    fused = call(3, make, memories=memories, weights=weights, one_bucket=one_bucket)
    plain = call(3, make, sums, weights=weights)
    assert same_bits(fused[0].outputs, plain[0].outputs)
    for r in range(3):
        assert fused[r].contributed == []
        left = [c - sent.view_as(c) for c, sent in zip(sums(r), plain[r].contributed, strict=True)]
        assert same_bits(fused[r].next_memories, left)


@every_collective
@pytest.mark.parametrize(
    ("bad", "weights"), [(float("nan"), None), (-float("inf"), None), (float("inf"), [1.0, 0.0, 1.0])], ids=str
)
def test_one_bad_input_is_known_everywhere(
    make: Callable[[], Collective], bad: float, weights: list[float] | None
) -> None:
    def inputs(rank: int) -> list[Tensor]:
        tensors = inputs_of(rank)
        if rank == 1:
            tensors[3].view(-1)[5] = bad
        return tensors

    for outcome in call(3, make, inputs, weights=weights):
        assert outcome.contributed is None
        assert all_nan(outcome.outputs)


@every_collective
def test_a_memory_that_overflows_counts_as_not_finite(make: Callable[[], Collective]) -> None:
    def huge(rank: int) -> list[Tensor]:
        return [torch.full(shape, 3e38) for shape in SHAPES]

    for outcome in call(2, make, huge, memories=huge):
        assert outcome.contributed is None
        assert all_nan(outcome.outputs)


@every_collective
def test_a_sum_that_overflows_counts_as_not_finite(make: Callable[[], Collective]) -> None:
    for outcome in call(3, make, lambda rank: [torch.full(shape, 3e38) for shape in SHAPES]):
        assert outcome.contributed is None
        assert all_nan(outcome.outputs)


@every_collective
def test_large_finite_inputs_whose_sum_overflows_are_taken(make: Callable[[], Collective]) -> None:
    def inputs(rank: int) -> list[Tensor]:
        return [torch.full((30,), 1e37), torch.full((30,), 1e37)]

    (outcome,) = call(1, make, inputs)
    assert outcome.contributed is not None


@every_collective
@pytest.mark.parametrize("broken_byte", [5, -1])
def test_a_corrupted_message_is_an_error_that_everybody_learns_of(
    make: Callable[[], Collective], broken_byte: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 finds one byte of what it receives changed."""

    def work(rank: Rank) -> None:
        queue = rank.queue()

        def exchange(channel) -> None:
            for name in ("all_to_all", "all_gather"):
                plain = getattr(channel, name)

                def corrupt(output: Tensor, *args, plain=plain, **kwargs) -> None:
                    plain(output, *args, **kwargs)
                    if output.dtype == torch.uint8 and rank.rank == 1:
                        position = broken_byte if broken_byte >= 0 else output.numel() // 2
                        output[position] ^= 0x40

                setattr(channel, name, corrupt)
            tensors = inputs_of(rank.rank)
            make().mean(channel, Job([f"{i}" for i in range(len(tensors))], tensors, tensors, draws_of(rank.rank)))

        queue.submit("mean", exchange).wait()
        # Those that had all they needed learn of it at the next exchange.
        queue.submit("next", lambda channel: channel.all_gather_same(torch.zeros(1))).wait()

    outcomes = run_ranks_to_the_end(3, work)
    # Rank 1 finds it, and where it hands on what it has received, those that get it.
    finders = [r for r, outcome in enumerate(outcomes) if isinstance(outcome, PayloadError)]
    assert finders
    for outcome in outcomes:
        assert isinstance(outcome, PayloadError | PeerFailedError)
        assert "from rank" in str(outcome)
        if isinstance(outcome, PeerFailedError):
            assert set(outcome.missing_ranks) <= set(finders)


def test_ranks_with_other_settings_are_found_out() -> None:
    def work(rank: Rank) -> None:
        tensors = inputs_of(rank.rank)
        collective = AllGather(ToyTop(threshold=1.0 + rank.rank))
        job = Job([f"{i}" for i in range(len(tensors))], tensors, tensors, draws_of(rank.rank))
        rank.queue().submit("mean", lambda channel: collective.mean(channel, job)).wait()

    outcomes = run_ranks_to_the_end(2, work)
    assert any(isinstance(outcome, PayloadError) and "codec" in str(outcome) for outcome in outcomes)


@pytest.mark.parametrize("length", [-1, 0, 1 << 40])
def test_an_impossible_length_is_refused_before_memory_is_taken(length: int) -> None:
    def work(rank: Rank) -> None:
        def exchange(channel) -> None:
            if rank.rank == 0:
                channel.all_gather_same(torch.tensor(length))
                return
            tensors = inputs_of(rank.rank)
            AllGather(ToyTop()).mean(channel, Job([*"abcde"], tensors, tensors, draws_of(rank.rank)))

        rank.queue().submit("mean", exchange).wait()

    outcome = run_ranks_to_the_end(2, work)[1]
    assert isinstance(outcome, PayloadError)
    assert f"a message of {length} bytes" in str(outcome)


def test_two_shot_refuses_what_it_cannot_cut() -> None:
    with pytest.raises(ValueError, match=r"ToyTop.*use a dense elementwise one, or the collective all_gather"):
        TwoShot(ToyTop())
