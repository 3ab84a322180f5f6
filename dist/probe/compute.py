"""How long a rank computes for one step of a run, and how fast it multiplies, while all ranks do the same."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch.optim import Optimizer

from thinwire.dist.onebyte_run import OneByteRunSettings
from thinwire.dist.optimizers import build_optimizer
from thinwire.dist.plan.cluster import ComputeSpeed
from thinwire.dist.plan.prediction import compute_digest
from thinwire.dist.probe.clock import Lockstep, now
from thinwire.dist.task import Task, computing

if TYPE_CHECKING:
    from thinwire.dist.config import RunConfig

_FEWEST, _MOST = 3, 20  # steps that count
_WIDTHS = {"cpu": (512, torch.float32), "cuda": (4096, torch.bfloat16)}  # of matrix products, and their dtype


def measure_compute(lockstep: Lockstep, config: RunConfig, task: Task, seconds: float) -> ComputeSpeed:
    """Train a copy of nothing: steps of one micro-batch each, of which nothing is sent or kept. Collective.

    The seconds are those of the slowest rank, in the median of the steps; its stages have the mean share of each.

    Args:
        task: the run's model and data. Its weights are not what they were afterwards.
        seconds: for all steps together; three are done in any case, and one before them to warm up.
    Raises:
        ValueError: the global batch cannot be shared by so many ranks.
    """
    micro_batch, _ = config.train.share(lockstep.queue.size)
    forward_only = isinstance(config.method, OneByteRunSettings)
    optimizer = None if forward_only else build_optimizer(config.optimizer, task.network)
    step = _Step(config, task, optimizer, micro_batch, lockstep.device)
    lockstep.wait()
    first_s = lockstep.slowest(sum(step()))
    count = max(_FEWEST, min(_MOST, int(seconds / max(first_s, 1e-9))))
    stages: list[float] = []
    for _ in range(count):
        lockstep.wait()
        stages += step()
    rows = lockstep.share(stages)
    each = [[sum(row[3 * i : 3 * i + 3]) for row in rows] for i in range(count)]
    whole_s = statistics.median(max(ranks) for ranks in each)
    total = sum(map(sum, rows))
    shares = [sum(sum(row[stage::3]) for row in rows) / total for stage in range(3)]
    return ComputeSpeed(
        config=compute_digest(config, micro_batch),
        micro_batch=micro_batch,
        forward_s=whole_s * shares[0],
        backward_s=whole_s * shares[1],
        optimizer_s=whole_s * shares[2],
    )


def measure_flops(lockstep: Lockstep, seconds: float) -> float:
    """Multiplications and additions per second of the slowest rank's matrix products: fp32 on a CPU, bf16 on a GPU."""
    width, dtype = _WIDTHS[lockstep.device.type]
    left, right = (torch.randn(width, width, device=lockstep.device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)

    def multiply(count: int) -> Callable[[], None]:
        def run() -> None:
            for _ in range(count):
                torch.mm(left, right, out=out)

        return run

    first_s = lockstep.time(multiply(1), 2)[-1]
    count = max(1, int(seconds / 3 / max(first_s, 1e-6)))
    taken_s = statistics.median(lockstep.time(multiply(count), 3))
    return 2 * width**3 * count / taken_s


class _Step:
    """One micro-batch and the optimizer; returns the seconds of forward, backward and optimizer."""

    def __init__(
        self, config: RunConfig, task: Task, optimizer: Optimizer | None, micro_batch: int, device: torch.device
    ) -> None:
        self._config = config
        self._task = task
        self._optimizer = optimizer
        self._micro_batch = micro_batch
        self._device = device

    def __call__(self) -> list[float]:
        began = now(self._device)
        batch = self._task.data.training_batch(range(self._micro_batch), self._device)
        precision = computing(self._config.train.precision, self._device)
        with torch.set_grad_enabled(self._optimizer is not None), precision:
            scores = self._task.model(batch.inputs)
            loss = F.cross_entropy(scores.flatten(0, -2), batch.targets.flatten())
        forward = now(self._device)
        if self._optimizer is None:
            return [forward - began, 0.0, 0.0]
        loss.backward()
        backward = now(self._device)
        parameters = [p for p in self._task.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self._config.train.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, self._config.train.clip_norm, norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return [forward - began, backward - forward, now(self._device) - backward]
