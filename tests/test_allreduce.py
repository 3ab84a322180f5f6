"""The DDP door: averages, bytes, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import Rank, run_ranks, seeded
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from thinwire.comm import two_shot
from thinwire.comm.allreduce import allreduce
from thinwire.comm.method import Method
from thinwire.comm.two_level import Groups, TwoLevelMean
from thinwire.comm.two_shot import TwoShotMean, split_evenly

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_model(width: int = 37, layers: int = 5) -> nn.Module:
    with seeded():
        return nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)])


def wrap(rank: Rank, model: nn.Module, **kwargs) -> DistributedDataParallel:
    return DistributedDataParallel(model, process_group=rank.group, init_sync=False, **kwargs)


def inputs_of(rank: int, step: int = 0, width: int = 37) -> torch.Tensor:
    return torch.randn(8, width, generator=torch.Generator().manual_seed(100 * step + rank))


@given(numel=st.integers(0, 10_000), size=st.integers(1, 64))
def test_split_is_even_and_complete(numel: int, size: int) -> None:
    splits = split_evenly(numel, size)
    assert sum(splits) == numel
    assert max(splits) - min(splits) <= 16
    assert sum(n % 16 != 0 for n in splits) == (numel % 16 != 0)


@pytest.mark.parametrize("wire", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("held", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("rounds_from_bytes", [1 << 18, 0])
def test_two_shot_mean_is_the_rank_ordered_fp32_sum_rounded_once(
    wire, held, size: int, rounds_from_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(two_shot, "_ROUNDS_FROM_BYTES", rounds_from_bytes)
    numels = [0, 1, 2, 5, 1000]

    def tensor(rank: int, numel: int) -> torch.Tensor:
        return torch.randn(numel, generator=torch.Generator().manual_seed(rank)).to(held)

    def work(rank: Rank) -> list[torch.Tensor]:
        queue = rank.queue()
        mean = TwoShotMean(wire)
        results = []
        for numel in numels:
            mine = tensor(rank.rank, numel)
            queue.submit("mean", lambda channel, mine=mine: mean(channel, mine)).wait()
            results.append(mine)
        predicted = sum(sum(mean.sent_bytes(n, rank.rank, size).values()) for n in numels)
        assert sum(queue.meter.sent_bytes().values()) == predicted
        queue.close()
        return results

    for results in run_ranks(size, work):
        for numel, result in zip(numels, results, strict=True):
            total = torch.zeros(numel)
            for r in range(size):
                total = total + tensor(r, numel).to(wire).float() if r else tensor(r, numel).to(wire).float()
            assert torch.equal(result, (total * (1.0 / size)).to(wire).to(held))


def exact_mean(tensors: list[torch.Tensor]) -> torch.Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total * (1.0 / len(tensors))


@pytest.mark.parametrize("wire", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", [[[0, 1], [2, 3]], [[0, 2], [1, 3]], [[0], [1]], [[0, 1]]], ids=str)
def test_two_level_mean_is_exact_within_groups_and_rounded_between_them(wire, held, groups: list[list[int]]) -> None:
    size, numels = sum(map(len, groups)), [0, 1, 5, 1000, 20_000]

    def tensor(rank: int, numel: int) -> torch.Tensor:
        return torch.randn(numel, generator=torch.Generator().manual_seed(rank)).to(held)

    def work(rank: Rank) -> list[torch.Tensor]:
        (own,) = (group for group in groups if rank.rank in group)
        queue = rank.queue(levels=["node" if r in own else "world" for r in range(size)])
        mean = TwoLevelMean(Groups(groups), wire)
        results = []
        for numel in numels:
            mine = tensor(rank.rank, numel)
            queue.submit("mean", lambda channel, mine=mine: mean(channel, mine)).wait()
            results.append(mine)
        sent = queue.meter.sent_bytes()
        for level, part in zip(("node", "world"), (0, 1), strict=True):
            assert sent.get(level, 0) == sum(sum(mean.parts(n, rank.rank, size)[part].values()) for n in numels)
        assert sum(sent.values()) == sum(sum(mean.sent_bytes(n, rank.rank, size).values()) for n in numels)
        queue.close()
        return results

    for results in run_ranks(size, work):
        for numel, result in zip(numels, results, strict=True):
            within = [exact_mean([tensor(r, numel).float() for r in group]) for group in groups]
            mean = exact_mean([x.to(wire).float() for x in within]).to(wire)
            assert torch.equal(result, mean.to(held))


def test_between_groups_each_link_carries_the_gradient_once() -> None:
    numel, groups = 64_000, [[*range(8)], [*range(8, 16)]]
    flat, two_level = TwoShotMean(torch.bfloat16), TwoLevelMean(Groups(groups), torch.bfloat16)

    def across(mean: TwoShotMean | TwoLevelMean) -> int:
        return sum(n for r in groups[0] for to, n in mean.sent_bytes(numel, r, 16).items() if to in groups[1])

    assert across(two_level) == 2 * numel  # half to the other group, half of the means back, of 2 bytes each
    assert across(flat) == 8 * across(two_level)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bucket_cap_mb", [25, 0.01])
def test_gradients_are_the_mean_and_bytes_are_the_predicted(dtype: str, bucket_cap_mb: float) -> None:
    size = 3

    def work(rank: Rank) -> list[torch.Tensor]:
        queue = rank.queue()
        model = wrap(rank, make_model(), bucket_cap_mb=bucket_cap_mb, gradient_as_bucket_view=True)
        method = allreduce(model, dtype=dtype, queue=queue)
        assert isinstance(method, Method)
        for step in range(4):
            model.zero_grad()
            predicted = method.predicted_bytes()
            before = queue.meter.sent_bytes()
            model(inputs_of(rank.rank, step)).square().mean().backward()
            sent = {k: v - before.get(k, 0) for k, v in queue.meter.sent_bytes().items()}
            assert sent == method.predicted_bytes()
            if step != 1:  # DDP lays its buckets out anew in the second step
                assert sent == predicted
        if bucket_cap_mb < 1:
            assert method.metrics()["buckets"] > 1
        gradients = [p.grad.clone() for p in model.parameters()]
        queue.close()
        return gradients

    outcomes = run_ranks(size, work)
    expected = []
    for rank in range(size):
        alone = make_model()
        alone(inputs_of(rank, 3)).square().mean().backward()
        expected.append([p.grad for p in alone.parameters()])
    for i, result in enumerate(outcomes[0]):
        assert all(torch.equal(result, other[i]) for other in outcomes[1:])
        wired = [gradients[i].to(DTYPES[dtype]).float() for gradients in expected]
        mean = (((wired[0] + wired[1]) + wired[2]) * (1 / size)).to(DTYPES[dtype]).float()
        assert torch.equal(result, mean)


def test_accumulation_sends_once_per_step() -> None:
    def work(rank: Rank) -> None:
        queue = rank.queue()
        model = wrap(rank, make_model())
        allreduce(model, queue=queue)
        with model.no_sync():
            model(inputs_of(rank.rank, 0)).sum().backward()
        assert queue.meter.sent_bytes() == {}
        model(inputs_of(rank.rank, 1)).sum().backward()
        gradients = [p.grad for p in model.parameters()]
        expected = make_model()
        for r in range(2):
            for step in range(2):
                (expected(inputs_of(r, step)).sum() / 2).backward()
        for ours, theirs in zip(gradients, expected.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs.grad, rtol=1e-5, atol=1e-5)
        queue.close()

    run_ranks(2, work)


def test_an_interrupted_backward_leaves_the_queue_to_a_model_wrapped_anew() -> None:
    def work(rank: Rank) -> list[torch.Tensor]:
        queue = rank.queue()
        layers = make_model()
        model = wrap(rank, layers, bucket_cap_mb=0.001)
        method = allreduce(model, queue=queue)
        for _ in range(2):  # the second lays the buckets out, several of them
            model(inputs_of(rank.rank)).sum().backward()

        def interrupt(module: nn.Module, grad: object) -> None:
            raise KeyboardInterrupt

        handle = layers[2].register_full_backward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(inputs_of(rank.rank)).sum().backward()
        handle.remove()
        assert method.metrics()["buckets"] > 1
        with pytest.raises(RuntimeError, match="Expected to have finished reduction"):  # DDP's own rule
            model(inputs_of(rank.rank))
        anew = make_model()
        allreduce(wrapped := wrap(rank, anew), queue=queue)
        wrapped(inputs_of(rank.rank)).sum().backward()
        queue.close()
        return [p.grad for p in anew.parameters()]

    first, second = run_ranks(2, work)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_removed_method_averages_with_torchs_own_all_reduce() -> None:
    def work(rank: Rank) -> list[torch.Tensor]:
        queue = rank.queue()
        model = wrap(rank, make_model())
        method = allreduce(model, dtype="bf16", queue=queue)
        method.remove()
        model(inputs_of(rank.rank)).sum().backward()
        assert queue.meter.sent_bytes() == {}
        queue.close()
        return [p.grad for p in model.parameters()]

    first, second = run_ranks(2, work)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_refusals_name_what_to_do() -> None:
    def work(rank: Rank) -> None:
        queue = rank.queue()
        with pytest.raises(ValueError, match=r"got Sequential; wrap the model first"):
            allreduce(make_model(), queue=queue)
        with pytest.raises(ValueError, match=r"method\.dtype: 'int8' is not known; allowed: fp32, bf16, fp16"):
            allreduce(wrap(rank, make_model()), dtype="int8", queue=queue)
        with pytest.raises(ValueError, match=r"parameter 0\.weight is torch\.float64"):
            allreduce(wrap(rank, make_model().double()), queue=queue)
        with pytest.raises(ValueError, match=r"0 makes sparse gradients"):
            allreduce(wrap(rank, nn.Sequential(nn.Embedding(4, 4, sparse=True))), queue=queue)
        with pytest.raises(ValueError, match=r"exact_within: .* name 2 ranks, but the group has 1"):
            allreduce(wrap(rank, make_model()), exact_within=[[0, 1]], queue=queue)
        model = wrap(rank, make_model())
        method = allreduce(model, queue=queue)
        with pytest.raises(ValueError, match="already has a communication hook"):
            allreduce(model, queue=queue)
        with pytest.raises(ValueError, match="allreduce keeps no state"):
            method.load_state_dict({"error": torch.zeros(1)})
        queue.close()

    run_ranks(1, work)


@settings(max_examples=5, deadline=None)
@given(bad=st.sampled_from([float("nan"), float("inf"), -float("inf")]), culprit=st.integers(0, 1))
def test_a_non_finite_gradient_is_seen_on_every_rank(bad: float, culprit: int) -> None:
    def work(rank: Rank) -> bool:
        queue = rank.queue()
        model = wrap(rank, make_model())
        allreduce(model, dtype="bf16", queue=queue)
        x = inputs_of(rank.rank)
        if rank.rank == culprit:
            x[0, 0] = bad
        model(x).sum().backward()
        queue.close()
        return all(bool(p.grad.isfinite().all()) for p in model.parameters())

    assert run_ranks(2, work) == [False, False]
