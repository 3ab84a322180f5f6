"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.profiler import record_function

from thinwire.comm.errors import NonFiniteGradientError
from thinwire.comm.method import DescribedMethod, LocalMethod, agreed_weights
from thinwire.comm.settings import Settings
from thinwire.dist.balance_run import RunBalance
from thinwire.dist.data import shard
from thinwire.dist.domain_evaluation import evaluate_domains
from thinwire.dist.engine.build import build_engine
from thinwire.dist.engine.expert_parallel import ExpertParallelEngine
from thinwire.dist.metrics import Record, Sink, StepTraffic
from thinwire.dist.optimizers import learning_rate
from thinwire.dist.run_folder import numeric_settings
from thinwire.dist.run_state import RunState
from thinwire.dist.step_reports import NonFiniteError, StepReports
from thinwire.dist.step_trace import StepTrace
from thinwire.dist.stop import StopRequest
from thinwire.dist.task import build_task, compare_with_others, computing, evaluate_task
from thinwire.dist.world import World

if TYPE_CHECKING:
    from thinwire.dist.config import RunConfig


class TrainSettings(Settings):
    """The loop.

    steps: optimizer steps of the whole run.
    global_batch: sequences per step, over all ranks; so the training does not depend on how many they are.
    micro_batch: sequences that one rank computes at once; "auto" = its whole share of the global batch.
    precision: "bf16" computes in bf16 where that is sound (autocast) and keeps weights and optimizer in fp32.
    parameters: names, or patterns such as "blocks.3.*", of the model's parameters that learn; the others stay.
    clip_norm: largest norm of the averaged gradient; 0 = no limit. Method compress clips each rank's own gradient
      instead, before it compresses it, so that sqrt(mean_r ||g_r||^2) is no more than this; see its setting `clip`.
    eval_every: steps between evaluations; 0 = only after the last step.
    eval_windows: validation windows to score, or all; 0 = no evaluation. eval_batch: how many at once.
    """

    steps: int = Field(gt=0)
    global_batch: int = Field(gt=0)
    micro_batch: Annotated[int, Field(gt=0)] | Literal["auto"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    parameters: tuple[str, ...] = Field(("*",), min_length=1)
    clip_norm: float = Field(1.0, ge=0)
    eval_every: int = Field(0, ge=0)
    eval_windows: Annotated[int, Field(ge=0)] | Literal["all"] = 64
    eval_batch: int = Field(16, gt=0)

    def share(self, world_size: int) -> tuple[int, int]:
        """(micro batch, micro batches per step) of each rank.

        Raises:
            ValueError: the global batch cannot be divided so.
        """
        if self.global_batch % world_size:
            below = self.global_batch // world_size * world_size
            legal = " or ".join(str(n) for n in (below, below + world_size) if n)
            raise ValueError(
                f"train.global_batch: {self.global_batch} sequences cannot be shared equally by {world_size} ranks; "
                f"nearest: {legal}"
            )
        share = self.global_batch // world_size
        micro = share if self.micro_batch == "auto" else self.micro_batch
        if share % micro:
            divisors = [n for n in range(1, share + 1) if share % n == 0]
            near = sorted(sorted(divisors, key=lambda n: abs(n - micro))[:3])
            raise ValueError(
                f"train.micro_batch: {micro} does not divide the {share} sequences that each of {world_size} ranks has "
                f"per step (train.global_batch {self.global_batch}); nearest: {', '.join(map(str, near))}, or auto"
            )
        return micro, share // micro


@dataclass(frozen=True)
class Outcome:
    """How a run ended: finished steps, the ranks that were asked to stop before the last one, and the last record."""

    step: int
    stopped_by: tuple[int, ...]
    last: Record | None


class Trainer:
    """A run on one rank: everything built, compared with the other ranks, and restored; run() trains. Collective.

    Args:
        config: the run.
        world: this rank's place in the job.
        stop: asks for an orderly end.
    Raises:
        ValueError: a setting does not fit this world or this text.
        PreflightError: the ranks do not have the same.
        CheckpointError, ConfigError: what the run folder holds cannot be continued.
    """

    def __init__(self, config: RunConfig, world: World, stop: StopRequest | None = None) -> None:
        self.config = config
        self.world = world
        self.stop = stop or StopRequest()
        self.micro_batch, self.micro_batches = config.train.share(world.size)
        task = build_task(config, world.device)
        self.data, model = task.data, task.model
        resolved = config.resolved()
        compare_with_others(task, resolved, world)
        self.parameters = sum(p.numel() for p in model.parameters())
        # First: an engine may compile the routers, or cut them into shards.
        self.balance = RunBalance(config, model, world, micro_batches=self.micro_batches) if config.balance else None
        self.engine = build_engine(config, model, world, micro_batches=self.micro_batches)
        self.method = self.engine.method
        facts = numeric_settings(resolved) | self.data.fingerprint
        balance = self.balance.handle if self.balance else None
        self.state = RunState(self.engine, world, config.folder, config.checkpoint, facts, balance)
        self._reports = StepReports(world.queue)
        self._traffic = StepTraffic(world.queue.meter, world.interface.name)
        self._trace = StepTrace(config.output.trace_steps, config.folder, rank=world.rank, host=world.host)
        self._stopping_ranks: tuple[int, ...] = ()
        self._sinks: Sequence[Sink] = ()
        self._unpublished: Record | None = None
        self._last: Record | None = None

    def describe(self) -> str:
        """A few lines for the start of the run: model, text, batch, and what a step will send."""
        train, data, method = self.config.train, self.data, self.config.method
        tokens = round(train.global_batch * data.tokens_per_sample)
        predicted = self.method.predicted_bytes()
        sends = ", ".join(f"{count:,} bytes over {level}" for level, count in predicted.items())
        sends = sends or ("nothing" if self.world.size == 1 else "what will be known after the first")
        return "\n".join(
            (
                f"{self.config.model.kind} with {self.parameters:,} parameters, {train.precision}; {data.describe()}",
                f"{train.steps} steps of {train.global_batch} sequences ({tokens:,} tokens): "
                f"{self.micro_batches} x {self.micro_batch} on each rank",
                f"method {method.kind}: each step, this rank sends {sends}",
                *([self.method.describe()] if isinstance(self.method, DescribedMethod) else []),
                *([self.engine.describe()] if isinstance(self.engine, ExpertParallelEngine) else []),
                *([f"balance: {self.balance.describe()}"] if self.balance else []),
                *([self.state.resumed] if self.state.resumed else []),
                *(["nothing is left to do"] if self.state.step >= train.steps else []),
            )
        )

    def run(self, sinks: Sequence[Sink] = (), seconds_before: float = 0.0) -> Outcome:
        """Train up to train.steps, or until a rank is asked to stop; write a checkpoint at the end.

        Args:
            sinks: get every step's record.
            seconds_before: how long the run took before it was resumed.
        Raises:
            NonFiniteError: on every rank, before the optimizer has taken the values up.
            PeerLostError, PeerLateError, PeerFailedError: another rank is gone.
        """
        self._sinks = sinks
        state, steps = self.state, self.config.train.steps
        began = time.monotonic() - seconds_before
        saved = state.step
        self._traffic.since_last()
        while state.step < steps and not self._stopping_ranks:
            with self._trace.step(state.step + 1):
                record = self._train_step()
            state.step += 1
            due = state.step == steps
            if evaluating := bool(self.config.train.eval_windows) and (
                due or self._is_due(self.config.train.eval_every)
            ):
                record |= self._evaluate()
            self._unpublished = {"step": state.step, **record, "seconds": time.monotonic() - began}
            saving = due or self._is_due(self.config.checkpoint.every_steps)
            if evaluating or saving:
                self._publish()
            if saving:
                state.save()
                saved = state.step
            if evaluating or saving:
                self._traffic.since_last()  # what these sent belongs to no step
        self._publish()
        self._trace.close()
        if saved != state.step:
            state.save()
        if self.balance:
            self.balance.close()
        self.engine.close()
        return Outcome(state.step, self._stopping_ranks if state.step < steps else (), self._last)

    def _train_step(self) -> Record:
        """One optimizer step; returns its record, but for what only all ranks together know."""
        settings, engine = self.config.train, self.engine
        began, exposed_before = time.monotonic(), self._exposed_s()
        lr = learning_rate(self.config.optimizer.lr, self.config.schedule, self.state.step, settings.steps)
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        loss = self._forward_backward()
        self._publish()  # the step before: its reports came in while this one computed
        try:
            with record_function("optimizer"):
                norm = engine.step()
        except NonFiniteGradientError:
            # The mean gradient is the same on all ranks, so all are here at this step: ask whose loss it was.
            self._reports.send(loss, stop=False)
            ranks = self._reports.read().non_finite_ranks
            raise NonFiniteError(self.state.step + 1, ranks, "the averaged gradient is not finite") from None
        if isinstance(self.method, LocalMethod) and not math.isfinite(norm):
            loss = math.nan  # this rank alone knows; all will, from the step's reports
        step_s = time.monotonic() - began
        exposed_s = self._exposed_s() - exposed_before
        traffic = self._traffic.since_last()
        stop = bool(self.stop.reason)
        self._reports.send(loss, stop, computed_s=step_s - exposed_s, waited_s=exposed_s)
        plain_bytes = 2 * 4 * self.parameters * (self.world.size - 1) / self.world.size
        return {
            "lr": lr,
            "grad_norm": norm,
            "tokens_per_s": settings.global_batch * self.data.tokens_per_sample / step_s,
            "step_s": step_s,
            "compute_ms": 1e3 * (step_s - exposed_s),
            "exposed_comm_ms": 1e3 * exposed_s,
            **traffic,
            "compression_ratio": plain_bytes / traffic["sent_bytes"] if traffic["sent_bytes"] else 1.0,
            "method": self.method.metrics(),
            **({"balance": self.balance.handle.metrics()} if self.balance else {}),
        }

    def _exposed_s(self) -> float:
        """Seconds since the start for which this rank waited for others."""
        return self.engine.exposed_s + (self.balance.exposed_s if self.balance else 0.0)

    def _forward_backward(self) -> float:
        """Add up the gradient of the global batch's mean loss; return this rank's own mean loss."""
        samples = shard(self.state.step, self.config.train.global_batch, self.world.rank, self.world.size)
        if self.balance:
            self.balance.begin_step()
        held: list[Tensor] = []  # losses whose backward pass waits for all forward passes
        total = 0.0
        for i in range(self.micro_batches):
            part = samples[i * self.micro_batch : (i + 1) * self.micro_batch]
            batch = self.data.training_batch(part, self.world.device)
            last = i == self.micro_batches - 1
            with self.engine.micro_batch(last=last):
                with record_function("forward"), computing(self.config.train.precision, self.world.device):
                    scores = self.engine.forward(batch.inputs)
                    loss = F.cross_entropy(scores.flatten(0, -2), batch.targets.flatten()) / self.micro_batches
                if self.balance and self.balance.forwards_first:
                    held.append(loss)
                else:
                    with record_function("backward"):
                        self.engine.backward(loss)
            total += float(loss.detach())
        if held:
            with record_function("backward"):
                self.engine.backward(torch.stack(held).sum())
        return total

    def _publish(self) -> None:
        """Complete the record of the last step with what the other ranks reported of it, and give it to the sinks."""
        if self._unpublished is None:
            return
        record, self._unpublished = self._unpublished, None
        report = self._reports.read()
        self._stopping_ranks = report.stopping_ranks
        if report.non_finite_ranks:
            apart = isinstance(self.method, LocalMethod)
            what = "a rank's own loss or gradient is not finite" if apart else "the gradient is finite, the loss is not"
            raise NonFiniteError(record["step"], report.non_finite_ranks, what)
        self._last = {"step": record["step"], "loss": report.loss, **record, **report.record()}
        for sink in self._sinks:
            sink.write(self._last)

    def _evaluate(self) -> Record:
        with agreed_weights(self.method):
            train, network, collective = self.config.train, self.engine.network, self.engine.forward_is_collective
            record = evaluate_task(train, network, self.data, self.world, forward_is_collective=collective)
            return record | evaluate_domains(train, network, self.data, self.world, alone=collective)

    def _is_due(self, every: int) -> bool:
        return bool(every) and self.state.step % every == 0
