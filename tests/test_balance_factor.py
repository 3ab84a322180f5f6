"""What the trainer does to gradients is measured, and said where the settings say something else."""

from __future__ import annotations

import functools
import re
from typing import Any, get_args

import pytest
import torch
from balance_grid import EXPERTS, TOP_K, Checkpoint, Net, Trainer, Way, alone, make_batches, make_net
from ranks import Rank, run_ranks
from torch import nn
from torch_threads import TorchRank, run_torch_ranks

from thinwire.comm.balance.balance import LoadBalance
from thinwire.comm.balance.convention import Combine, Convention
from thinwire.comm.balance.factor_check import Reading, diagnose


def accumulate(net: nn.Module, passes: int, scale: float = 1.0) -> None:
    """Gradients of so many micro-batches."""
    net.zero_grad()
    for x, valid in make_batches("even", 1, passes, torch.float32)[0]:
        (net(x, valid).square().sum() * scale).backward()


@pytest.mark.parametrize("way", ["ddp", "fsdp2", "sum"])
def test_ranks(way: Way) -> None:
    """The right setting passes on every rank, also where it holds no part of the parameter; the wrong one is told."""
    right: Combine = "sum" if way == "sum" else "mean"
    wrong: Combine = "mean" if way == "sum" else "sum"
    cases: list[tuple[Combine, Checkpoint]] = [(right, kind) for kind in get_args(Checkpoint)]

    def work(rank: TorchRank) -> list[str]:
        trainer, queue = Trainer(way, torch.float32), rank.queue()
        batches = make_batches("ragged", 4, 2, torch.float32)[rank.rank]
        told = []
        for ranks, kind in [*cases, (wrong, "none")]:
            balance = LoadBalance(num_experts=EXPERTS, top_k=TOP_K, coef=0.1, micro_batches=2, ranks=ranks, queue=queue)
            trainer.net.balance_with(balance)
            try:
                balance.check_factor(trainer.net.layers[0], functools.partial(trainer.gradients, kind, batches, 100))
                told.append("right")
            except ValueError as error:
                told.append(str(error))
            assert balance.metrics()["messages"] == 0
        queue.close()
        return told

    factor = "4" if way == "sum" else "0.25"
    advice = f"balance: the trainer makes {factor} of a balancing gradient that should be 1; set ranks='{right}'"
    for of_rank in run_torch_ranks([4], work):
        assert of_rank == ["right"] * 3 + [advice]


def test_gradients_that_were_not_reduced_are_told_from_a_mean() -> None:
    """Each rank's own gradient, times the number of ranks, would pass for the mean of equal ones."""

    def work(rank: Rank) -> str:
        net = make_net(torch.float32)
        balance = LoadBalance(num_experts=EXPERTS, top_k=TOP_K, coef=0.1, queue=rank.queue())
        net.balance_with(balance)
        with pytest.raises(ValueError, match="no_sync") as caught:
            balance.check_factor(net.layers[1].router, lambda: accumulate(net, 1))
        return str(caught.value)

    assert all("of a sum of 1 they see 0.6667, 1.333;" in text for text in run_ranks(2, work))


def test_accumulation() -> None:
    """A trainer that divides gradients by their number; one that divides only its loss changes nothing."""
    for accumulation, passes in (("mean", True), ("sum", False)):
        balance, net = alone(torch.float32, micro_batches=4, accumulation=accumulation)

        def divided(net: Net = net) -> None:
            accumulate(net, 4)
            for parameter in net.parameters():
                assert parameter.grad is not None
                parameter.grad /= 4

        if passes:
            balance.check_factor(net.layers[0], divided)
        else:
            balance.check_factor(net.layers[0], functools.partial(accumulate, net, 4, 1 / 4))
            with pytest.raises(ValueError, match=r"makes 0\.25 of .* set accumulation='mean'$"):
                balance.check_factor(net.layers[0], divided)


def test_a_scaled_loss() -> None:
    """As GradScaler has it: the scale is measured where the setting is missing, and so are gradients left scaled."""
    for given in (True, False):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        balance, net = alone(torch.float32, loss_scale=scaler.get_scale if given else None)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

        def step(unscale: bool, net: Net = net, scaler: Any = scaler, optimizer: Any = optimizer) -> None:
            net.zero_grad()
            x, _ = make_batches("even", 1, 1, torch.float32)[0][0]
            scaler.scale(net(x, None).square().sum()).backward()
            if unscale:
                scaler.unscale_(optimizer)
                scaler.update()

        if given:
            balance.check_factor(net.layers[0].router, functools.partial(step, True))
            with pytest.raises(ValueError, match="unscale gradients at the end of forward_backward"):
                balance.check_factor(net.layers[0].router, functools.partial(step, False))
        else:
            with pytest.raises(ValueError, match=r"divided by 4096 .* loss_scale=scaler\.get_scale"):
                balance.check_factor(net.layers[0].router, functools.partial(step, True))


def test_what_cannot_be_measured() -> None:
    """Each says what to do, and the balance goes on as before."""
    balance, net = alone(torch.float32, micro_batches=2)
    router = net.layers[0].router
    with pytest.raises(ValueError, match="ran 1 backward passes through the router on rank 0; set micro_batches"):
        balance.check_factor(router, lambda: accumulate(net, 1))
    with pytest.raises(ValueError, match="no parameter that is trained"):
        balance.check_factor(nn.Identity(), lambda: accumulate(net, 2))
    with pytest.raises(ValueError, match=r"left no gradient in the router's weight; .*safe_get_full_grad"):
        balance.check_factor(router, net.zero_grad)
    with pytest.raises(ValueError, match="NaN or infinite"):
        balance.check_factor(router, lambda: accumulate(net, 2, float("nan")))

    def clipped() -> None:
        accumulate(net, 2)
        nn.utils.clip_grad_value_(net.parameters(), 2.0)

    with pytest.raises(ValueError, match="not do the same to all entries"):
        balance.check_factor(router, clipped)
    compiled: Any = torch.compile(net, backend="eager")
    accumulate(compiled, 2)
    with pytest.raises(ValueError, match=r"ran 0 backward .* check before torch\.compile\(\)"):
        balance.check_factor(router, lambda: accumulate(compiled, 2))
    balance.check_factor(router, lambda: accumulate(net, 2))
    messages = balance.metrics()["messages"]
    accumulate(net, 2)
    assert balance.metrics()["messages"] == messages + 1
    balance.check_factor(router, lambda: accumulate(net, 2), gradient=lambda p: p.grad)


@pytest.mark.parametrize(
    ("convention", "factor", "advice"),
    [
        (Convention("mean", "sum"), 2.0, "set ranks='sum'"),
        (Convention("sum", "mean"), 1 / 2, "set ranks='mean'"),
        (Convention("mean", "mean"), 6.0, "set ranks='sum', accumulation='sum'"),
        (Convention("sum", "mean"), 3 / 2, "set ranks='mean', accumulation='sum'"),
        (Convention("mean", "sum"), 0.0, "not clear it"),
        (Convention("mean", "sum"), 1 / 100, "set loss_scale=lambda: 100,"),
        (Convention("mean", "sum", lambda: 7.0), 1 / 3, "set accumulation='mean'"),
    ],
)
def test_advice(convention: Convention, factor: float, advice: str) -> None:
    """Two ranks, three micro-batches: the change of settings that makes the factor 1."""
    with pytest.raises(ValueError, match=re.escape(advice)):
        diagnose([Reading(factor, 0.0, 3)] * 2, convention, 3)


def test_advice_names_both_settings_that_would_do() -> None:
    """Two ranks and two micro-batches: a half may be missing for either reason."""
    with pytest.raises(ValueError, match=re.escape("set ranks='mean' or accumulation='mean'")):
        diagnose([Reading(0.5, 0.0, 2)] * 2, Convention("sum", "sum"), 2)
