"""Training over quantised wires, with FSDP2 and all: near fp32, the same bits on every replica, no state poisoned."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch_threads import TorchRank, run_torch_ranks

from thinwire.comm.errors import NonFiniteGradientError
from thinwire.comm.partition.door import partition

STEPS, REFUSED = 6, 3
NEAREST: dict[str, Any] = {
    "gradients": {"node": {"kind": "int8", "smooth": True}, "world": {"kind": "int4", "feedback": True}},
    "update": "difference",
}
STOCHASTIC: dict[str, Any] = {
    "gradients": {"world": {"kind": "int4", "rounding": "stochastic", "feedback": True}},
    "update": {"kind": "difference", "bits": 8, "rounding": "stochastic"},
    "gather": "int8",
    "weights": "bf16",
    "compute_dtype": torch.bfloat16,
}
REPLICAS = {**NEAREST, "params": "rank", "grads": "node", "optim": "node", "update": "int8"}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 33)
        self.blocks = nn.ModuleList([nn.Linear(33, 33), nn.Linear(33, 33)])
        self.last = nn.Linear(33, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        found: Tensor = self.last(x)
        return found


def train(rank: TorchRank, model: nn.Module, options: dict[str, Any], *, refuse: bool = False) -> tuple[Tensor, Tensor]:
    """Losses by step, and the weights as this rank sees them."""
    queue = rank.queue()
    mesh = init_device_mesh("cpu", (2, rank.size // 2), mesh_dim_names=("world", "node"))
    model = copy.deepcopy(model)
    optimizer = partition(model, mesh, torch.optim.AdamW, queue=queue, lr=1e-2, foreach=True, **options)
    losses = []

    def backward(step: int, spoil: float = 1.0) -> float:
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(10 * step + rank.rank))
        loss = (model(x * spoil).float() - (2 * x[:, :4]).sin()).square().mean()
        loss.backward()
        return loss.item()

    for step in range(STEPS):
        if refuse and step == REFUSED:
            backward(99, float("nan") if rank.rank == 1 else 1.0)
            with pytest.raises(NonFiniteGradientError) as caught:
                optimizer.step()
            assert caught.value.ranks == (1,)
        losses.append(backward(step))
        optimizer.step()
    sent = queue.meter.sent_bytes("partition")
    predicted = {level: count * STEPS for level, count in optimizer.predicted_bytes().items()}
    if not refuse:
        assert sent == predicted
    weights = torch.cat([p.full_tensor().reshape(-1).float() for p in model.parameters()])
    optimizer.remove()
    return torch.tensor(losses), weights


WAYS: dict[str, dict[str, Any]] = {"fp32": {}, "nearest": NEAREST, "stochastic": STOCHASTIC, "replicas": REPLICAS}


@pytest.fixture(scope="module")
def runs() -> dict[str, list[tuple[Tensor, Tensor]]]:
    """What every rank has of every way to train; "refused" is "nearest" with a step that is refused."""
    torch.manual_seed(5)
    model = Net()

    def work(rank: TorchRank) -> dict[str, tuple[Tensor, Tensor]]:
        found = {name: train(rank, model, options) for name, options in WAYS.items()}
        return found | {"refused": train(rank, model, NEAREST, refuse=True)}

    ranks = run_torch_ranks([2, 4], work)
    return {name: [one[name] for one in ranks] for name in ranks[0]}


@pytest.mark.parametrize("way", ["nearest", "stochastic", "replicas"])
def test_near_fp32_with_equal_replicas(way: str, runs: dict[str, list[tuple[Tensor, Tensor]]]) -> None:
    exact, quantised = (torch.stack([losses for losses, _ in runs[name]]).mean(0) for name in ("fp32", way))
    assert exact[-1] < 0.8 * exact[0]
    torch.testing.assert_close(quantised, exact, rtol=0.03, atol=0)
    assert not torch.equal(quantised, exact)
    assert all(torch.equal(weights, runs[way][0][1]) for _, weights in runs[way])


def test_a_refused_step_leaves_nothing_behind(runs: dict[str, list[tuple[Tensor, Tensor]]]) -> None:
    """Not in weights, masters, moments or error memories: what follows is what would have been, bit for bit."""
    for plain, refused in zip(runs["nearest"], runs["refused"], strict=True):
        assert torch.equal(plain[0], refused[0])
        assert torch.equal(plain[1], refused[1])


def test_weights_that_reach_no_other_rank_are_not_rounded() -> None:
    """Formats of gathers where every rank has all weights, and of updates where owners have them already."""
    torch.manual_seed(5)
    model = Net()
    whole = {"params": "rank", "grads": "world", "optim": "world"}
    owned = {"params": "world", "grads": "world", "optim": "world"}

    def work(rank: TorchRank) -> list[Tensor]:
        ways = [whole, {**whole, "gather": "int8"}, owned, {**owned, "update": "difference"}]
        return [train(rank, model, way)[1] for way in ways]

    for plain, gathered, kept, updated in run_torch_ranks([2], work):
        assert torch.equal(plain, gathered)
        assert torch.equal(kept, updated)
