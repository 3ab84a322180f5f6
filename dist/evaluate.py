"""Loss on the validation text, the same to the last bit however many ranks share the work."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from thinwire.comm.queue import CommQueue
from thinwire.dist.data import Windows


@dataclass(frozen=True)
class Evaluation:
    """loss: nats per token. bits_per_byte: bits per byte of text, comparable between tokenizers."""

    loss: float
    bits_per_byte: float


def evaluate(
    model: nn.Module,
    windows: Windows,
    *,
    count: int,
    batch: int,
    queue: CommQueue,
    device: torch.device,
    precision: AbstractContextManager[Any],
) -> Evaluation:
    """Score `count` windows, spread evenly over the text, `batch` at a time.

    Batch number b is always made of the same windows and goes to rank b mod size. Each rank tells its batches' sums of
    nats in fp64, and math.fsum rounds their total once, so the order does not matter.

    Args:
        model: gives logits; its mode is restored.
        precision: context to compute in, such as an autocast.
    """
    firsts = range(0, count, batch)
    rounds = math.ceil(len(firsts) / queue.size)
    sums = torch.zeros(rounds, 3, dtype=torch.float64)  # nats, tokens, bytes of text
    was_training = model.training
    model.eval()
    with torch.no_grad(), precision:
        for row, first in enumerate(firsts[queue.rank :: queue.size]):
            chosen = [i * windows.count // count for i in range(first, min(first + batch, count))]
            part = windows.batch(chosen, device)
            logits = model(part.inputs).float().flatten(0, 1)
            nats = F.cross_entropy(logits, part.targets.flatten(), reduction="none").double().sum()
            sums[row] = torch.tensor([float(nats), part.targets.numel(), part.text_bytes])
    model.train(was_training)
    gathered = queue.submit("control/evaluation", lambda channel: channel.all_gather_same(sums)).wait()
    total_nats, tokens, text_bytes = (math.fsum(column) for column in gathered.flatten(0, 1).T.tolist())
    return Evaluation(loss=total_nats / tokens, bits_per_byte=total_nats / text_bytes / math.log(2))
