"""The training loop for `method: gossip`: a machine that waits for no other but the neighbours its method names."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch.profiler import record_function

from thinwire.comm.gossip.door import enter
from thinwire.comm.gossip.post.machines import meet
from thinwire.dist.balance_run import RunBalance
from thinwire.dist.checkpoint_export import export_safetensors
from thinwire.dist.domain_evaluation import evaluate_domains
from thinwire.dist.evaluate import evaluate_alone
from thinwire.dist.gossip_run import GossipRunSettings, place_among_machines
from thinwire.dist.gossip_state import GossipState
from thinwire.dist.local_step import LocalStep
from thinwire.dist.metrics import Record, Sink, StepTraffic
from thinwire.dist.optimizers import build_optimizer
from thinwire.dist.run_folder import numeric_settings
from thinwire.dist.step_reports import NonFiniteError
from thinwire.dist.step_trace import StepTrace
from thinwire.dist.stop import StopRequest
from thinwire.dist.task import build_task, compare_with_others, computing
from thinwire.dist.train import Outcome
from thinwire.dist.world import World

if TYPE_CHECKING:
    from thinwire.dist.config import RunConfig

WEIGHTS = "model.safetensors"
_CALIBRATION_BATCHES = 32
_ADVICE = "Lower optimizer.lr, lengthen schedule.warmup_steps, or look at that step's text; no other machine has it"


class GossipTrainer:
    """A gossip run on one machine: what Trainer is for methods with a collective in each step.

    Collective is only what happens once: meeting, checkpoints, merges, the end. In between a machine that is slow or
    dead delays those whose round needs it, by method.deadline_s at most, and under algorithms that go at their own pace
    nobody. So a record tells of the machine that writes it: its loss, its seconds, its bytes.

    Args:
        config: the run; its method is GossipRunSettings.
        world: this process's place in the job.
        stop: asks for an orderly end.
    Attributes: lost, machines that had not come to the last checkpoint, the same set to each that has.
    Raises:
        ValueError: a setting does not fit this world, this model or this text.
        PreflightError: the ranks do not have the same.
        CheckpointError, ConfigError: what the run folder holds cannot be continued.
        PeerLostError: machines could not be reached.
    """

    def __init__(self, config: RunConfig, world: World, stop: StopRequest | None = None) -> None:
        assert isinstance(config.method, GossipRunSettings)
        self.config = config
        self.settings = config.method
        self.world = world
        self.stop = stop or StopRequest()
        rank, size = place_among_machines(self.settings, world)
        _, micro_batches = config.train.share(size)
        task = build_task(config, world.device)
        self.data, self.model = task.data, task.model
        resolved = config.resolved()
        compare_with_others(task, resolved, world)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.balance = RunBalance(config, self.model, world, micro_batches=micro_batches) if config.balance else None
        self.optimizer = build_optimizer(config.optimizer, self.model)
        self._local = LocalStep(
            config, self.model, self.optimizer, self.data, rank=rank, size=size, device=world.device
        )
        self.machines = size
        machines = self.settings.machines
        self.method = enter(
            self.optimizer,
            self.settings,
            model=self.model,
            steps=config.train.steps,
            calibrate=self._calibrate,
            queue=world.queue,
            post=None if machines is None else meet(machines),
        )
        try:
            facts = numeric_settings(resolved) | self.data.fingerprint
            self.state = GossipState(
                self.model, self.optimizer, self.method, world, config.folder, config.checkpoint, facts
            )
            if machines is not None:
                common = {path: value for path, value in facts.items() if not path.startswith("method.machines.")}
                self.state.resumed = self.method.begin({"settings": json.dumps(common)}) or self.state.resumed
        except BaseException:
            self.method.remove()
            raise
        self.method.cut_every = config.checkpoint.every_steps
        self._traffic = StepTraffic(self.method.meter, world.interface.name)
        self._trace = StepTrace(config.output.trace_steps, config.folder, rank=rank, host=world.host)
        self.lost: frozenset[int] = frozenset()
        self._own: Record = {}
        self._last: Record | None = None

    def describe(self) -> str:
        """A few lines for the start of the run: model, text, batch, and what a step will send."""
        train = self.config.train
        tokens = round(train.global_batch * self.data.tokens_per_sample)
        return "\n".join(
            (
                f"{self.config.model.kind} with {self.parameters:,} parameters, {train.precision}; "
                f"{self.data.describe()}",
                f"{train.steps} steps of {train.global_batch} sequences ({tokens:,} tokens) on {self.machines} "
                f"machines: {self._local.micro_batches} x {self._local.micro_batch} on each",
                f"method gossip: {self.method.describe()}",
                *([f"balance: {self.balance.describe()}"] if self.balance else []),
                *([self.state.resumed] if self.state.resumed else []),
                *(["nothing is left to do"] if self.method.ended else []),
            )
        )

    def run(self, sinks: Sequence[Sink] = (), seconds_before: float = 0.0) -> Outcome:
        """Train until the run ends for all machines; write a checkpoint and, on rank 0, the weights at the end.

        Args:
            sinks: get every step's record of this machine. Without any it does not evaluate.
            seconds_before: how long the run took before it was resumed.
        Raises:
            NonFiniteError, OwnWeightsError: on this machine alone, before anybody has its values.
        """
        try:
            return self._run(sinks, time.monotonic() - seconds_before)
        finally:
            self.method.remove()

    def _run(self, sinks: Sequence[Sink], began: float) -> Outcome:
        train, state, method = self.config.train, self.state, self.method
        evaluates = bool(train.eval_windows) and bool(sinks)
        if evaluates:
            method.before_merge = self._evaluate_own
        self._traffic.since_last()
        saved = state.step
        while not method.ended:
            with self._trace.step(state.step + 1):
                record = self._train_step()
            if self.stop.reason:
                method.stop()
            if train.eval_windows and train.eval_every and state.step % train.eval_every == 0 and not method.ended:
                record |= self._evaluate(evaluates)
            if method.ended and not method.stopped:
                record |= self._evaluate_at_the_end(evaluates)
            self._last = {"step": state.step, **record, "seconds": time.monotonic() - began}
            for sink in sinks:
                sink.write(self._last)
            if method.cut_due:
                state.save()
                saved = state.step
                self._traffic.since_last()  # what this sent belongs to no step
        self._trace.close()
        if saved != state.step:
            self.lost = state.save()
        return Outcome(state.step, method.stopped_by, self._last)

    def _train_step(self) -> Record:
        method = self.method
        began, exposed_before = time.monotonic(), method.exposed_s
        self._own = {}
        loss, norm = self._local.gradient(self.state.step)
        lr = self.optimizer.param_groups[0]["lr"]
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = "this machine's own loss or gradient is not finite"
            raise NonFiniteError(self.state.step + 1, (self.world.rank,), what, _ADVICE)
        with record_function("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad()
        step_s = time.monotonic() - began
        exposed_s = method.exposed_s - exposed_before
        traffic = self._traffic.since_last()
        plain_bytes = 2 * 4 * self.parameters * (self.machines - 1) / self.machines
        return {
            "loss": loss,
            "lr": lr,
            "grad_norm": norm,
            "tokens_per_s": self.config.train.global_batch * self.data.tokens_per_sample / step_s,
            "step_s": step_s,
            "compute_ms": 1e3 * (step_s - exposed_s),
            "exposed_comm_ms": 1e3 * exposed_s,
            **traffic,
            "compression_ratio": plain_bytes / traffic["sent_bytes"] if traffic["sent_bytes"] else 1.0,
            "method": method.metrics(),
            **({"balance": self.balance.handle.metrics()} if self.balance else {}),
        }

    def _evaluate(self, evaluates: bool) -> Record:
        """In the middle of the run: this machine's model, or the mean of all, for which all must be here."""
        if self.settings.evaluate == "own":
            return self._score() if evaluates else {}
        own = self._score() if evaluates else {}
        with self.method.agreed():
            merged = self._score() if evaluates else {}
        self._traffic.since_last()
        return {**merged, **_called(own, "own")}

    def _evaluate_at_the_end(self, evaluates: bool) -> Record:
        """The merged model, and this machine's as it was before; the merged one is written, too."""
        own = self._own or (self._score() if evaluates else {})
        with nullcontext() if self.method.is_merged else self.method.agreed():
            merged = self._score() if evaluates else {}
            if self.world.rank == 0:
                export_safetensors(self.model.state_dict(), self.config.folder / WEIGHTS)
        return {**merged, **_called(own, "own")}

    def _evaluate_own(self) -> None:
        """Before a merge of the schedule."""
        self._own = self._score()

    def _score(self) -> Record:
        train, validation = self.config.train, self.data.validation
        wanted = validation.count if train.eval_windows == "all" else train.eval_windows
        precision = computing(train.precision, self.world.device)
        result = evaluate_alone(
            self.model,
            validation,
            count=min(wanted, validation.count),
            batch=train.eval_batch,
            device=self.world.device,
            precision=precision,
        )
        domains = evaluate_domains(train, self.model, self.data, self.world, alone=True)
        return result.record() | domains

    def _calibrate(self) -> None:
        """For statistics that a merge has made void: the same batches of training data on all machines."""
        count = self._local.micro_batch
        for start in range(0, _CALIBRATION_BATCHES * count, count):
            batch = self.data.training_batch(range(start, start + count), self.world.device)
            with torch.no_grad(), computing(self.config.train.precision, self.world.device):
                self.model(batch.inputs)


def _called(record: Record, whose: str) -> Record:
    return {f"{whose}_{name}": value for name, value in record.items()}
