"""A model whose rows two ranks cannot share equally, trained under partition(), and by one process that sees all."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from torch_threads import TorchRank

from thinwire.comm.partition.door import partition
from thinwire.comm.partition.optimizer import PartitionedOptimizer

SGD = torch.optim.SGD


class Net(nn.Module):
    """Three blocks with rows that two ranks cannot share equally; blocks in `skipped` are not run."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(3))
        self.last = nn.Linear(5, 3)
        self.skipped: tuple[int, ...] = ()
        self.checkpointed = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for index, block in enumerate(self.blocks):
            if index in self.skipped:
                continue
            change = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
            assert isinstance(change, Tensor)
            x = x + change
        return self.last(x)  # type: ignore[no-any-return]


def net(seed: int = 0) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net()


START = net()  # ranks are threads, and share torch's random numbers


def batch(rank: int, step: int) -> Tensor:
    return torch.randn(4, 4, generator=torch.Generator().manual_seed(100 * step + rank))


def backward(model: nn.Module, rank: int, step: int, share: float = 1.0) -> None:
    (model(batch(rank, step)).float().square().mean() * share).backward()


def enter(place: TorchRank, model: nn.Module, optimizer: Any = SGD, **options: Any) -> PartitionedOptimizer:
    levels = [
        SimpleNamespace(name=name, size=place.levels.size(depth)) for depth, name in enumerate(place.levels.names, 1)
    ]
    mesh = SimpleNamespace(
        rank=place.rank, levels=levels, order=range(place.size), named={level.name: level for level in levels}
    )
    queue = options.pop("queue", None) or place.queue()
    everything = {"params": "world", "grads": "world", "optim": "world", "lr": 0.25}
    return partition(model, mesh, optimizer, queue=queue, **everything | options)


def reference(size: int, steps: int, optimizer: Any = SGD, model: nn.Module | None = None, **options: Any) -> Any:
    """One process that sees all ranks' batches."""
    model = model or copy.deepcopy(START)
    inner = optimizer(model.parameters(), **{"lr": 0.25} | options)
    for step in range(steps):
        inner.zero_grad()
        for rank in range(size):
            backward(model, rank, step, 1 / size)
        inner.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def whole(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, p in model.named_parameters():
        assert isinstance(p, DTensor)
        found[name] = p.full_tensor().detach().clone()
    return found


def close(found: dict[str, Tensor], expected: dict[str, Tensor], within: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].float(), value.float(), rtol=within, atol=within)


def train(place: TorchRank, model: nn.Module, optimizer: PartitionedOptimizer, steps: int) -> None:
    for step in range(steps):
        backward(model, place.rank, step)
        optimizer.step()
