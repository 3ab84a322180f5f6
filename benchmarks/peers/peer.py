"""What every peer's run is made of, and the plain loop that most of them have."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from thinwire.dist.config import RunConfig
from thinwire.dist.data import Batch, Data
from thinwire.dist.models import build_model
from thinwire.dist.optimizers import build_optimizer

EVERY = 10  # local steps of a round, for peers that have rounds
OUTER_LR, OUTER_MOMENTUM = 0.7, 0.9  # of DiLoCo, Douillard et al. 2023 (2311.08105)


@dataclass(frozen=True)
class Job:
    """One rank's part of a run. folder: common to all ranks of the lab. address: of this rank's host."""

    config: RunConfig
    folder: Path
    rank: int
    size: int
    local_size: int
    address: str
    head: str
    data: Data

    def model(self) -> nn.Module:
        """With the same weights on every rank."""
        vocab = self.data.tokenizer.vocab
        return build_model(self.config.model, tokenizer_vocab=vocab, seed=self.config.seed, device=torch.device("cpu"))

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """As `thinwire train` builds it."""
        return build_optimizer(self.config.optimizer, model)


class Peer:
    """A model with its optimizer; a peer overrides what it does in another way.

    network: what is evaluated. wrapped: what a training step calls, with the same parameters.
    """

    forward_is_collective = False

    def __init__(self, job: Job, network: nn.Module, wrapped: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.job = job
        self.network = network
        self.wrapped = wrapped
        self.optimizer = optimizer

    def step(self, batch: Batch, lr: float) -> float:
        """One optimizer step; returns this rank's loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = self.loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.job.config.train.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def loss(self, batch: Batch) -> torch.Tensor:
        """Mean over this rank's sequences."""
        return F.cross_entropy(self.wrapped(batch.inputs).flatten(0, 1), batch.targets.flatten())

    def close(self) -> None:
        """After the last step, on all ranks."""
