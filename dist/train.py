"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import psutil
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.distributed import ProcessGroup, Store

from thinwire.comm.queue import CommQueue
from thinwire.comm.settings import Settings
from thinwire.dist.checkpoint import Checkpointer, Loaded
from thinwire.dist.data import Data, shard
from thinwire.dist.engine.ddp import wrap_ddp
from thinwire.dist.evaluate import evaluate
from thinwire.dist.interface import Interface
from thinwire.dist.methods import attach
from thinwire.dist.metrics import Record, Sink, StepTraffic
from thinwire.dist.models import build_model
from thinwire.dist.optimizers import build_optimizer, learning_rate
from thinwire.dist.preflight import check_agreement, describe_config, describe_model, describe_versions
from thinwire.dist.run_folder import CHECKPOINTS, check_same_run, numeric_settings
from thinwire.dist.stop import StepReports, StopRequest

if TYPE_CHECKING:
    from typing import Protocol

    from thinwire.dist.config import RunConfig

    class Job(Protocol):
        """The part of a World that training needs."""

        @property
        def rank(self) -> int: ...
        @property
        def size(self) -> int: ...
        @property
        def device(self) -> torch.device: ...
        @property
        def interface(self) -> Interface: ...
        @property
        def store(self) -> Store: ...
        @property
        def group(self) -> ProcessGroup: ...
        @property
        def queue(self) -> CommQueue: ...


class TrainSettings(Settings):
    """The loop.

    steps: optimizer steps of the whole run.
    global_batch: sequences per step, over all ranks; so the training does not depend on how many they are.
    micro_batch: sequences that one rank computes at once; "auto" = its whole share of the global batch.
    precision: "bf16" computes in bf16 where that is sound (autocast) and keeps weights and optimizer in fp32.
    clip_norm: largest norm of the averaged gradient; 0 = no limit.
    eval_every: steps between evaluations; 0 = only after the last step.
    eval_windows: validation windows to score, or all; 0 = no evaluation. eval_batch: how many at once.
    """

    steps: int = Field(gt=0)
    global_batch: int = Field(gt=0)
    micro_batch: int | Literal["auto"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    clip_norm: float = Field(1.0, ge=0)
    eval_every: int = Field(0, ge=0)
    eval_windows: int | Literal["all"] = 64
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
        if micro < 1 or share % micro:
            divisors = [n for n in range(1, share + 1) if share % n == 0]
            near = sorted(sorted(divisors, key=lambda n: abs(n - micro))[:3])
            raise ValueError(
                f"train.micro_batch: {micro} does not divide the {share} sequences that each of {world_size} ranks has "
                f"per step (train.global_batch {self.global_batch}); nearest: {', '.join(map(str, near))}, or auto"
            )
        return micro, share // micro


class NonFiniteError(ArithmeticError):
    """A loss or gradient is NaN or infinite. Raised on every rank before the optimizer sees it.

    Attributes: step (the first is 1); ranks whose loss was not finite, empty if only the averaged gradient was not.
    """

    def __init__(self, message: str, step: int, ranks: tuple[int, ...]) -> None:
        super().__init__(message)
        self.step = step
        self.ranks = ranks


@dataclass(frozen=True)
class Outcome:
    """How a run ended: finished steps, why it stopped early ("" if it did not), and the last record, if any."""

    step: int
    stopped: str
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

    def __init__(self, config: RunConfig, world: Job, stop: StopRequest | None = None) -> None:
        self.config = config
        self.world = world
        self.stop = stop or StopRequest()
        self.micro_batch, self.micro_batches = config.train.share(world.size)
        self.data = Data(config.data, context=config.model.context, seed=config.seed)
        model = build_model(
            config.model, tokenizer_vocab=self.data.tokenizer.vocab, seed=config.seed, device=world.device
        )
        resolved = config.model_dump(mode="json")
        check_agreement(
            {
                **describe_versions(),
                **describe_model(model),
                "config": describe_config(resolved),
                "tokenizer": {"data.tokenizer": self.data.tokenizer.identity},
                "data": self.data.fingerprint,
                "device": {"world.device": world.device.type},
            },
            queue=world.queue,
            store=world.store,
        )
        self.parameters = sum(p.numel() for p in model.parameters())
        self.model = wrap_ddp(model, config.engine, world.group)
        self.method = attach(config.method, self.model, world.queue)
        self.optimizer = build_optimizer(config.optimizer, model)
        self._facts = {"settings": numeric_settings(resolved) | self.data.fingerprint}
        self.step = 0
        self.resumed = ""
        self._checkpoints = self._open_checkpoints()
        self._reports = StepReports(world.queue)
        self._ranks_to_stop: tuple[int, ...] = ()

    def describe(self) -> str:
        """A few lines for the start of the run: model, text, batch, and what a step will send."""
        train, data, method = self.config.train, self.data, self.config.method
        tokens = train.global_batch * self.config.model.context
        predicted = self.method.predicted_bytes()
        sends = ", ".join(f"{count:,} bytes over {level}" for level, count in predicted.items()) or "nothing"
        return "\n".join(
            (
                f"{self.config.model.kind} with {self.parameters:,} parameters, {train.precision}; "
                f"{len(data.training.tokens):,} training and {len(data.validation.tokens):,} validation tokens",
                f"{train.steps} steps of {train.global_batch} sequences ({tokens:,} tokens): "
                f"{self.micro_batches} x {self.micro_batch} on each rank",
                f"method {method.kind}: each step, this rank sends {sends}",
                *([self.resumed] if self.resumed else []),
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
        settings = self.config.train
        began = time.monotonic() - seconds_before
        self._traffic = StepTraffic(self.world.queue.meter)
        self._interface_before = self._interface_bytes()
        unsent: Record | None = None  # a record waits for the other ranks' losses, which are read one step later
        last: Record | None = None
        saved = self.step

        def flush() -> None:
            nonlocal unsent, last
            if unsent is not None:
                unsent["loss"] = self._read_reports(unsent["step"])
                last, unsent = unsent, None
                for sink in sinks:
                    sink.write(last)

        while self.step < settings.steps and not self._ranks_to_stop:
            record = self._train_step(flush)
            self.step += 1
            unsent = {"step": self.step, **record, "seconds": 0.0}
            final = self.step == settings.steps
            if settings.eval_windows and (final or (settings.eval_every and self.step % settings.eval_every == 0)):
                unsent |= self._evaluate()
            unsent["seconds"] = time.monotonic() - began
            every = self.config.checkpoint.every_steps
            if final or (every and self.step % every == 0):
                flush()
                self._save()
                saved = self.step
        flush()
        if saved != self.step:
            self._save()
        stopped = ""
        if self._ranks_to_stop:
            who = f"rank{'s' if len(self._ranks_to_stop) > 1 else ''} {', '.join(map(str, self._ranks_to_stop))}"
            stopped = f"{who} received {self.stop.reason}" if self.stop.reason else f"{who} received a signal"
        return Outcome(self.step, stopped, last)

    def _train_step(self, flush: Any) -> Record:
        """One optimizer step; returns its record without what only all ranks together know."""
        settings, queue = self.config.train, self.world.queue
        began, exposed_before = time.monotonic(), queue.exposed_s
        lr = learning_rate(self.config.optimizer.lr, self.config.schedule, self.step, settings.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = self._forward_backward()
        norm = self._clip()
        flush()
        if not math.isfinite(norm):
            raise self._non_finite(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._reports.send(loss, bool(self.stop.reason))
        step_s = time.monotonic() - began
        exposed_s = queue.exposed_s - exposed_before
        traffic = self._traffic.since_last()
        interface = self._interface_bytes()
        interface_sent, self._interface_before = interface - self._interface_before, interface
        sent = traffic["sent_bytes"]
        plain = 2 * 4 * self.parameters * (self.world.size - 1) / self.world.size
        return {
            "loss": math.nan,
            "lr": lr,
            "grad_norm": norm,
            "tokens_per_s": settings.global_batch * self.config.model.context / step_s,
            "step_s": step_s,
            "compute_ms": 1e3 * (step_s - exposed_s),
            "exposed_comm_ms": 1e3 * exposed_s,
            **traffic,
            "compression_ratio": plain / sent if sent else 1.0,
            "interface_sent_bytes": interface_sent,
            **{f"method/{name}": value for name, value in self.method.metrics().items()},
        }

    def _forward_backward(self) -> float:
        """Leave the gradient of the global batch's mean loss in the parameters; return this rank's own mean loss."""
        samples = shard(self.step, self.config.train.global_batch, self.world.rank, self.world.size)
        total = 0.0
        for i in range(self.micro_batches):
            batch = self.data.training_batch(samples[i * self.micro_batch : (i + 1) * self.micro_batch], self.world.device)
            last = i == self.micro_batches - 1
            with nullcontext() if last else self.model.no_sync():
                with self._precision():
                    loss = _loss(self.model(batch.inputs), batch.targets) / self.micro_batches
                loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    def _clip(self) -> float:
        """Scale the averaged gradient down to train.clip_norm; returns its norm before."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.config.train.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.train.clip_norm, norm)
        return float(norm)

    def _non_finite(self, loss: float) -> NonFiniteError:
        """The averaged gradient is equal on all ranks, so all come here at the same step: ask whose loss it was."""
        self._reports.send(loss, stop=False)
        report = self._reports.read()
        assert report is not None
        return _non_finite_error(self.step + 1, report.non_finite_ranks, "the averaged gradient is not finite")

    def _read_reports(self, step: int) -> float:
        """The mean of all ranks' losses at the step reported last; also learns who wants to stop."""
        report = self._reports.read()
        assert report is not None
        self._ranks_to_stop = report.stopping_ranks
        if report.non_finite_ranks:
            raise _non_finite_error(step, report.non_finite_ranks, "the loss is not finite, though its gradient is")
        return report.loss

    def _evaluate(self) -> Record:
        settings, windows = self.config.train, self.data.validation
        wanted = windows.count if settings.eval_windows == "all" else settings.eval_windows
        result = evaluate(
            self.model.module,
            windows,
            count=min(wanted, windows.count),
            batch=settings.eval_batch,
            queue=self.world.queue,
            device=self.world.device,
            precision=self._precision(),
        )
        self._interface_before = self._interface_bytes()
        return {"val_loss": result.loss, "val_bits_per_byte": result.bits_per_byte}

    def _precision(self) -> AbstractContextManager[Any]:
        if self.config.train.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.world.device.type, dtype=torch.bfloat16)

    def _interface_bytes(self) -> int:
        """What the kernel has sent through this rank's network interface, all processes and protocol headers included."""
        return int(psutil.net_io_counters(pernic=True, nowrap=False)[self.world.interface.name].bytes_sent)

    def _open_checkpoints(self) -> Checkpointer:
        """Restore what checkpoint.resume says, and return where this run's own checkpoints go."""
        settings, world = self.config.checkpoint, self.world
        own = Checkpointer(
            self.config.folder / CHECKPOINTS, settings, group=world.group, rank=world.rank, world_size=world.size
        )
        loaded = own.load_latest(self._shared_state())
        if loaded is not None:
            check_same_run(loaded.facts["settings"], self._facts["settings"], loaded.path)
        elif settings.resume not in ("auto", "never"):
            from pathlib import Path

            source = Path(settings.resume).expanduser()
            other = Checkpointer(
                source, settings, group=world.group, rank=world.rank, world_size=world.size, read_only=True
            )
            loaded = other.load_latest(self._shared_state())
            if loaded is None:
                raise ValueError(
                    f"checkpoint.resume: {source} holds no checkpoint; give a folder with step-* folders or one of these, "
                    "or auto, or never"
                )
        if loaded is not None:
            self._restore(loaded)
        return own

    def _restore(self, loaded: Loaded) -> None:
        assert loaded.per_rank is not None
        self.model.module.load_state_dict(loaded.shared["model"])
        self.optimizer.load_state_dict(loaded.shared["optimizer"])
        self.method.load_state_dict(loaded.per_rank["method"])
        _set_random_state(loaded.per_rank["random"], self.world.device)
        self.step = loaded.step
        passed_over = "".join(f"\n  passed over {text}" for text in loaded.refused)
        self.resumed = f"continues from {loaded.path} after {loaded.step} steps{passed_over}"

    def _save(self) -> None:
        per_rank = {"method": self.method.state_dict(), "random": _random_state(self.world.device)}
        self._checkpoints.save(self.step, self._shared_state(), per_rank, self._facts)

    def _shared_state(self) -> dict[str, Any]:
        return {"model": self.model.module.state_dict(), "optimizer": self.optimizer.state_dict()}


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _non_finite_error(step: int, ranks: tuple[int, ...], what: str) -> NonFiniteError:
    if ranks:
        whose = f"the loss of rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} is NaN or infinite"
    else:
        whose = "every rank's loss is finite, so one of the gradients overflowed"
    return NonFiniteError(
        f"step {step}: {what}: {whose}. The weights are those before this step. Lower optimizer.lr, lengthen "
        "schedule.warmup_steps, or look at the text of that step",
        step,
        ranks,
    )


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
