"""Loss on the validation data, the same to the last bit however many ranks share the work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from thinwire.comm.queue import CommQueue
from thinwire.dist.data import Batch


class ValidationData(Protocol):
    """count: how many windows or examples there are. labelled: whether the targets are classes, not the next tokens."""

    count: int
    labelled: bool

    def batch(self, chosen: Sequence[int], device: torch.device) -> Batch:
        """Those with these numbers, in this order."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """loss: nats per token or example. bits_per_byte: of text, comparable between tokenizers; nan for classes.

    accuracy: share of the classes that have the highest score; nan for text.
    """

    loss: float
    bits_per_byte: float
    accuracy: float

    def record(self) -> dict[str, float]:
        """What a step's record says of it."""
        other = {"val_bits_per_byte": self.bits_per_byte, "val_accuracy": self.accuracy}
        return {"val_loss": self.loss} | {name: value for name, value in other.items() if not math.isnan(value)}


def evaluate(
    model: nn.Module,
    data: ValidationData,
    *,
    count: int,
    batch: int,
    queue: CommQueue,
    device: torch.device,
    precision: AbstractContextManager[Any],
    forward_is_collective: bool = False,
) -> Evaluation:
    """Score `count` windows or examples, spread evenly over the data, `batch` at a time.

    Batch number b is always made of the same and goes to rank b mod size. Each rank tells its batches' sums of
    nats in fp64, and math.fsum rounds their total once, so the order does not matter.

    Args:
        model: gives scores; its mode is restored.
        precision: context to compute in, such as an autocast.
        forward_is_collective: whether a rank without a batch of its own in the last round must compute all the same.
    """
    firsts = range(0, count, batch)
    rounds = math.ceil(len(firsts) / queue.size)
    mine = firsts[queue.rank :: queue.size]
    sums = torch.zeros(rounds, 3, dtype=torch.float64)
    extra = firsts[: rounds - len(mine)] if forward_is_collective else []
    scored = _score(model, data, [*mine, *extra], count, batch, device, precision)
    for row, part in enumerate(scored[: len(mine)]):
        sums[row] = torch.tensor(part)
    gathered = queue.submit("control/evaluation", lambda channel: channel.all_gather_same(sums)).wait()
    return _of_sums(gathered.flatten(0, 1).T.tolist(), data.labelled)


def evaluate_alone(
    model: nn.Module,
    data: ValidationData,
    *,
    count: int,
    batch: int,
    device: torch.device,
    precision: AbstractContextManager[Any],
) -> Evaluation:
    """As evaluate(), to the last bit, by this rank alone: it may score a model that is its own."""
    sums = _score(model, data, range(0, count, batch), count, batch, device, precision)
    return _of_sums([list(column) for column in zip(*sums, strict=True)], data.labelled)


def _score(
    model: nn.Module,
    data: ValidationData,
    firsts: Sequence[int],
    count: int,
    batch: int,
    device: torch.device,
    precision: AbstractContextManager[Any],
) -> list[tuple[float, float, float]]:
    """For each batch: nats, targets, and bytes of text or right classes."""
    sums = []
    was_training = model.training
    model.eval()
    with torch.no_grad(), precision:
        for first in firsts:
            chosen = [i * data.count // count for i in range(first, min(first + batch, count))]
            part = data.batch(chosen, device)
            targets = part.targets.flatten()
            scores = model(part.inputs).float().flatten(0, -2)
            nats = F.cross_entropy(scores, targets, reduction="none").double().sum()
            third = int((scores.argmax(-1) == targets).sum()) if part.text_bytes is None else part.text_bytes
            sums.append((float(nats), float(len(targets)), float(third)))
    model.train(was_training)
    return sums


def _of_sums(columns: Sequence[Sequence[float]], labelled: bool) -> Evaluation:
    total_nats, scored, measured = (math.fsum(column) for column in columns)
    if labelled:
        return Evaluation(loss=total_nats / scored, bits_per_byte=math.nan, accuracy=measured / scored)
    return Evaluation(loss=total_nats / scored, bits_per_byte=total_nats / measured / math.log(2), accuracy=math.nan)
