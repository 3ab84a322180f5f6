"""What becomes of the optimizer's memory when all machines take the global average as their weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from thinwire.comm.gossip.agent import Agent
from thinwire.comm.gossip.port import Script
from thinwire.comm.gossip.replica import local

OptimizerStatePolicy: TypeAlias = Literal["keep", "reset", "mix"]


class OptimizerState:
    """Keeps, forgets or averages the memory of an optimizer.

    keep: each machine's momentum goes on, and its next step kicks it off the average a little. reset: it begins at
    nothing. mix: tensors of a parameter's shape are averaged as the weights are, with as many bytes each; numbers such
    as Adam's count of steps are not.

    Args:
        parameters: in an order that is the same on all machines.
    """

    def __init__(self, optimizer: Optimizer, policy: OptimizerStatePolicy, parameters: Sequence[Tensor]) -> None:
        self._optimizer = optimizer
        self._policy = policy
        self._parameters = parameters

    @torch.no_grad()
    def merged(self, agent: Agent, at: int) -> Script[None]:
        """The weights have just been merged."""
        if self._policy == "reset":
            self._optimizer.state.clear()
        tensors = self._tensors() if self._policy == "mix" else []
        if not tensors:
            return
        flat = torch.cat([local(tensor).reshape(-1).to(torch.float32) for tensor in tensors])
        mean = (yield from agent.average_of(flat, at)).value
        for tensor, part in zip(tensors, mean.split([local(t).numel() for t in tensors]), strict=True):
            local(tensor).copy_(part.view(local(tensor).shape))

    def _tensors(self) -> list[Tensor]:
        """By parameter, then by name."""
        found = []
        for parameter in self._parameters:
            for name, value in sorted(self._optimizer.state.get(parameter, {}).items()):
                if isinstance(value, Tensor) and value.shape == parameter.shape and name != "step":
                    found.append(value)
        return found
