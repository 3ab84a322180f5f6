"""The training loop for `method: onebyte`: forward passes alone, and a log that is the checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from thinwire.comm.onebyte.exchange import Turn
from thinwire.comm.onebyte.optimizer import OneByteSPSA
from thinwire.dist.checkpoint import Checkpointer
from thinwire.dist.checkpoint_export import export_safetensors
from thinwire.dist.config_errors import ConfigError
from thinwire.dist.data import Batch
from thinwire.dist.metrics import Record, Sink, StepTraffic
from thinwire.dist.onebyte_log import bring_together, log_path
from thinwire.dist.onebyte_run import AllRoundsDoneError, OneByteRunSettings, TimedExchange, joining, samples_of
from thinwire.dist.optimizers import learning_rate
from thinwire.dist.step_reports import NonFiniteError, StepReports
from thinwire.dist.step_trace import StepTrace
from thinwire.dist.stop import StopRequest
from thinwire.dist.task import Task, build_task, compare_with_others, computing, evaluate_task
from thinwire.dist.train import Outcome
from thinwire.dist.world import World

if TYPE_CHECKING:
    from thinwire.dist.config import RunConfig

WEIGHTS = "model.safetensors"
_ADVICE = "Lower method.lr or method.eps, or look at the data of that round; the log ends with it"


@dataclass
class LogState:
    """step: committed rounds. resumed: what the run continues from, or ""."""

    step: int
    resumed: str = ""


class ZerothOrderTrainer:
    """A run by OneByteSPSA on one rank: what Trainer is for methods with a backward pass. Collective.

    The base weights are built from the configuration at every start, and the log's rounds are carried out on them; so
    a run continues bit for bit without any file of weights but its base.

    Args:
        config: the run; its method is OneByteRunSettings.
        world: this rank's place in the job.
        stop: asks for an orderly end.
    Raises:
        ValueError: a setting does not fit this world, this model or these data; or the log is of another run.
        PreflightError: the ranks do not have the same.
        CheckpointError: checkpoint.resume names no checkpoint of this model.
    """

    def __init__(self, config: RunConfig, world: World, stop: StopRequest | None = None) -> None:
        assert isinstance(config.method, OneByteRunSettings)
        self.config = config
        self.settings = config.method
        self.world = world
        self.stop = stop or StopRequest()
        self._join = joining(self.settings, world, config.train.steps)
        self.micro_batch, self.micro_batches = config.train.share(world.size)
        self.task, started_from = self._begin()
        compare_with_others(self.task, config.resolved(), world)
        self.data = self.task.data
        self.parameters = sum(p.numel() for p in self.task.network.parameters())
        self.learning = sum(p.numel() for p in self.task.network.parameters() if p.requires_grad)
        path = log_path(config.folder, world.rank)
        _refuse_old_log(path, config)
        if self._join is None:
            bring_together(path, world)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.method = OneByteSPSA(
            self.task.network.named_parameters(),
            model=self.task.model,
            log=path,
            queue=None if self._join else world.queue,
            join=self._join,
            base=(lambda: dict(self._begin()[0].network.named_parameters())) if self._join else None,
            **self.settings.of_optimizer(),
        )
        finished = self.method.replica.rounds
        resumed = f"continues {path} after {finished} rounds" if finished else started_from
        self.state = LogState(finished, resumed)
        self._reports = StepReports(world.queue)
        self._traffic = StepTraffic(world.queue.meter, world.interface.name)
        self._trace = StepTrace(config.output.trace_steps, config.folder, rank=world.rank, host=world.host)
        self._stopping_ranks: tuple[int, ...] = ()
        self._sinks: Sequence[Sink] = ()
        self._unpublished: Record | None = None
        self._last: Record | None = None
        self._elastic_before: dict[str, float] = {}
        self._batches: tuple[Turn, list[Batch]] | None = None

    def _begin(self) -> tuple[Task, str]:
        """The task with the base weights, and where these are from, if not from the configuration."""
        task = build_task(self.config, self.world.device)
        return task, _load_start(task.model, self.config, self.world)

    def describe(self) -> str:
        """A few lines for the start of the run: model, data, batch, and what a round costs."""
        train, settings = self.config.train, self.settings
        predicted = self.method.predicted_bytes()
        sends = ", ".join(f"{count:,} bytes over {level}" for level, count in predicted.items()) or "nothing"
        if self._join is not None:
            sends = f"{settings.samples:,} bytes with a header of 24, and listens at {self._address()}"
        evaluations = settings.samples * 2 if settings.estimate == "two_sided" else settings.samples + 1
        tokens = round(train.global_batch * self.task.data.tokens_per_sample)
        return "\n".join(
            (
                f"{self.config.model.kind} with {self.parameters:,} parameters, of which {self.learning:,} learn, "
                f"{train.precision}; {self.task.data.describe()}",
                f"{train.steps} rounds of {train.global_batch} sequences ({tokens:,} tokens): "
                f"{self.micro_batches} x {self.micro_batch} on each rank, {evaluations} times",
                f"method {settings.kind}: in each round, this rank sends {sends}",
                self.method.describe(),
                *([self.state.resumed] if self.state.resumed else []),
                *(["nothing is left to do"] if self.state.step >= train.steps else []),
            )
        )

    def run(self, sinks: Sequence[Sink] = (), seconds_before: float = 0.0) -> Outcome:
        """Train up to train.steps rounds, or until a rank is asked to stop; write the weights at the end.

        Args:
            sinks: get every step's record.
            seconds_before: how long the run took before it was resumed.
        Raises:
            NonFiniteError: on every rank, when no rank has a finite loss in a round.
            PeerLostError, PeerLateError, PeerFailedError: another rank is gone; the log has the rounds before that.
        """
        self._sinks = sinks
        train, state = self.config.train, self.state
        began = time.monotonic() - seconds_before
        self._traffic.since_last()
        while state.step < train.steps and not self._stopping_ranks:
            before = state.step
            try:
                with self._trace.step(before + 1):
                    record = self._train_step()
            except AllRoundsDoneError:
                state.step = self.method.replica.rounds
                break
            state.step = self.method.replica.rounds
            due = state.step >= train.steps or _passed(before, state.step, train.eval_every)
            if evaluating := bool(train.eval_windows) and due:
                record |= evaluate_task(train, self.task.model, self.task.data, self.world)
            self._unpublished = {"step": state.step, **record, "seconds": time.monotonic() - began}
            if evaluating:
                self._publish()
                self._traffic.since_last()  # what the evaluation sent belongs to no step
        self._publish()
        self._trace.close()
        if self.world.rank == 0 and state.step >= train.steps:
            export_safetensors(self.task.network.state_dict(), self.config.folder / WEIGHTS)
        self.method.remove()
        return Outcome(state.step, self._stopping_ranks if state.step < train.steps else (), self._last)

    def _train_step(self) -> Record:
        """One round; returns its record, but for what only all ranks together know."""
        train, data = self.config.train, self.task.data
        began, exposed_before = time.monotonic(), self._exposed_s()
        lr = learning_rate(self.settings.lr, self.config.schedule, self.state.step, train.steps)
        for group in self.method.param_groups:
            group["lr"] = lr
        losses = _FiniteMean()
        self.method.step(lambda: losses.add(self._loss()))
        metrics = self.method.metrics()
        self._publish()  # the step before: its reports came in while this one computed
        step_s = time.monotonic() - began
        exposed_s = self._exposed_s() - exposed_before
        machines = self.world.size
        traffic = self._traffic.since_last()
        if isinstance(self.method.exchange, TimedExchange):
            among = self.method.exchange.inner.metrics()
            machines = round(among["members"])
            for key in ("sent_bytes", "received_bytes"):
                traffic[key] = round(among[key] - self._elastic_before.get(key, 0.0))
            metrics |= {key: value for key, value in among.items() if key not in traffic}
            self._elastic_before = among
        stop = bool(self.stop.reason)
        self._reports.send(losses.mean, stop, computed_s=step_s - exposed_s, waited_s=exposed_s)
        if metrics["contributions"] and metrics["absent"] == metrics["contributions"]:
            # Every rank has the same round, so all are here.
            raise NonFiniteError(
                self.method.replica.rounds,
                self._reports.read().non_finite_ranks,
                "no loss of the round is finite",
                _ADVICE,
            )
        plain_bytes = 2 * 4 * self.learning * (machines - 1) / machines
        return {
            "lr": lr,
            "tokens_per_s": train.global_batch * data.tokens_per_sample / step_s,
            "step_s": step_s,
            "compute_ms": 1e3 * (step_s - exposed_s),
            "exposed_comm_ms": 1e3 * exposed_s,
            **traffic,
            "compression_ratio": plain_bytes / traffic["sent_bytes"] if traffic["sent_bytes"] else 1.0,
            "method": metrics,
        }

    def _address(self) -> str:
        exchange = self.method.exchange
        return exchange.inner.address if isinstance(exchange, TimedExchange) else ""

    def _exposed_s(self) -> float:
        """Seconds that computing has waited for the others."""
        exchange = self.method.exchange
        return exchange.waited_s if isinstance(exchange, TimedExchange) else self.world.queue.exposed_s

    def _loss(self) -> Tensor:
        """Mean loss, fp32, of this rank's batch of the round that the optimizer measures."""
        device = self.world.device
        total = torch.zeros((), device=device)
        with torch.no_grad():
            for batch in self._batches_of(self.method.turn):
                with record_function("forward"), computing(self.config.train.precision, device):
                    scores = self.task.model(batch.inputs)
                total += F.cross_entropy(scores.float().flatten(0, -2), batch.targets.flatten())
        return total / self.micro_batches

    def _batches_of(self, turn: Turn) -> list[Batch]:
        """The micro batches of a turn, made once for all its evaluations."""
        if self._batches is None or self._batches[0] != turn:
            samples = samples_of(turn, self.config.train.global_batch, self.world.size, elastic=self._join is not None)
            parts = [samples[i : i + self.micro_batch] for i in range(0, len(samples), self.micro_batch)]
            batches = [self.task.data.training_batch(part, self.world.device) for part in parts]
            self._batches = turn, batches
        return self._batches[1]

    def _publish(self) -> None:
        """Complete the record of the last step with what the other ranks reported of it, and give it to the sinks."""
        if self._unpublished is None:
            return
        record, self._unpublished = self._unpublished, None
        report = self._reports.read()
        self._stopping_ranks = report.stopping_ranks
        self._last = {"step": record["step"], "loss": report.loss, **record, **report.record()}
        for sink in self._sinks:
            sink.write(self._last)


class _FiniteMean:
    """Of the losses that are finite; nan if none is."""

    def __init__(self) -> None:
        self._finite: list[float] = []

    def add(self, loss: Tensor) -> Tensor:
        value = float(loss)
        if math.isfinite(value):
            self._finite.append(value)
        return loss

    @property
    def mean(self) -> float:
        return math.fsum(self._finite) / len(self._finite) if self._finite else math.nan


def _passed(before: int, after: int, every: int) -> bool:
    """Whether a multiple of `every` lies in before + 1 .. after; 0 = never."""
    return bool(every) and before // every != after // every


def _refuse_old_log(path: Path, config: RunConfig) -> None:
    if config.checkpoint.resume == "never" and path.exists():
        raise ConfigError(
            f"checkpoint.resume: never, but {path} has a run; remove it, give auto to continue it, or choose another "
            "name or output.folder"
        )


def _load_start(model: nn.Module, config: RunConfig, world: World) -> str:
    """Put the weights of the run that checkpoint.resume names into the model; returns what it did, or ""."""
    resume = config.checkpoint.resume
    if resume in ("auto", "never"):
        return ""
    folder = Path(resume).expanduser()
    checkpoints = Checkpointer(
        folder, config.checkpoint, group=world.group, rank=world.rank, world_size=world.size, read_only=True
    )
    loaded = checkpoints.load_latest({"model": model.state_dict()}, world_size_changed="all_ranks")
    assert loaded is not None  # read-only, no checkpoint is an error
    model.load_state_dict(loaded.shared["model"])
    return f"begins at the weights of {loaded.path}, trained for {loaded.step} steps"
