"""One rank's training run in the contract table, and how its state is kept and taken over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from ranks import seeded
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from thinwire.comm.method import Method

WIDTH = 12


def make_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    with seeded():
        return nn.Sequential(nn.Linear(WIDTH, 7), nn.Tanh(), nn.Linear(7, 5)).to(dtype)


def batch(rank: int, step: int) -> Tensor:
    """Small integers over 8: gradients whose sums over three ranks are not exact, as in life."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randint(-8, 9, (4, WIDTH), generator=generator) / 8


@dataclass
class Run:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    method: Method
    step: Callable[[Tensor], None]

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]

    def keep(self) -> tuple[Any, Any]:
        """The states of model and method, to be taken over by any number of ranks."""
        return self.model.state_dict(), self.method.state_dict()

    def take_over(self, states: Mapping[int, tuple[Any, Any]]) -> None:
        """What keep() gave on each of the old ranks.

        Raises: ValueError: the method cannot go on with another number of ranks, and says so.
        """
        self.model.load_state_dict(states[0][0])
        self.method.load_state_dict({"all_ranks": [states[rank][1] for rank in sorted(states)]})


class ShardedRun(Run):
    """Of a model whose parameters are DTensors. Each method here is collective."""

    def weights(self) -> list[Tensor]:
        return [whole(p.detach()) for p in self.model.parameters()]

    def keep(self) -> tuple[Any, Any]:
        model, method = super().keep()
        return tree_map_only(DTensor, whole, model), tree_map_only(DTensor, whole, method)

    def take_over(self, states: Mapping[int, tuple[Any, Any]]) -> None:
        model, method = states[0]  # whole, so the same on every rank
        own = self.model.state_dict()
        self.model.load_state_dict(
            {
                name: distribute_tensor(model[name], shard.device_mesh, shard.placements, src_data_rank=None)
                for name, shard in own.items()
            }
        )
        self.method.load_state_dict(method)


def whole(tensor: Tensor) -> Tensor:
    return cast(DTensor, tensor).full_tensor().clone()
