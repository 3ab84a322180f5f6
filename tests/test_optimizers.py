"""Optimizers and the schedule, against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from thinwire.dist.optimizers import AdamWSettings, ScheduleSettings, SGDSettings, build_optimizer, learning_rate


def two_parameters() -> nn.Module:
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.bias.fill_(1.0)
    model.weight.grad, model.bias.grad = torch.zeros(2, 3), torch.zeros(2)
    return model


@pytest.mark.parametrize("settings", [AdamWSettings(lr=0.5, weight_decay=0.1), SGDSettings(lr=0.5, weight_decay=0.1)])
def test_weight_decay_is_decoupled_and_on_matrices_only(settings: AdamWSettings | SGDSettings) -> None:
    model = two_parameters()
    optimizer = build_optimizer(settings, model)
    for steps in range(1, 4):
        optimizer.step()
        torch.testing.assert_close(model.weight.detach(), torch.full((2, 3), 0.95**steps))
        assert (model.bias == 1).all()


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_torchs_own_but_for_the_decay(nesterov: bool) -> None:
    ours, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    a = build_optimizer(SGDSettings(lr=0.1, momentum=0.9, nesterov=nesterov), ours)
    b = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, nesterov=nesterov)
    for step in range(3):
        for x, y in zip(ours.parameters(), theirs.parameters(), strict=True):
            x.grad = torch.full_like(x, 1.0 + step)
            y.grad = x.grad.clone()
        a.step()
        b.step()
    for x, y in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(x, y)


def test_adamw_takes_a_step_of_lr_against_the_sign() -> None:
    model = two_parameters()
    model.weight.grad = torch.tensor([[1e-3, -5.0, 2.0], [1.0, 1.0, -1.0]])
    build_optimizer(AdamWSettings(lr=0.01, weight_decay=0.0), model).step()
    torch.testing.assert_close(model.weight.detach(), 1 - 0.01 * model.weight.grad.sign(), rtol=1e-5, atol=1e-6)


def test_nesterov_without_momentum_is_refused() -> None:
    with pytest.raises(ValueError, match="momentum"):
        SGDSettings(nesterov=True, momentum=0)


def test_the_schedule_warms_up_and_falls_along_a_cosine() -> None:
    schedule = ScheduleSettings(kind="cosine", warmup_steps=4, final=0.1)
    rates = [learning_rate(2.0, schedule, step, 24) for step in range(30)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0
    assert rates[14] == pytest.approx(2.0 * 0.55)  # half way down
    assert rates[9] == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2))
    assert rates[24:] == pytest.approx([0.2] * 6)
    assert rates[4:25] == sorted(rates[4:25], reverse=True)


def test_decay_steps_replace_the_length_of_the_run() -> None:
    schedule = ScheduleSettings(warmup_steps=0, decay_steps=10, final=0.0)
    assert learning_rate(1.0, schedule, 5, 1000) == pytest.approx(0.5)
    assert learning_rate(1.0, schedule, 10, 1000) == 0.0


def test_a_constant_schedule_stays() -> None:
    schedule = ScheduleSettings(kind="constant", warmup_steps=2)
    assert [learning_rate(3.0, schedule, step, 5) for step in range(5)] == [1.5, 3.0, 3.0, 3.0, 3.0]


def test_a_warmup_longer_than_the_run_never_leaves_it() -> None:
    assert learning_rate(1.0, ScheduleSettings(warmup_steps=100), 9, 10) == pytest.approx(0.1)
