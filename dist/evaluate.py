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
) -> Evaluation:
    """Score `count` windows or examples, spread evenly over the data, `batch` at a time.

    Batch number b is always made of the same and goes to rank b mod size. Each rank tells its batches' sums of
    nats in fp64, and math.fsum rounds their total once, so the order does not matter.

    Args:
        model: gives scores; its mode is restored.
        precision: context to compute in, such as an autocast.
    """
    firsts = range(0, count, batch)
    rounds = math.ceil(len(firsts) / queue.size)
    sums = torch.zeros(rounds, 3, dtype=torch.float64)  # nats, targets, bytes of text or right classes
    was_training = model.training
    model.eval()
    with torch.no_grad(), precision:
        for row, first in enumerate(firsts[queue.rank :: queue.size]):
            chosen = [i * data.count // count for i in range(first, min(first + batch, count))]
            part = data.batch(chosen, device)
            targets = part.targets.flatten()
            scores = model(part.inputs).float().flatten(0, -2)
            nats = F.cross_entropy(scores, targets, reduction="none").double().sum()
            third = int((scores.argmax(-1) == targets).sum()) if part.text_bytes is None else part.text_bytes
            sums[row] = torch.tensor([float(nats), len(targets), third])
    model.train(was_training)
    gathered = queue.submit("control/evaluation", lambda channel: channel.all_gather_same(sums)).wait()
    total_nats, scored, measured = (math.fsum(column) for column in gathered.flatten(0, 1).T.tolist())
    if data.labelled:
        return Evaluation(loss=total_nats / scored, bits_per_byte=math.nan, accuracy=measured / scored)
    return Evaluation(loss=total_nats / scored, bits_per_byte=total_nats / measured / math.log(2), accuracy=math.nan)
