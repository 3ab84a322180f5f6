"""PowerSGD's mean: exact where it must be, batched, warm, and transactional."""

from __future__ import annotations

import pytest
import torch
from collective_cases import all_nan, call, draws_of, inputs_of, same_bits
from torch import Tensor

from thinwire.comm.compress.collectives.low_rank import LowRankMean
from thinwire.comm.compress.compressors.low_rank import LowRank, orthonormalise, random_start

MATRICES = ((20, 30), (7,), (20, 30), (0, 3), (12, 4, 5), (20, 30), (2, 2))


def of_rank(rank: int, wanted: int, step: int = 0) -> list[Tensor]:
    """Inputs whose mean over any ranks has rank `wanted`: they share their columns' space."""
    shared = torch.Generator().manual_seed(step)
    own = torch.Generator().manual_seed(1000 * step + rank + 1)
    tensors = []
    for shape in MATRICES:
        if len(shape) < 2 or 0 in shape:
            tensors.append(torch.randn(*shape, generator=own))
            continue
        rows, columns = shape[0], torch.Size(shape).numel() // shape[0]
        left = torch.randn(rows, wanted, generator=shared)
        tensors.append((left @ torch.randn(wanted, columns, generator=own)).view(shape))
    return tensors


def plain_mean(terms: list[list[Tensor]]) -> list[Tensor]:
    return [torch.stack(same).mean(0) for same in zip(*terms, strict=True)]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_matrices_of_low_rank_and_vectors_come_back_whole(size: int, rank: int) -> None:
    outcomes = call(size, lambda: LowRankMean(LowRank(rank=rank)), lambda r: of_rank(r, rank))
    for mean, expected in zip(outcomes[0].outputs, plain_mean([of_rank(r, rank) for r in range(size)]), strict=True):
        torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_it_is_powersgd_of_the_mean(dtype: str) -> None:
    settings = LowRank(rank=2, dtype=dtype)
    outcomes = call(3, lambda: LowRankMean(settings), lambda r: inputs_of(r, shapes=MATRICES), one_bucket=True)
    mean = plain_mean([inputs_of(r, shapes=MATRICES) for r in range(3)])
    for i, shape in enumerate(MATRICES):
        factors = settings.factors(torch.Size(shape)) if torch.Size(shape).numel() else None
        expected = mean[i]
        if factors:
            rows, columns, rank = factors
            matrix = mean[i].view(rows, columns)
            start = orthonormalise(random_start(columns, rank, draws_of(0, count=len(MATRICES))[i]).unsqueeze(0))[0]
            left = orthonormalise((matrix @ start).unsqueeze(0))[0]
            expected = (left @ left.T @ matrix).view(shape)
        tolerance = {"fp32": 1e-5, "bf16": 3e-2, "fp16": 3e-3}[dtype]
        torch.testing.assert_close(outcomes[0].outputs[i], expected, rtol=tolerance, atol=4 * tolerance)
        torch.testing.assert_close(
            torch.stack([o.contributed[i] for o in outcomes]).mean(0),
            outcomes[0].outputs[i].view(-1),
            rtol=tolerance,
            atol=4 * tolerance,
        )


def test_a_batch_equals_one_at_a_time_at_rank_one() -> None:
    """Each matrix of a batch has an orthonormal basis of its own."""
    settings = LowRank(rank=1)
    together = call(2, lambda: LowRankMean(settings), lambda r: inputs_of(r, shapes=[(20, 30)] * 3))[0].outputs

    for i in range(3):

        def inputs(rank: int, i: int = i) -> list[Tensor]:
            others = torch.zeros(20, 30)
            return [x if j == i else others for j, x in enumerate(inputs_of(rank, shapes=[(20, 30)] * 3))]

        alone = call(2, lambda: LowRankMean(settings), inputs)[0].outputs[i]
        torch.testing.assert_close(alone, together[i], rtol=1e-5, atol=1e-5)


def test_memories_take_what_was_not_contributed() -> None:
    def memories(rank: int) -> list[Tensor]:
        return inputs_of(rank, step=9)

    def sums(rank: int) -> list[Tensor]:
        return [x + m for x, m in zip(inputs_of(rank), memories(rank), strict=True)]

    fused = call(3, lambda: LowRankMean(LowRank(rank=1)), memories=memories)
    plain = call(3, lambda: LowRankMean(LowRank(rank=1)), sums)
    assert same_bits(fused[0].outputs, plain[0].outputs)
    for r in range(3):
        left = [c - sent.view_as(c) for c, sent in zip(sums(r), plain[r].contributed, strict=True)]
        # The memory's product is subtracted while it is summed up: another order of the same few roundings.
        for found, expected in zip(fused[r].next_memories, left, strict=True):
            torch.testing.assert_close(found, expected, rtol=0.0, atol=2e-6)
        assert same_bits(fused[r].next_memories[1:], left[1:])  # sent whole


def test_weights_multiply_contributions_and_an_absent_rank_makes_none() -> None:
    weights = [0.5, 0.0, 2.0]
    outcomes = call(3, lambda: LowRankMean(LowRank(rank=1)), lambda r: of_rank(r, 1), weights=weights)
    weighted = [[w * x for x in of_rank(r, 1)] for r, w in enumerate(weights)]
    for i, expected in enumerate(plain_mean(weighted)):
        torch.testing.assert_close(outcomes[0].outputs[i], expected, rtol=1e-4, atol=1e-4)
        assert not outcomes[1].contributed[i].any()
        torch.testing.assert_close(outcomes[2].contributed[i], of_rank(2, 1)[i].view(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_input_is_known_everywhere(place: int, dtype: str, bad: float) -> None:
    def inputs(rank: int) -> list[Tensor]:
        tensors = inputs_of(rank, shapes=MATRICES)
        if rank == 1:
            tensors[place].view(-1)[3] = bad
        return tensors

    for outcome in call(3, lambda: LowRankMean(LowRank(rank=2, dtype=dtype)), inputs):
        assert outcome.contributed is None
        assert all_nan(outcome.outputs)


def error(collective: LowRankMean, x: Tensor) -> float:
    outcome = call(1, lambda: collective, lambda rank: [x])[0]
    return float((outcome.outputs[0] - x).norm() / x.norm())


def test_warm_starts_approach_the_best_factors_but_only_by_commits() -> None:
    x = torch.randn(40, 50, generator=torch.Generator().manual_seed(1))
    singular = torch.linalg.svdvals(x)
    best = float((singular[2:].square().sum() / singular.square().sum()).sqrt())
    warm, cold, undone = (LowRankMean(LowRank(rank=2, warm_start=w)) for w in (True, False, True))
    errors: dict[str, list[float]] = {"warm": [], "cold": [], "undone": []}
    for _ in range(40):
        for name, collective in (("warm", warm), ("cold", cold), ("undone", undone)):
            errors[name].append(error(collective, x))
            if name == "undone":
                collective.rollback()
            else:
                collective.commit()
    assert errors["warm"][0] > 1.02 * best
    assert errors["warm"][-1] < 1.005 * best
    assert errors["cold"] == errors["undone"] == [errors["warm"][0]] * 40

    copy = LowRankMean(LowRank(rank=2))
    copy.load_state_dict(warm.state_dict())
    assert error(copy, x) == error(warm, x)


def test_zeros_stay_zeros_and_leave_the_start_alive() -> None:
    collective = LowRankMean(LowRank(rank=2))
    zeros = call(1, lambda: collective, lambda rank: [torch.zeros(20, 30)])[0]
    assert not zeros.outputs[0].any()
    collective.commit()
    x = of_rank(0, 2)[0]
    assert error(collective, x) < 1e-4
