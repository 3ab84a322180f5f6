"""How long a rank computes for one step of a run, and how fast it multiplies, while all ranks do the same."""

# No `from __future__ import annotations` here: DDP reads the hook's annotations and refuses strings.
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from thinwire.comm.queue import CommQueue, Pending
from thinwire.dist.engine.ddp import DDPSettings, wrap_ddp
from thinwire.dist.onebyte_run import OneByteRunSettings
from thinwire.dist.optimizers import build_optimizer
from thinwire.dist.plan.cluster import ComputeSpeed
from thinwire.dist.plan.prediction import compute_digest
from thinwire.dist.probe.clock import Lockstep, now
from thinwire.dist.task import Task, computing

if TYPE_CHECKING:
    from thinwire.dist.config import RunConfig

_FEWEST, _MOST = 5, 20  # steps that count
_WIDTHS = {"cpu": (512, torch.float32), "cuda": (4096, torch.bfloat16)}  # of matrix products, and their dtype


def measure_compute(lockstep: Lockstep, config: "RunConfig", task: Task, seconds: float) -> ComputeSpeed:
    """Train a copy of nothing: steps of one micro-batch each, of which nothing is sent or kept. Collective.

    In DistributedDataParallel over this rank alone, whose buckets cost what they do in a run; then again with a meeting
    of all ranks for each bucket, and forward alone. The seconds are those of the slowest rank, in the median of the
    steps; its stages have the mean share of each.

    Args:
        task: the run's model and data. Its weights are not what they were afterwards.
        seconds: for all steps together; five of each kind are done in any case, and one before them to warm up.
    Raises:
        ValueError: the global batch cannot be shared by so many ranks.
    """
    micro_batch, _ = config.train.share(lockstep.queue.size)
    forward = _Step(config, task, task.model, None, micro_batch, lockstep.device)
    if isinstance(config.method, OneByteRunSettings):
        (forward_s,) = _timed(lockstep, [forward], seconds)
        return _speed(config, micro_batch, forward_s, forward_alone_s=_median(forward_s))
    settings = config.engine if isinstance(config.engine, DDPSettings) else DDPSettings()
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    assert isinstance(alone, ProcessGroup)
    wrapped = wrap_ddp(task.model, settings, alone)
    meetings = _Meetings(lockstep.queue, lockstep.device)
    wrapped.register_comm_hook(meetings, _meet)
    optimizer = build_optimizer(config.optimizer, task.network)
    step = _Step(config, task, wrapped, optimizer, micro_batch, lockstep.device, meetings)
    meeting_s = statistics.median(lockstep.time(meetings.one, _FEWEST))
    alone_s, together_s, forward_s = _timed(lockstep, [meetings.without(step), meetings.within(step), forward], seconds)
    coupled_s = max(0.0, _median(together_s) - meeting_s - _median(alone_s))
    return _speed(config, micro_batch, alone_s, coupled_s=coupled_s, forward_alone_s=_median(forward_s))


Stages: TypeAlias = list[list[list[float]]]
"""Seconds of each stage, by repetition and by rank."""


def _timed(lockstep: Lockstep, steps: Sequence[Callable[[], list[float]]], seconds: float) -> list[Stages]:
    """Of each kind of step, which take turns: what else the machine does hits all alike."""
    lockstep.wait()
    first_s = lockstep.slowest(sum(sum(step()) for step in steps))
    count = max(_FEWEST, min(_MOST, int(seconds / max(first_s, 1e-9))))
    taken: list[list[float]] = [[] for _ in steps]
    for _ in range(count):
        for step, before in zip(steps, taken, strict=True):
            lockstep.wait()
            before.extend(step())
    rows = [lockstep.share(kind) for kind in taken]
    return [[[row[3 * i : 3 * i + 3] for row in ranks] for i in range(count)] for ranks in rows]


def _median(stages: Stages) -> float:
    """Seconds of the slowest rank's step."""
    return statistics.median(max(map(sum, ranks)) for ranks in stages)


def _speed(
    config: "RunConfig", micro_batch: int, stages: Stages, *, coupled_s: float = 0.0, forward_alone_s: float
) -> ComputeSpeed:
    """The median step, of which each stage has its mean share."""
    sums = [sum(each[stage] for ranks in stages for each in ranks) for stage in range(3)]
    forward_s, backward_s, optimizer_s = (_median(stages) * each / sum(sums) for each in sums)
    return ComputeSpeed(
        config=compute_digest(config, micro_batch),
        micro_batch=micro_batch,
        forward_s=forward_s,
        backward_s=backward_s,
        optimizer_s=optimizer_s,
        coupled_s=coupled_s,
        forward_alone_s=forward_alone_s,
    )


class _Meetings:
    """Lets the ranks wait for one another over a byte, where a run would exchange a bucket."""

    def __init__(self, queue: CommQueue, device: torch.device) -> None:
        self._is_open = False
        self._queue = queue
        self._byte = torch.zeros(1, dtype=torch.uint8, device=device)
        self._begun: list[Pending[Tensor]] = []

    def within(self, step: "_Step") -> Callable[[], list[float]]:
        """The step with them."""
        return partial(self._run, step, True)

    def without(self, step: "_Step") -> Callable[[], list[float]]:
        """The step of a rank that waits for nobody."""
        return partial(self._run, step, False)

    def begin(self) -> None:
        """Of one bucket, behind the rest of the backward pass."""
        if self._is_open:
            self._begun.append(self._queue.submit("probe/meet", lambda channel: channel.all_gather_same(self._byte)))

    def end(self) -> None:
        """Wait for those of all buckets."""
        for pending in self._begun:
            pending.wait()
        self._begun.clear()

    def one(self) -> None:
        """What a meeting takes where all come at once."""
        self._queue.submit("probe/meet", lambda channel: channel.all_gather_same(self._byte)).wait()

    def _run(self, step: "_Step", is_open: bool) -> list[float]:
        self._is_open = is_open
        return step()


def _meet(meetings: _Meetings, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    meetings.begin()
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


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
        self,
        config: "RunConfig",
        task: Task,
        model: nn.Module,
        optimizer: Optimizer | None,
        micro_batch: int,
        device: torch.device,
        meetings: _Meetings | None = None,
    ) -> None:
        self._config = config
        self._meetings = meetings
        self._task = task
        self._model = model
        self._optimizer = optimizer
        self._micro_batch = micro_batch
        self._device = device

    def __call__(self) -> list[float]:
        began = now(self._device)
        batch = self._task.data.training_batch(range(self._micro_batch), self._device)
        precision = computing(self._config.train.precision, self._device)
        with torch.set_grad_enabled(self._optimizer is not None), precision:
            scores = self._model(batch.inputs)
            loss = F.cross_entropy(scores.flatten(0, -2), batch.targets.flatten())
        forward = now(self._device)
        if self._optimizer is None:
            return [forward - began, 0.0, 0.0]
        loss.backward()
        if self._meetings is not None:
            self._meetings.end()
        backward = now(self._device)
        parameters = [p for p in self._model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self._config.train.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, self._config.train.clip_norm, norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return [forward - began, backward - forward, now(self._device) - backward]
