"""The gradient of a machine that trains for itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer
from torch.profiler import record_function

from thinwire.dist.data import shard
from thinwire.dist.optimizers import learning_rate
from thinwire.dist.task import TaskData, computing

if TYPE_CHECKING:
    from thinwire.dist.config import RunConfig


class LocalStep:
    """What a machine computes by itself at a step, in a run over a network as in its simulation.

    Args:
        model, optimizer: this machine's own.
        rank, size: which share of the global batch is its own.
    Raises:
        ValueError: the global batch cannot be shared so.
    """

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        optimizer: Optimizer,
        data: TaskData,
        *,
        rank: int,
        size: int,
        device: torch.device,
    ) -> None:
        self.micro_batch, self.micro_batches = config.train.share(size)
        self._config = config
        self._model = model
        self._optimizer = optimizer
        self._data = data
        self._rank = rank
        self._size = size
        self._device = device

    def gradient(self, step: int) -> tuple[float, float]:
        """Leave the gradient of the share's mean loss, clipped, in the parameters; set the step's learning rate.

        Returns: the mean loss, and the gradient's norm before it was clipped; either may be infinite or nan.
        """
        train = self._config.train
        lr = learning_rate(self._config.optimizer.lr, self._config.schedule, step, train.steps)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        samples = shard(step, train.global_batch, self._rank, self._size)
        total = 0.0
        for i in range(self.micro_batches):
            part = samples[i * self.micro_batch : (i + 1) * self.micro_batch]
            batch = self._data.training_batch(part, self._device)
            with record_function("forward"), computing(train.precision, self._device):
                scores = self._model(batch.inputs)
                loss = F.cross_entropy(scores.flatten(0, -2), batch.targets.flatten()) / self.micro_batches
            with record_function("backward"):
                loss.backward()
            total += float(loss.detach())
        parameters = [p for p in self._model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if train.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, train.clip_norm, norm)
        return total, float(norm)
