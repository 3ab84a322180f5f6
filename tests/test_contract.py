"""Every method of the table in contract_rows.py, held to the rules that DESIGN.md sets for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from contract_rows import METHODS, OPENED, Row
from contract_run import Run, batch, make_model
from ranks import Rank
from torch import Tensor

from thinwire.comm.errors import NonFiniteGradientError, NonFiniteWeightsError
from thinwire.comm.method import Method, agreed_weights

SIZE = 3
every_method = pytest.mark.parametrize("row", METHODS, ids=str)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    while OPENED:
        OPENED.pop().remove()


def agreed(run: Run) -> list[Tensor]:
    """The weights that must be the same on every rank."""
    with agreed_weights(run.method):
        return run.weights()


def plain_training(steps: int, rank: int = 0) -> list[Tensor]:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.125, momentum=0.5)
    for step in range(steps):
        optimizer.zero_grad()
        model(batch(rank, step)).square().sum().backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def check_against_plain_training(row: Row, result: list[Tensor]) -> None:
    """After three steps on batches of rank 0."""
    if row.lossless:
        assert equal(result, plain_training(3))
    elif row.close:
        for ours, plain in zip(result, plain_training(3), strict=True):
            torch.testing.assert_close(ours, plain, rtol=2e-2, atol=2e-2)
    else:
        assert loss_of(result) < loss_of(list(make_model().parameters()))


def loss_of(weights: list[Tensor]) -> float:
    model = make_model()
    with torch.no_grad():
        for parameter, weight in zip(model.parameters(), weights, strict=True):
            parameter.copy_(weight)
        return sum(float(model(batch(0, step)).square().sum()) for step in range(3))


@every_method
def test_the_handle_is_a_method(row: Row) -> None:
    def work(rank: Rank) -> None:
        queue = rank.queue()
        method = row.enter(rank, queue, make_model()).method
        assert isinstance(method, Method)
        assert all(isinstance(k, str) and isinstance(v, float) for k, v in method.metrics().items())
        queue.close()

    row.run(1, work)


@every_method
def test_a_world_of_one_takes_the_plain_step(row: Row) -> None:
    def work(rank: Rank) -> list[Tensor]:
        queue = rank.queue()
        run = row.enter(rank, queue, make_model())
        for step in range(3):
            run.step(batch(0, step))
        assert sum(queue.meter.sent_bytes().values()) == 0
        queue.close()
        return run.weights()

    (result,) = row.run(1, work)
    check_against_plain_training(row, result)


@every_method
def test_the_same_batch_everywhere_gives_the_plain_step(row: Row) -> None:
    def work(rank: Rank) -> list[Tensor]:
        queue = rank.queue()
        run = row.enter(rank, queue, make_model())
        for step in range(3):
            run.step(batch(0, step))
        queue.close()
        return run.weights()

    for result in row.run(4, work):  # four: a mean of equal numbers is exact in fp32
        check_against_plain_training(row, result)


@every_method
def test_metered_bytes_are_the_predicted_ones_and_replicas_agree(row: Row) -> None:
    levels = [["self", "node", "world"], ["node", "self", "world"], ["world", "world", "self"]]

    def work(rank: Rank) -> list[Tensor]:
        queue = row.queue(rank, levels[rank.rank])
        run = row.enter(rank, queue, make_model())
        for step in range(4):
            before, told = queue.meter.sent_bytes(), queue.meter.sent_bytes("control/")
            run.step(batch(rank.rank, step))
            after, told_after = queue.meter.sent_bytes(), queue.meter.sent_bytes("control/")
            sent = {
                level: after[level] - before.get(level, 0) - told_after.get(level, 0) + told.get(level, 0)
                for level in after
            }
            assert {level: count for level, count in sent.items() if count} == run.method.predicted_bytes()
        queue.close()
        return agreed(run)

    first, *others = row.run(SIZE, work)
    assert all(equal(first, other) for other in others)
    assert not equal(first, plain_training(4))


@every_method
def test_resuming_equals_not_stopping(row: Row) -> None:
    def train(rank: Rank, stop_at: int | None) -> list[Tensor]:
        queue = rank.queue(name=f"queue-{stop_at}")
        run = row.enter(rank, queue, make_model())
        for step in range(6):
            if step == stop_at:
                saved = run.model.state_dict(), run.optimizer.state_dict(), run.method.state_dict()
                run = row.enter(rank, queue, make_model())
                run.model.load_state_dict(saved[0])
                run.optimizer.load_state_dict(saved[1])
                run.method.load_state_dict(saved[2])
            run.step(batch(rank.rank, step))
        queue.close()
        return run.weights()

    def work(rank: Rank) -> bool:
        return equal(train(rank, None), train(rank, 3))

    assert row.run(SIZE, work) == [True] * SIZE


@every_method
def test_another_number_of_ranks_goes_on_or_is_refused(row: Row) -> None:
    states: dict[int, Any] = {}

    def before(rank: Rank) -> list[Tensor]:
        queue = rank.queue()
        run = row.enter(rank, queue, make_model())
        for step in range(3):
            run.step(batch(rank.rank, step))
        states[rank.rank] = run.keep()
        queue.close()
        return run.weights()

    def after(rank: Rank) -> list[Tensor]:
        queue = rank.queue()
        run = row.enter(rank, queue, make_model())
        try:
            run.take_over(states)
        except ValueError as error:
            if "ranks" not in str(error):
                raise
        else:
            for step in range(3, 5):
                run.step(batch(rank.rank, step))
        queue.close()
        return agreed(run)

    row.run(SIZE, before)
    for size in (1, 4):
        first, *others = row.run(size, after)
        assert all(equal(first, other) for other in others)
        assert all(bool(w.isfinite().all()) for w in first)


@every_method
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_gradient_of_one_rank_shows_on_all_and_poisons_no_state(row: Row, bad: float) -> None:
    def work(rank: Rank) -> tuple[bool, bool]:
        queue = rank.queue()
        run = row.enter(rank, queue, make_model())
        run.step(batch(rank.rank, 0))
        saved = run.model.state_dict()
        saved = {name: value.clone() for name, value in saved.items()}
        x = batch(rank.rank, 1)
        if rank.rank == 1:
            x[0, 0] = bad
        try:
            run.step(x)
            gradients = [p.grad for p in run.model.parameters() if p.grad is not None]
            seen = not all(bool(g.isfinite().all()) for g in gradients) or run.method.metrics().get("absent", 0.0) > 0
        except (NonFiniteWeightsError, NonFiniteGradientError) as error:
            seen = error.ranks == (1,)
        run.model.load_state_dict(saved)
        run.optimizer.state.clear()
        run.step(batch(rank.rank, 2))
        queue.close()
        return seen, all(bool(w.isfinite().all()) for w in run.weights())

    assert row.run(SIZE, work) == [(True, True)] * SIZE


@every_method
def test_what_it_cannot_do_is_refused_before_anything_is_sent(row: Row) -> None:
    def work(rank: Rank) -> None:
        queue = rank.queue()
        with pytest.raises(ValueError, match=row.why):
            (row.cannot or row.enter)(rank, queue, make_model(torch.float64))
        assert queue.meter.snapshot()["operations"] == {}
        queue.close()

    row.run(2, work)
