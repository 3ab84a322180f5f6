"""Algorithms in rounds behind the door: real models, torch's optimizers, ranks."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pytest
import torch
from ranks import Rank, run_ranks
from torch import Tensor, nn

from thinwire.comm.gossip.door import gossip


def model_of(seed: int) -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    chance = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4, generator=chance)
    return model


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        (torch.optim.AdamW, r"optimizer: AdamW, but method\.algorithm: decentlam corrects the step"),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5), r"optimizer: .*dampening \[0\.5\], but"),
        (
            lambda p: torch.optim.SGD([{"params": p[:1], "lr": 0.2}, {"params": p[1:]}], lr=0.1),
            r"learning rates \[0\.2, 0\.1\].*make these the same, or use algorithm: dpsgd",
        ),
    ],
    ids=["another optimizer", "dampening", "two learning rates"],
)
def test_decentlam_refuses_optimizers_whose_step_it_cannot_correct(optimizer: Any, said: str) -> None:
    def work(rank: Rank) -> None:
        model = model_of(0)
        with closing(rank.queue()) as queue, pytest.raises(ValueError, match=said):
            gossip(optimizer(list(model.parameters())), model=model, queue=queue, algorithm="decentlam")

    run_ranks(2, work)


def test_variance_correction_lets_machines_begin_unlike_and_others_do_not() -> None:
    def work(rank: Rank) -> tuple[Tensor, Tensor]:
        model = model_of(rank.rank)
        before = model[0].weight.detach().clone()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with closing(rank.queue()) as queue:
            with pytest.raises(ValueError, match="begin with other parameters"):
                gossip(optimizer, model=model, queue=queue, graph="complete", algorithm="dpsgd")
            method = gossip(optimizer, model=model, queue=queue, graph="complete", algorithm="variance_corrected")
            model(torch.ones(2, 6)).sum().backward()
            optimizer.step()
            method.remove()
        return before, model[0].weight.detach()

    before, after = (torch.stack(part) for part in zip(*run_ranks(4, work), strict=True))
    spread = before.view(4, -1).var(dim=1).mean()
    assert torch.allclose(after.view(4, -1).var(dim=1), spread, rtol=1e-5)
    assert float(before.mean(0).var() / spread) < 0.5  # of the plain average
    assert torch.allclose(after.view(4, -1).mean(1), before.mean(), atol=1e-7)
