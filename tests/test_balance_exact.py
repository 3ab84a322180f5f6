"""The balanced gradient of ranks, micro-batches, padding and checkpoints is that of one process with one big batch."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from balance_grid import (
    COEF,
    EXPERTS,
    TOP_K,
    Z_COEF,
    Batch,
    Checkpoint,
    Layout,
    Reference,
    Trainer,
    Way,
    big_batch,
    distance,
    make_batches,
)
from torch import Tensor
from torch_threads import TorchRank, run_torch_ranks

from thinwire.comm.balance.balance import LoadBalance
from thinwire.comm.balance.convention import Combine
from thinwire.comm.balance.functional import balance_loss, z_loss

ALLOWED = {torch.float64: 1e-12, torch.float32: 1e-6}
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
KINDS: tuple[Checkpoint, ...] = get_args(Checkpoint)
RANKS, WAYS = (1, 2, 4), get_args(Way)
PLANS = tuple(itertools.product(LAYOUTS, (1, 3)))


def cells(ranks: int, way: Way) -> list[tuple[torch.dtype, Layout, int, Checkpoint]]:
    """fp64: all. fp32: of every plan one way to checkpoint, each in turn, so that over ranks and ways all are had."""
    every = [(torch.float64, *plan, kind) for plan in PLANS for kind in KINDS]
    turn = RANKS.index(ranks) + WAYS.index(way)
    return every + [(torch.float32, *plan, KINDS[(turn + i) % 3]) for i, plan in enumerate(PLANS)]


@functools.cache
def plans(ranks: int) -> dict[tuple[torch.dtype, Layout, int], tuple[list[list[Batch]], Reference]]:
    """Every rank's micro-batches, and what they should give."""
    made = {(t, *p): make_batches(p[0], ranks, p[1], t) for t in ALLOWED for p in PLANS}
    return {plan: (batches, big_batch(batches)) for plan, batches in made.items()}


@pytest.mark.parametrize(("ranks", "way"), list(itertools.product(RANKS, WAYS)))
def test_the_gradient_is_that_of_one_big_batch(ranks: int, way: Way) -> None:
    """Of all parameters, on every rank; and one message per micro-batch, none of them in a recomputation."""
    todo, known = cells(ranks, way), plans(ranks)

    def work(rank: TorchRank) -> list[tuple[float, float]]:
        queue = rank.queue()
        convention: Combine = "sum" if way == "sum" else "mean"
        balance = LoadBalance(
            num_experts=EXPERTS, top_k=TOP_K, coef=COEF, z_coef=Z_COEF, mode="late", ranks=convention, queue=queue
        )
        trainers = {dtype: Trainer(way, dtype) for dtype in ALLOWED}
        found, messages = [], 0.0
        for dtype, layout, micro_batches, kind in todo:
            batches, reference = known[dtype, layout, micro_batches]
            trainer = trainers[dtype]
            trainer.net.balance_with(balance)
            balance.begin_step(micro_batches=micro_batches)
            error = distance(trainer.gradients(kind, batches[rank.rank], reference.tokens), reference)
            found.append((error, balance.metrics()["messages"] - messages))
            messages = balance.metrics()["messages"]
        queue.close()
        return found

    for of_rank in run_torch_ranks([ranks], work):
        for cell, (error, messages) in zip(todo, of_rank, strict=True):
            assert error <= ALLOWED[cell[0]], cell
            assert messages == cell[2], cell


def of_mean(mine: int, reference: Reference, ranks: int, units: int) -> float:
    """Every micro-batch divides by its own tokens, and the mean is taken over micro-batches and ranks."""
    return mine * units


def without_ranks(mine: int, reference: Reference, ranks: int, units: int) -> float:
    """The batch's number of tokens, though the ranks' gradients are averaged once more."""
    return reference.tokens


def right(mine: int, reference: Reference, ranks: int, units: int) -> float:
    """So that the mean over ranks is a sum over tokens, divided by their number."""
    return reference.tokens / ranks


@pytest.mark.parametrize(
    ("tokens", "least", "most"),
    [(right, 0.0, ALLOWED[torch.float64]), (of_mean, 0.01, 10.0), (without_ranks, 0.1, 10.0)],
)
def test_the_function_is_as_exact_and_the_usual_wrong_divisors_fail_the_same_check(
    tokens: Callable[[int, Reference, int, int], float], least: float, most: float
) -> None:
    """The mean of means, and the one that divides by all ranks' tokens and then averages over ranks."""
    ranks, units = 4, 3
    batches = make_batches("ragged", ranks, units, torch.float64)
    reference = big_batch(batches)

    def work(rank: TorchRank) -> float:
        trainer = Trainer("ddp")
        seen: list[tuple[int, Tensor]] = []

        def listen(layer: str, logits: Tensor, selected: Tensor, valid: Tensor | None) -> Tensor:
            seen.append((int(layer), logits))
            return logits

        def loss(place: int) -> Tensor:
            terms = torch.zeros((), dtype=torch.float64)
            for layer, logits in seen[-2:]:
                count = tokens(len(logits), reference, ranks, units)
                terms = terms + COEF * balance_loss(logits, reference.fractions[layer], tokens=count)
                terms = terms + Z_COEF * z_loss(logits, tokens=count)
            return terms

        trainer.net.balance_with(listen)
        mine: list[Batch] = batches[rank.rank]
        return distance(trainer.gradients("none", mine, reference.tokens, loss), reference)

    for error in run_torch_ranks([ranks], work):
        assert least <= error <= most


def test_the_wrong_convention_fails_the_same_check() -> None:
    """ranks="sum" under a trainer that averages: the balancing loss is too small by the number of ranks."""
    batches = make_batches("even", 2, 1, torch.float64)
    reference = big_batch(batches)

    def work(rank: TorchRank) -> float:
        trainer, queue = Trainer("ddp"), rank.queue()
        balance = LoadBalance(num_experts=EXPERTS, top_k=TOP_K, coef=COEF, mode="late", ranks="sum", queue=queue)
        trainer.net.balance_with(balance)
        error = distance(trainer.gradients("none", batches[rank.rank], reference.tokens), reference)
        queue.close()
        return error

    assert min(run_torch_ranks([2], work)) > 0.01
