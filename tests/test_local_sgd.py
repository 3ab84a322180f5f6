"""Local SGD: what an exchange makes of the ranks' weights, what stays local, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from contract_run import WIDTH, make_model
from ranks import Rank, run_ranks, seeded
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import thinwire.comm.local_sgd.door as door
from thinwire.comm.compress.compressors import Int8, TopK
from thinwire.comm.compress.decoded import to_dense
from thinwire.comm.compress.draw import Draw
from thinwire.comm.compress.feedback import EF
from thinwire.comm.errors import NonFiniteWeightsError
from thinwire.comm.local_sgd.door import local_sgd
from thinwire.comm.local_sgd.handle import LocalSGD

SIZE = 3
SPARSE = {"compressor": TopK(k=4, chunk=16, values="fp32"), "dense_below": 20}
DILOCO = {"outer": {"kind": "nesterov", "lr": 0.5, "momentum": 0.75}}
SPARSELOCO = {"outer": "sgd", "feedback": EF(decay=0.875), **SPARSE}


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def batch(rank: int, step: int) -> Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1000 * step + rank))


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    model(x.to(next(model.parameters()).dtype)).square().sum().backward()
    optimizer.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


def mean(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    return total * (1.0 / len(tensors))


def run(size: int, steps: int, every: int, **options: Any) -> list[dict[str, Tensor]]:
    def work(rank: Rank) -> dict[str, Tensor]:
        queue = rank.queue()
        model = make_model()
        optimizer = make_optimizer(model)
        local_sgd(model, optimizer, every=every, queue=queue, **options)
        for step in range(steps):
            train_step(model, optimizer, batch(rank.rank, step))
        queue.close()
        return weights(model)

    return run_ranks(size, work)


def reference(
    size: int, steps: int, every: int, end_round: Callable[[int, dict[str, Tensor], list[dict[str, Tensor]]], None]
) -> dict[str, Tensor]:
    """The same training, rank after rank in one thread; end_round(round, theta, weights of the ranks) moves theta."""
    models = [make_model() for _ in range(size)]
    optimizers = [make_optimizer(model) for model in models]
    theta = weights(models[0])
    for step in range(steps):
        for rank, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            train_step(model, optimizer, batch(rank, step))
        if (step + 1) % every == 0:
            end_round(step // every, theta, [weights(model) for model in models])
            for model in models:
                model.load_state_dict(theta)
    return theta


def test_plain_averaging_is_the_mean_of_the_weights() -> None:
    def end_round(_: int, theta: dict[str, Tensor], locals_: list[dict[str, Tensor]]) -> None:
        for name in theta:
            theta[name] = mean([own[name] for own in locals_])

    expected = reference(SIZE, 6, 2, end_round)
    assert all(equal(result, expected) for result in run(SIZE, 6, 2))


@pytest.mark.parametrize("bucket_mb", [25.0, 1e-4])
def test_diloco_is_torchs_nesterov_on_the_pseudo_gradient(bucket_mb: float) -> None:
    outer: dict[str, Any] = {}

    def end_round(_: int, theta: dict[str, Tensor], locals_: list[dict[str, Tensor]]) -> None:
        for name, value in theta.items():
            if name not in outer:
                parameter = nn.Parameter(value)
                outer[name] = parameter, torch.optim.SGD([parameter], lr=0.5, momentum=0.75, nesterov=True)
            parameter, optimizer = outer[name]
            parameter.grad = mean([value - own[name] for own in locals_])
            optimizer.step()

    expected = reference(SIZE, 9, 3, end_round)
    results = run(SIZE, 9, 3, bucket_mb=bucket_mb, **DILOCO)
    assert equal(results[0], results[1])
    assert equal(results[0], results[2])
    for name in expected:  # torch may fuse a multiplication and an addition, which rounds once instead of twice
        torch.testing.assert_close(results[0][name], expected[name].detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("collective", ["auto", "contributor_mean"])
def test_sparseloco_sends_the_decayed_error_with_the_pseudo_gradient(collective: str) -> None:
    compressor = SPARSE["compressor"]
    errors: dict[tuple[int, str], Tensor] = {}

    def end_round(number: int, theta: dict[str, Tensor], locals_: list[dict[str, Tensor]]) -> None:
        for name, value in theta.items():
            sent = []
            for rank, own in enumerate(locals_):
                pseudo_gradient = value - own[name]
                if value.numel() < 20:
                    sent.append(pseudo_gradient)
                    continue
                total = pseudo_gradient + errors.get((rank, name), torch.zeros_like(value)) * 0.875
                draw = Draw(0, number, name, rank)
                decoded = to_dense(compressor.decode(compressor.encode(total, draw), total.shape, draw))
                sent.append(decoded.view_as(total))
                errors[rank, name] = total - sent[-1]
            step = mean(sent)
            if collective == "contributor_mean" and value.numel() >= 20:
                step = sum(sent[1:], sent[0]) / sum((one != 0).float() for one in sent).clamp(min=1)
            theta[name] = value - step

    expected = reference(SIZE, 8, 2, end_round)
    assert all(equal(result, expected) for result in run(SIZE, 8, 2, collective=collective, **SPARSELOCO))


def test_an_outer_sgd_step_of_one_is_the_average_but_for_rounding() -> None:
    (average, *_), (sgd, *_) = run(2, 4, 2), run(2, 4, 2, outer="sgd")
    assert not equal(average, sgd)
    for name in average:
        torch.testing.assert_close(average[name], sgd[name], rtol=1e-5, atol=1e-6)


def test_between_exchanges_models_differ_and_the_agreed_weights_do_not() -> None:
    def work(rank: Rank) -> list[dict[str, Tensor]]:
        queue = rank.queue()
        model = make_model()
        optimizer = make_optimizer(model)
        method = local_sgd(model, optimizer, every=3, queue=queue, **DILOCO)
        for step in range(3):
            train_step(model, optimizer, batch(rank.rank, step))
        after_exchange = weights(model)
        for step in range(3, 5):
            train_step(model, optimizer, batch(rank.rank, step))
        own = weights(model)
        with method.agreed():
            agreed = weights(model)
        assert equal(agreed, after_exchange)
        assert equal(weights(model), own)
        assert method.metrics()["rounds"] == 1
        assert method.metrics()["step_of_round"] == 2
        assert method.metrics()["pseudo_gradient_norm"] > 0
        method.remove()
        assert equal(weights(model), agreed)
        train_step(model, optimizer, batch(rank.rank, 5))
        train_step(model, optimizer, batch(rank.rank, 6))
        queue.close()
        return [own, agreed]

    first, *others = run_ranks(SIZE, work)
    for other in others:
        assert not equal(other[0], first[0])
        assert equal(other[1], first[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_half_precision_follow_a_theta_in_fp32(dtype: torch.dtype) -> None:
    def work(rank: Rank) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        queue = rank.queue()
        model = make_model(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=2.0**-6)
        method = local_sgd(model, optimizer, every=2, queue=queue, outer={"kind": "sgd", "lr": 0.375})
        for step in range(4):
            train_step(model, optimizer, batch(rank.rank, step))
        queue.close()
        return weights(model), method.state_dict()["theta"]

    (first, theta), *others = run_ranks(SIZE, work)
    assert all(equal(first, other) for other, _ in others)
    assert equal(first, {name: value.to(dtype) for name, value in theta.items()})
    assert not equal({name: value.float() for name, value in first.items()}, theta)


def test_running_statistics_are_averaged_and_counted() -> None:
    def work(rank: Rank) -> tuple[dict[str, Tensor], Tensor]:
        queue = rank.queue()
        with seeded():
            model = nn.Sequential(nn.Linear(WIDTH, 4), nn.BatchNorm1d(4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        method = local_sgd(model, optimizer, every=1, queue=queue)
        assert method.predicted_bytes() == {}
        optimizer.zero_grad()
        model(batch(rank.rank, 0)).square().sum().backward()
        own = model[1].running_mean.clone()
        before = queue.meter.sent_bytes()
        optimizer.step()
        sent = {level: count - before.get(level, 0) for level, count in queue.meter.sent_bytes().items()}
        assert {k: v for k, v in sent.items() if v} == method.predicted_bytes()
        assert f"every step, this rank sends {sent['world']} bytes over world" in method.describe()
        queue.close()
        return dict(model.state_dict()), own

    results = run_ranks(SIZE, work)
    assert torch.equal(results[0][0]["1.running_mean"], mean([own for _, own in results]))
    assert all(equal(results[0][0], state) for state, _ in results)


@pytest.mark.parametrize("options", [{}, DILOCO, SPARSELOCO], ids=["average", "diloco", "sparseloco"])
def test_a_spoilt_round_is_told_to_all_and_remembered_by_none(options: dict[str, Any]) -> None:
    def work(rank: Rank) -> list[dict[str, Tensor]]:
        queue = rank.queue()
        model = make_model()
        optimizer = make_optimizer(model)
        method = local_sgd(model, optimizer, every=2, queue=queue, **options)
        for step in range(2):
            train_step(model, optimizer, batch(rank.rank, step))
        good, state = weights(model), method.state_dict()
        train_step(model, optimizer, batch(rank.rank, 2))
        spoilt = batch(rank.rank, 3)
        if rank.rank == 1:
            spoilt[0, 0] = float("nan")
        with pytest.raises(NonFiniteWeightsError, match="weights of rank 1 are NaN") as caught:
            train_step(model, optimizer, spoilt)
        assert caught.value.ranks == (1,)
        assert equal(weights(model), good)
        after = method.state_dict()
        assert after["step_of_round"] == 0
        assert same(after["exchange"]["feedback"], state["exchange"]["feedback"])
        assert same(after["outer"], state["outer"])
        optimizer.state.clear()
        for step in range(4, 6):
            train_step(model, optimizer, batch(rank.rank, step))
        queue.close()
        return [weights(model)]

    first, *others = run_ranks(SIZE, work)
    assert all(bool(value.isfinite().all()) for value in first[0].values())
    assert all(equal(first[0], other[0]) for other in others)


def test_ddp_keeps_gradients_local_until_removed() -> None:
    def work(rank: Rank) -> None:
        queue = rank.queue()
        model, plain = make_model(), make_model()
        wrapped = DistributedDataParallel(model, process_group=rank.group, init_sync=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        method = local_sgd(wrapped, optimizer, every=2, queue=queue)

        def gradients(trained: nn.Module, seed: int) -> dict[str, Tensor]:
            trained.zero_grad()
            trained(batch(seed, 0)).square().sum().backward()
            return {name: p.grad.clone() for name, p in getattr(trained, "module", trained).named_parameters()}

        assert equal(gradients(wrapped, rank.rank), gradients(plain, rank.rank))
        with wrapped.no_sync():
            pass
        assert equal(gradients(wrapped, rank.rank), gradients(plain, rank.rank))
        method.remove()
        averaged = gradients(wrapped, rank.rank)
        for name, value in averaged.items():
            expected = (gradients(plain, 0)[name] + gradients(plain, 1)[name]) / 2
            torch.testing.assert_close(value, expected)
        queue.close()

    run_ranks(2, work)


@pytest.mark.parametrize(
    ("inner", "silenced"), [([0, 1], False), ([0, 2], True), ([0, 1, 2], None), ([0], False), ([1, 2], None)]
)
def test_ddp_over_other_ranks_goes_on_averaging(
    inner: list[int], silenced: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 meets rank 2, whatever DDP's ranks are."""
    monkeypatch.setattr(door.dist, "get_process_group_ranks", lambda group: inner)

    class Queue:
        rank, peers = 0, (0, 2)

    class Wrapped:
        process_group = None

    if silenced is None:
        with pytest.raises(ValueError, match=r"ranks 0, 2.* same ranks"):
            door._covers(Wrapped(), Queue())  # type: ignore[arg-type]
    else:
        assert door._covers(Wrapped(), Queue()) is silenced  # type: ignore[arg-type]


def refused(match: str, enter: Callable[[nn.Module, Rank, Any], object], *, size: int = 1) -> None:
    def work(rank: Rank) -> None:
        queue = rank.queue()
        with pytest.raises(ValueError, match=match):
            enter(make_model(), rank, queue)
        queue.close()

    run_ranks(size, work)


def test_what_it_cannot_do_is_refused() -> None:
    def enter(model: nn.Module, queue: Any, **options: Any) -> LocalSGD:
        return local_sgd(model, make_optimizer(model), queue=queue, **{"every": 2, **options})

    refused("every", lambda model, _, queue: enter(model, queue, every=0))
    refused("momentum", lambda model, _, queue: enter(model, queue, outer={"kind": "nesterov", "momentum": 1.0}))
    refused("outer", lambda model, _, queue: enter(model, queue, outer="adam"))
    refused(
        "units: 'update'|feedback.units", lambda m, _, queue: enter(m, queue, feedback=EF(units="update"), **SPARSE)
    )
    refused(
        "optimizer: it does not train 2.weight",
        lambda model, _, queue: local_sgd(model, make_optimizer(model[0]), every=2, queue=queue),
    )
    by_contributors = {"collective": "contributor_mean"}
    refused("int8 sends the same", lambda m, _, queue: enter(m, queue, compressor="int8", **by_contributors))
    refused("ef21 keeps the mean", lambda m, _, queue: enter(m, queue, feedback="ef21", **SPARSE, **by_contributors))
    refused("float64", lambda model, _, queue: enter(model.double(), queue))

    def wrap(model: nn.Module, rank: Rank, **options: Any) -> DistributedDataParallel:
        return DistributedDataParallel(model, process_group=rank.group, init_sync=False, **options)

    refused("static_graph", lambda model, rank, queue: enter(wrap(model, rank, static_graph=True), queue))

    def with_hook(model: nn.Module, rank: Rank, queue: Any) -> None:
        wrapped = wrap(model, rank)
        wrapped.register_comm_hook(None, lambda state, bucket: torch.futures.Future())
        enter(wrapped, queue)

    refused("communication hook", with_hook)

    def with_other_weights(model: nn.Module, rank: Rank, queue: Any) -> None:
        with torch.no_grad():
            model[0].weight[0, 0] += rank.rank == 2
        enter(model, queue)

    refused("rank 2 begins with other parameters than rank 0", with_other_weights, size=SIZE)


def test_a_state_of_another_method_model_or_world_is_refused() -> None:
    def work(rank: Rank) -> None:
        queue = rank.queue()
        model = make_model()
        method = local_sgd(model, make_optimizer(model), every=2, queue=queue)
        state = method.state_dict()
        for wrong, match in [
            ({}, "an empty state"),
            ({**state, "size": 4}, "one of 4 ranks, and there are 1"),
            ({**state, "theta": {**state["theta"], "0.bias": torch.zeros(1)}}, "another model: theta differ in 0.bias"),
        ]:
            with pytest.raises(ValueError, match=match):
                method.load_state_dict(wrong)
        method.load_state_dict(copy.deepcopy(state))
        queue.close()

    run_ranks(1, work)


def test_int8_goes_by_two_shot_and_predicts_its_bytes() -> None:
    def work(rank: Rank) -> dict[str, Tensor]:
        queue = rank.queue()
        model = make_model()
        optimizer = make_optimizer(model)
        method = local_sgd(model, optimizer, every=1, queue=queue, compressor=Int8(), dense_below=0)
        before = queue.meter.sent_bytes()["world"]
        train_step(model, optimizer, batch(rank.rank, 0))
        assert {"world": queue.meter.sent_bytes()["world"] - before} == method.predicted_bytes()
        queue.close()
        return weights(model)

    first, *others = run_ranks(SIZE, work)
    assert all(equal(first, other) for other in others)
