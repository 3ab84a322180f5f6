"""OneByteSPSA: a torch optimizer that needs no backward pass and exchanges one byte per gradient."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from thinwire.comm.onebyte.byte_code import ABSENT, LARGEST, ZERO, ByteCode
from thinwire.comm.onebyte.canonical import canonical, describe_run
from thinwire.comm.onebyte.exchange import Change, Exchange, Turn
from thinwire.comm.onebyte.fixed_exchange import FixedExchange
from thinwire.comm.onebyte.log import Log
from thinwire.comm.onebyte.replica import Replica
from thinwire.comm.onebyte.rounds import SHARED_SLOT, Round, Snapshot
from thinwire.comm.onebyte.settings import OneByteSettings
from thinwire.comm.onebyte.stream import place
from thinwire.comm.queue import CommQueue, open_queue

Closure: TypeAlias = Callable[[], Tensor | float]
Join: TypeAlias = Callable[[bytes, Log, Replica], Exchange]


class OneByteSPSA(torch.optim.Optimizer):
    """Trains by forward passes alone; the machines of a run stay equal bit for bit and exchange a byte per gradient.

    SPSA: Spall 1992; for language models MeZO, Malladi et al. 2023 (2305.17333); between machines Zelikman et al. 2023
    (2306.10015). Machine m draws direction z (entries +1 or -1) of (round, m, sample) from a stream that all share, and
    measures its slope

        g = (L(w + eps z) - L(w - eps z)) / (2 eps),

    of which every machine learns one byte. Then w <- w - lr * sum_s g_s z_s / N over all N slopes of the round.

    Differs from the papers: weights lie on a grid on which all of this is exact (lattice.py), so there is no drift, no
    difference between machines, and a run is its base weights and a log of its bytes.

    Args:
        params: (name, parameter) pairs such as model.named_parameters(), or groups of them, each of which may have its
            own lr, eps and weight_decay. fp32, bf16 or fp16 (then with an fp32 master). Those without requires_grad
            stay as they are. fp32 weights are rounded to their grid: by 2^-23 of the tensor's largest, or less.
        model: is put into evaluation mode during step(), so that dropout and batch statistics are the same for both
            losses; None: see to that yourself. Random numbers that the closure draws from torch are the same anyhow.
        log: file for the committed rounds. If it exists, its rounds are carried out first: params must hold the weights
            at which that run began, and it goes on from where it was.
        group, queue: the ranks of a fixed job, by their process group or by a queue of theirs; default: all ranks if
            torch.distributed is initialised, otherwise this process alone.
        join: makes another exchange, such as one whose machines may come and go: (manifest, log, replica) -> Exchange.
            It keeps the log, which must be given.
        settings: the keywords of settings.OneByteSettings: eps, samples, directions, robust and so on.
    Attributes: turn, the round and slot that step() measures at present, by which its closure may choose its batch.
    Raises:
        ValueError: a setting, parameter or log that does not fit; ranks that do not have the same.

        optimizer = tw.OneByteSPSA(model.named_parameters(), lr=1e-6, eps=1e-3, model=model)
        loss = optimizer.step(lambda: F.cross_entropy(model(x).float(), y))
    """

    def __init__(
        self,
        params: Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        lr: float = 1e-6,
        *,
        model: nn.Module | None = None,
        log: str | Path | None = None,
        group: ProcessGroup | None = None,
        queue: CommQueue | None = None,
        join: Join | None = None,
        **settings: Any,
    ) -> None:
        self.settings = OneByteSettings(lr=lr, **settings)
        defaults = {"lr": lr, "eps": self.settings.eps, "weight_decay": self.settings.weight_decay}
        super().__init__(params, defaults)
        if any("param_names" not in group for group in self.param_groups):
            raise ValueError("OneByteSPSA: parameters without names; give model.named_parameters()")
        if join is not None and (log is None or queue is not None or group is not None):
            raise ValueError("OneByteSPSA: join needs a log, and neither group nor queue")
        tensors = canonical(self.param_groups)
        self.manifest = describe_run(tensors, self.settings)
        manifest = self.manifest.to_bytes()
        self.replica = Replica(self.manifest, [parameter for _, parameter, _ in tensors])
        self.log = _open_log(Path(log), manifest) if log is not None else None
        if self.log is not None:
            self.replica.apply([record for record in self.log if isinstance(record, Round)])
        self._ratios = [group["lr"] / self.param_groups[0]["lr"] for group in self.param_groups]
        self._model = model
        self._code = ByteCode(self.manifest.numerics.floor_log2)
        self._last: Round | None = None
        self.turn = Turn(self.replica.rounds, 0, self.settings.samples)
        if queue is None and join is None and dist.is_initialized():
            queue = open_queue(group)
        self._fixed: FixedExchange | None = None
        if join is not None:
            assert self.log is not None
            self.exchange: Exchange = join(manifest, self.log, self.replica)
        else:
            self._fixed = FixedExchange(queue, manifest, self.settings.samples, self.replica.rounds)
            self.exchange = self._fixed
            if self.log is not None and not _has_roster(self.log, self._fixed):
                epoch = self.log.roster.epoch + 1 if self.log.roster else 0  # other ranks than before go on
                self.log.append(dataclasses.replace(self._fixed.roster, epoch=epoch))

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float:  # type: ignore[override]
        """Measure this machine's slopes, exchange them, and carry out what all have committed.

        Args:
            closure: computes the loss of this machine's batch, always the same one within a step, as an fp32 scalar.
        Returns: the mean of the losses that it computed.
        Raises:
            ValueError: no closure, or a loss that is no fp32 scalar.
            CommError: the exchange failed; the weights are those before the step.
            WeightRangeError: the weights have grown beyond their grid.
        """
        if closure is None:
            raise ValueError("OneByteSPSA.step needs a closure that computes the loss: there is no backward pass")
        rate = self._rate()
        self.turn = turn = self.exchange.begin()
        try:
            with self._still():
                losses, codes = self._measure(turn, closure)
            changes = self.exchange.commit(turn, codes, rate)
        except BaseException:
            self.replica.restore()
            raise
        self._carry_out(changes)
        return math.fsum(losses) / len(losses)

    def predicted_bytes(self) -> dict[str, int]:
        """Bytes that this rank sends in a round of a fixed job, by level: one for each direction and other rank."""
        return self._fixed.predicted_bytes() if self._fixed else {}

    def metrics(self) -> dict[str, float]:
        """Of the last round: contributions; absent (no finite loss), saturated and zero ones; median size of slopes."""
        codes = b"".join(c.codes for c in self._last.contributions) if self._last else b""
        sizes = [abs(self._code.values[code]) for code in codes if code != ABSENT]
        return {
            "contributions": float(len(codes)),
            "absent": float(codes.count(ABSENT)),
            "saturated": float(sum(code & LARGEST == LARGEST for code in codes)),
            "zero": float(codes.count(ZERO)),
            "slope": statistics.median(sizes) if sizes else 0.0,
        }

    def state_dict(self) -> dict[str, Any]:
        """Settings of the groups, and what the weights alone do not say."""
        return {**super().state_dict(), "onebyte": {"run": self.manifest.run_id, "replica": self.replica.state()}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take back what state_dict() gave, from any number of ranks: their states are equal.

        Raises:
            ValueError: the state is of another run, or not where this run's log is.
        """
        state = dict(state_dict["all_ranks"][0] if "all_ranks" in state_dict else state_dict)
        own = state.pop("onebyte", None)
        if own is None or own["run"] != self.manifest.run_id:
            raise ValueError(
                "OneByteSPSA: the state is of another run: other base weights, parameters or settings; build the "
                "optimizer on the weights at which the run began"
            )
        super().load_state_dict(state)
        self.replica.load(own["replica"])
        if self._fixed is not None:
            self._fixed.go_to(self.replica.rounds)

    def remove(self) -> None:
        """Leave the exchange; the weights stay as they are."""
        self.exchange.close()
        if self.log is not None:
            self.log.close()

    def _measure(self, turn: Turn, closure: Closure) -> tuple[list[float], bytes]:
        """The losses computed, and the codes of this machine's slopes."""
        eps = math.ldexp(1.0, self.manifest.numerics.eps_log2)
        slot = SHARED_SLOT if self.settings.directions == "shared" else turn.slot
        two_sided = self.settings.estimate == "two_sided"
        random = _random_state()
        losses: list[float] = []
        slopes: list[float] = []

        def evaluate() -> float:
            _set_random_state(random)
            losses.append(_checked(closure()))
            return losses[-1]

        self.replica.restore()
        middle = 0.0 if two_sided else evaluate()
        for sample in range(turn.samples):
            direction = place(turn.round, slot, sample)
            self.replica.perturb(direction, 1)
            ahead = evaluate()
            if two_sided:
                self.replica.perturb(direction, -1)
                slopes.append((ahead - evaluate()) / (2 * eps))
            else:
                slopes.append((ahead - middle) / eps)
        return losses, bytes(self._code.encode(slope) for slope in slopes)

    def _carry_out(self, changes: Sequence[Change]) -> None:
        """Apply rounds that follow one another together, and take back those that others have not committed."""
        waiting: list[Round] = []
        for record, undone in changes:
            if not isinstance(record, Round):
                continue
            if undone:
                self.replica.apply(waiting)
                waiting = []
                self.replica.undo(record)
            else:
                waiting.append(record)
                self._last = record
        self.replica.apply(waiting)
        self.replica.restore()
        if self._fixed is not None and self.log is not None:
            for round_ in waiting:
                self.log.append(round_)
                if self.replica.is_snapshot(round_.number):
                    self.log.append(Snapshot(self.replica.rounds, self.replica.model_hash()))
                    self.log.sync()

    def _rate(self) -> float:
        """The learning rate of the first group as an fp32 number; the others keep their ratio to it."""
        first = self.param_groups[0]["lr"]
        for ratio, group in zip(self._ratios, self.param_groups, strict=True):
            if not math.isclose(group["lr"], first * ratio, rel_tol=1e-6):
                raise ValueError(
                    f"OneByteSPSA: a group's lr is {group['lr']}, but {ratio:g} times the first group's, {first}, is "
                    "part of the run: change all groups' lr by the same factor"
                )
        return float(torch.tensor(first, dtype=torch.float32))

    @contextlib.contextmanager
    def _still(self) -> Iterator[None]:
        """Evaluation mode, each module's own mode restored after it."""
        modules = list(self._model.modules()) if self._model is not None else []
        modes = [module.training for module in modules]
        for module in modules:
            module.training = False
        try:
            yield
        finally:
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode


def _open_log(path: Path, manifest: bytes) -> Log:
    if not path.exists():
        return Log.create(path, manifest)
    log = Log.open(path)
    if log.manifest != manifest:
        log.close()
        raise ValueError(
            f"OneByteSPSA: {path} is the log of another run: other base weights, parameters or settings. Give the "
            "weights at which that run began and its settings, or another log"
        )
    return log


def _has_roster(log: Log, exchange: FixedExchange) -> bool:
    return log.roster is not None and log.roster.members == exchange.roster.members


def _checked(loss: Tensor | float) -> float:
    if isinstance(loss, Tensor):
        if loss.numel() != 1:
            raise ValueError(
                f"OneByteSPSA: the closure gave a loss of shape {tuple(loss.shape)}; give its mean, a scalar"
            )
        if loss.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"OneByteSPSA: the closure gave a {loss.dtype} loss, too coarse for its difference over 2 eps to mean "
                "anything; compute it in fp32: F.cross_entropy(logits.float(), targets)"
            )
    return float(loss)


def _random_state() -> tuple[Tensor, list[Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
