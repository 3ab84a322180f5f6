"""OneByteSPSA: a torch optimizer that needs no backward pass and exchanges one byte per gradient."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from thinwire.comm.onebyte.advice import RangeWatch, warn_of_invisible_eps
from thinwire.comm.onebyte.byte_code import ABSENT, LARGEST, ZERO, ByteCode
from thinwire.comm.onebyte.canonical import canonical, check_groups, describe_run
from thinwire.comm.onebyte.cost import CostModel
from thinwire.comm.onebyte.errors import TornWeightsError
from thinwire.comm.onebyte.exchange import Exchange, MeteredExchange, Turn
from thinwire.comm.onebyte.fixed_exchange import FixedExchange
from thinwire.comm.onebyte.flood import FloodSettings
from thinwire.comm.onebyte.log import Log
from thinwire.comm.onebyte.measure import Closure, evaluating, measure
from thinwire.comm.onebyte.replica import Base, Replica
from thinwire.comm.onebyte.rounds import Round, Snapshot
from thinwire.comm.onebyte.settings import OneByteSettings
from thinwire.comm.queue import CommQueue, open_queue

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
        log: file for the committed rounds, one for each process that keeps one. If it exists, its rounds are carried
            out first: params must hold the weights at which that run began, and it goes on from where it was.
        group, queue: the ranks of a fixed job, by their process group or by a queue of theirs; default: all ranks if
            torch.distributed is initialised, otherwise this process alone.
        join: makes another exchange, such as membership.door.elastic(settings), whose machines may come and go:
            (manifest, log, replica) -> Exchange. It keeps the log, which must be given.
        base: gives the base weights again, by name, if those of this machine turn out to be wrong; None: it stops then.
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
        base: Base | None = None,
        **settings: Any,
    ) -> None:
        self.settings = OneByteSettings(lr=lr, **settings)
        defaults = {"lr": lr, "eps": self.settings.eps, "weight_decay": self.settings.weight_decay}
        super().__init__(params, defaults)
        check_groups(self.param_groups)
        if join is not None and (log is None or queue is not None or group is not None):
            raise ValueError("OneByteSPSA: join needs a log, and neither group nor queue")
        if join is not None and isinstance(self.settings.exchange, FloodSettings):
            raise ValueError("exchange: flood is for the ranks of a fixed job; with join, leave exchange out")
        tensors = canonical(self.param_groups)
        first_rate = float(self.param_groups[0]["lr"])
        self._ratios = [float(group["lr"]) / first_rate for group in self.param_groups]
        self.manifest = describe_run(tensors, self.settings, first_rate)
        manifest = self.manifest.to_bytes()
        parameters = [parameter for _, parameter, _ in tensors]
        warn_of_invisible_eps(zip(self.manifest.tensors, parameters, strict=True))
        self.replica = Replica(self.manifest, parameters, base)
        self._model = model
        self._code = ByteCode(self.manifest.numerics.floor_log2)
        self._watch = RangeWatch(self._code)
        self._cost = CostModel(self.replica.lattice, self.settings)
        self._fixed: FixedExchange | None = None
        self._own_queue: CommQueue | None = None
        self.log = _open_log(Path(log), manifest) if log is not None else None
        try:
            if self.log is not None:
                self.replica.apply([record for record in self.log if isinstance(record, Round)])
            if join is not None:
                assert self.log is not None
                self.exchange: Exchange = join(manifest, self.log, self.replica)
            else:
                if queue is None and dist.is_initialized():
                    queue = self._own_queue = open_queue(group)
                self.exchange = self._fixed = self._fixed_exchange(queue)
        except BaseException:
            if self.log is not None:
                self.log.close()  # or nobody else could write it
            raise
        self.turn = Turn(self.replica.rounds, 0, self.settings.samples)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As every optimizer, but only before the run begins: its tensors are part of the run."""
        if "manifest" in vars(self):
            raise ValueError(
                "OneByteSPSA: the tensors of a run are fixed when it begins; give all parameter groups at once"
            )
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> float:  # type: ignore[override]
        """Measure this machine's slopes, exchange them, and carry out what all have committed.

        Args:
            closure: computes the loss of this machine's batch, always the same one within a step, as an fp32 scalar.
        Returns: the mean of the finite losses that it computed; NaN if there is none.
        Raises:
            ValueError: no closure, a loss that is no fp32 scalar, or weights that somebody else has changed.
            CommError: the exchange failed; the weights are those before the step.
            WeightRangeError: the weights would grow beyond their grid; they are those before the step.
            ModelMismatchError: at a snapshot, the ranks do not have the same weights.
        """
        if closure is None:
            raise ValueError("OneByteSPSA.step needs a closure that computes the loss: there is no backward pass")
        rate = self._rate()
        self.replica.check_untouched()
        try:
            self.turn = turn = self.exchange.begin()
            with evaluating(self._model):
                losses, slopes = measure(self._cost.timed(closure), turn, self.replica, self.settings)
            codes = bytes(self._code.encode(slope) for slope in slopes)
            changes = self.exchange.commit(turn, codes, rate)
            self.replica.carry_out(changes)
        except BaseException:
            with contextlib.suppress(TornWeightsError):
                self.replica.restore()
            if self._fixed is not None:
                self._fixed.go_to(self.replica.rounds)
            raise
        rounds = [change.record for change in changes if isinstance(change.record, Round) and not change.undone]
        for round_ in rounds:
            self._watch.take(round_, slopes if round_.number == turn.round else ())
        if self._fixed is not None:
            self._write_down(rounds, self._fixed)
        if self.replica.newest is not None:
            self._cost.tell(_contributions(self.replica.newest))
        finite = [loss for loss in losses if math.isfinite(loss)]
        return math.fsum(finite) / len(finite) if finite else math.nan

    def describe(self) -> str:
        """What applying contributions costs beside measuring them. The first step logs it, too, once it knows."""
        newest = self.replica.newest
        return self._cost.describe(_contributions(newest) if newest else None)

    def predicted_bytes(self) -> dict[str, int]:
        """Bytes that this rank sends in a round of a fixed job, by level: one for each direction and other rank."""
        return self._fixed.predicted_bytes() if self._fixed else {}

    def metrics(self) -> dict[str, float]:
        """Of the last round: contributions; absent (no finite loss), saturated and zero ones; median size of slopes.

        Besides, what the exchange tells of itself.
        """
        newest = self.replica.newest
        codes = b"".join(c.codes for c in newest.contributions) if newest else b""
        sizes = [abs(self._code.values[code]) for code in codes if code != ABSENT]
        more = self.exchange.metrics() if isinstance(self.exchange, MeteredExchange) else {}
        return {
            "contributions": float(len(codes)),
            "absent": float(codes.count(ABSENT)),
            "saturated": float(sum(code & LARGEST == LARGEST for code in codes)),
            "zero": float(codes.count(ZERO)),
            "slope": statistics.median(sizes) if sizes else 0.0,
            **more,
        }

    def state_dict(self) -> dict[str, Any]:
        """Settings of the groups, and what the weights alone do not say."""
        own = {"run": self.manifest.run_id, "replica": self.replica.state()}
        if self._fixed is not None:
            own["exchange"] = self._fixed.state()
        return {**super().state_dict(), "onebyte": own}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take back what state_dict() gave, from any number of ranks: their replicas are equal.

        The weights come with the model's state. They must be those of the same moment. Rounds that were on their way
        over a graph go on if there are as many ranks as before, and are measured again otherwise.

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
        rounds = own["replica"]["progress"]["rounds"]
        if self.log is not None and rounds != self.log.rounds:
            raise ValueError(
                f"OneByteSPSA: the state is after {rounds} rounds, {self.log.path} has {self.log.rounds}. The log is "
                "the checkpoint: build the optimizer on the base weights with it, and load no state"
            )
        super().load_state_dict(state)
        self.replica.load(own["replica"])
        if self._fixed is not None:
            if "all_ranks" not in state_dict:
                self._fixed.load(own.get("exchange", {}))
            self._fixed.go_to(self.replica.rounds)

    def remove(self) -> None:
        """Leave the exchange; the weights stay as they are."""
        self.exchange.close()
        if self._own_queue is not None:
            self._own_queue.close()
        if self.log is not None:
            self.log.close()

    def _fixed_exchange(self, queue: CommQueue | None) -> FixedExchange:
        flood = self.settings.exchange if isinstance(self.settings.exchange, FloodSettings) else None
        exchange = FixedExchange(queue, self.manifest, self.settings.samples, self.replica.rounds, flood)
        if self.log is not None:
            last = self.log.roster
            roster = exchange.roster(last.epoch + 1 if last else 0)
            if last is None or last.members != roster.members:
                self.log.append(roster)
        return exchange

    def _write_down(self, rounds: Sequence[Round], exchange: FixedExchange) -> None:
        """Into the log of a fixed job; and see whether all ranks have the same weights, where a snapshot is due."""
        for round_ in rounds:
            if self.log is not None:
                self.log.append(round_)
            if self.replica.is_snapshot(round_.number):
                model_hash = self.replica.model_hash()
                exchange.compare_models(self.replica.rounds, model_hash)
                if self.log is not None:
                    self.log.append(Snapshot(self.replica.rounds, model_hash))
                    self.log.sync()

    def _rate(self) -> float:
        """The learning rate of the first group as an fp32 number; the others keep their ratio to it."""
        first = float(self.param_groups[0]["lr"])
        for ratio, group in zip(self._ratios, self.param_groups, strict=True):
            if not math.isclose(group["lr"], first * ratio, rel_tol=1e-6):
                raise ValueError(
                    f"OneByteSPSA: a group's lr is {group['lr']}, but {ratio:g} times the first group's, {first}, is "
                    "part of the run: change all groups' lr by the same factor"
                )
        if not 0 <= first < math.inf:
            raise ValueError(f"OneByteSPSA: lr is {first}; it must be a finite number, not below 0")
        return float(torch.tensor(first, dtype=torch.float32))


def _contributions(round_: Round) -> int:
    return sum(len(contribution.codes) for contribution in round_.contributions)


def _open_log(path: Path, manifest: bytes) -> Log:
    if not Log.begun(path):
        return Log.create(path, manifest)
    log = Log.open(path)
    if log.manifest != manifest:
        log.close()
        raise ValueError(
            f"OneByteSPSA: {path} is the log of another run: other base weights, parameters or settings. Give the "
            "weights at which that run began and its settings, or another log"
        )
    return log
