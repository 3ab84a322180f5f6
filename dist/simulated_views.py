"""What can be seen of simulated machines from outside, where looking costs them nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from thinwire.dist.data import Batch
from thinwire.dist.evaluate import Evaluation, ValidationData, evaluate_alone
from thinwire.dist.task import computing

if TYPE_CHECKING:
    from thinwire.dist.train import TrainSettings


@dataclass(frozen=True)
class View:
    """All machines at a moment.

    step, least_step: of the fastest machine and the slowest. seconds: virtual. loss: mean of the machines' last steps.
    rms_distance: sqrt((1/n) sum_i |x_i - mean|^2) over the parameters that learn; rms_norm: sqrt((1/n) sum |x_i|^2).
    local: scores of some machines' own models; merged: of the mean's; None where nothing is to be scored. unmerged,
    unmerged_distance: local scores and rms_distance right before the merge that the run has ended with, if it has.
    sent_bytes: payload bytes by machine; kinds: by kind of message; edges: by (sender, receiver), but for control;
    messages: their number; exposed_s: virtual seconds of each machine in which it did not compute.
    """

    step: int
    least_step: int
    seconds: float
    alive: int
    loss: float
    rms_distance: float
    rms_norm: float
    local: Sequence[Evaluation]
    merged: Evaluation | None
    sent_bytes: Sequence[int]
    edges: Mapping[tuple[int, int], int]
    kinds: Mapping[str, int]
    messages: int
    exposed_s: Sequence[float]
    unmerged: Sequence[Evaluation] = ()
    unmerged_distance: float | None = None

    @property
    def local_loss(self) -> float:
        """Mean over the machines that were scored; nan if none were."""
        return math.fsum(score.loss for score in self.local) / len(self.local) if self.local else math.nan

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "step": self.step,
            "least_step": self.least_step,
            "seconds": self.seconds,
            "alive": self.alive,
            "loss": self.loss,
            "consensus_distance": self.rms_distance,
            "rms_norm": self.rms_norm,
            "local": [score.record() for score in self.local],
            "merged": self.merged.record() if self.merged else None,
            "sent_bytes": list(self.sent_bytes),
            "edges": [[*ends, count] for ends, count in self.edges.items()],
            "kinds": dict(self.kinds),
            "messages": self.messages,
            "exposed_s": list(self.exposed_s),
            "unmerged": [score.record() for score in self.unmerged],
            "unmerged_distance": self.unmerged_distance,
        }


def distances(vectors: Sequence[Tensor]) -> tuple[float, float]:
    """(sqrt of the consensus distance (1/n) sum |x_i - mean|^2, root of the mean of |x_i|^2), in fp64."""
    mean = torch.zeros(len(vectors[0]), dtype=torch.float64)
    for vector in vectors:
        mean += vector
    mean /= len(vectors)
    apart = math.fsum(float((vector - mean).square().sum()) for vector in vectors)
    length = math.fsum(float(vector.double().square().sum()) for vector in vectors)
    return math.sqrt(apart / len(vectors)), math.sqrt(length / len(vectors))


class Scorer:
    """Scores models on the run's validation data, which it reads once for all of them."""

    def __init__(self, train: TrainSettings, data: ValidationData, device: torch.device) -> None:
        self._train = train
        self._data = _Kept(data)
        self._device = device
        wanted = data.count if train.eval_windows == "all" else train.eval_windows
        self._count = min(wanted, data.count)

    def score(self, model: nn.Module) -> Evaluation | None:
        """None where train.eval_windows is 0."""
        if not self._count:
            return None
        return evaluate_alone(
            model,
            self._data,
            count=self._count,
            batch=self._train.eval_batch,
            device=self._device,
            precision=computing(self._train.precision, self._device),
        )


class _Kept:
    """Validation data whose batches are kept once made."""

    def __init__(self, data: ValidationData) -> None:
        self.count = data.count
        self.labelled = data.labelled
        self._data = data
        self._batches: dict[tuple[int, ...], Batch] = {}

    def batch(self, chosen: Sequence[int], device: torch.device) -> Batch:
        key = tuple(chosen)
        if key not in self._batches:
            self._batches[key] = self._data.batch(chosen, device)
        return self._batches[key]
