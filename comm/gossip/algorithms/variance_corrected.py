"""Variance-corrected averaging: an average of unlike tensors is scaled back to the spread that each of them had."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from thinwire.comm.gossip.algorithm import AlgorithmSettings, Parts
from thinwire.comm.gossip.algorithms.in_rounds import InRounds, Wire, mixer_of
from thinwire.comm.gossip.mixer import Mixer
from thinwire.comm.gossip.port import Script
from thinwire.comm.gossip.replica import Replica
from thinwire.comm.gossip.turn import Turn

Follow = Literal["conservative", "others", "self"]
_NEGLIGIBLE = 1.01  # a factor below this corrects nothing that matters, and would move the mean


class VarianceCorrectedSettings(AlgorithmSettings):
    """`algorithm: {kind: variance_corrected}`, for machines that begin with unlike weights.

    rounds: of the run that are corrected; afterwards it is dpsgd, exact in the mean.
    follow: which variance an averaged tensor is given: conservative: the mixing's average of the variances; others: the
    same of the neighbours alone; self: what it was before.
    wire: what weights are rounded to on the way.
    """

    kind: Literal["variance_corrected"] = "variance_corrected"
    rounds: int = Field(100, ge=0)
    follow: Follow = "conservative"
    wire: Wire = "fp32"

    equal_start: ClassVar[bool] = False

    def build(self, parts: Parts) -> VarianceCorrected:
        """The algorithm of one machine."""
        return VarianceCorrected(
            parts.replica, mixer_of(parts, self.wire), parts.port.rank, rounds=self.rounds, follow=self.follow
        )


class VarianceCorrected(InRounds):
    """Variance-corrected averaging (Valerio et al. 2024, 2404.04616), adapt then combine.

    The average of k independent tensors of one variance has 1/k of it, less than networks are initialised with to train
    at all. In the first `rounds` rounds, for each tensor t with var(t) its unbiased variance over all elements,

        a = sum_j w_ij t_j;   v = sum_j w_ij var(t_j)        (follow "conservative")
        f = sqrt(v / var(a));   t_i <- mean(a) + f (a - mean(a)) where f >= 1.01, else t_i <- a

    follow "others": v = sum_{j != i} w_ij var(t_j) / (1 - w_ii). follow "self": v = var(t_i). Variances travel as one
    more element per tensor, and are mixed with the same weights; zeros once the rounds are over.

    Unlike the paper a tensor is never shrunk, and one that needs less than 1 % is left alone: the factor is not linear,
    so it does not keep the mean of the weights over the machines. Of a tensor with one element, or whose elements are
    all equal, nothing is changed. What is kept in every round, late flows included, is the mean of each tensor's mean;
    after `rounds` rounds the mean of the weights, exactly. Machines that begin alike have f = 1. Of a sharded tensor
    the variance is the shard's.

    Args:
        mixer: of the rounds, for vectors of the weights and one element per learned tensor.
        rank: of this machine.
        rounds, follow: see above.
    """

    def __init__(self, replica: Replica, mixer: Mixer, rank: int, *, rounds: int, follow: Follow) -> None:
        super().__init__(replica, mixer, replica.numel + len(replica.sizes))
        self._rank = rank
        self._rounds = rounds
        self._follow = follow
        self._corrected = 0
        self._largest = 1.0

    def after_step(self, turn: Turn) -> Script[None]:
        """As Algorithm says."""
        if turn.mixing is None:
            return
        weights = self._replica.weights()
        corrects = turn.round < self._rounds
        own = self._variances(weights) if corrects else torch.zeros_like(weights[: len(self._replica.sizes)])
        value = torch.cat([weights, own])
        mixed = yield from self._exchange(turn.round, turn.mixing, value)
        average, target = mixed.onto(value).split([self._replica.numel, len(own)])
        if corrects:
            own_weight = turn.mixing.rows[self._rank].get(self._rank, 0.0)
            average = self._scaled(average, self._target(target, own, own_weight))
        self._replica.set_weights(average)

    def drain(self) -> Script[None]:
        """As Algorithm says."""
        late = yield from self._mixer.settle()
        if late is not None:
            weights = self._replica.weights()
            flat = torch.nn.functional.pad(weights, (0, len(self._replica.sizes)))
            self._replica.set_weights(late.onto(flat)[: self._replica.numel].clone())

    def metrics(self) -> dict[str, float]:
        """What the mixer says; of the last corrected round `corrected` tensors and `largest_factor`."""
        return {**super().metrics(), "corrected": float(self._corrected), "largest_factor": self._largest}

    def merged(self) -> None:
        """Nothing to forget."""

    def _variances(self, weights: Tensor) -> Tensor:
        parts = weights[: self._learned].split(list(self._replica.sizes))
        return torch.stack([part.var() if part.numel() > 1 else part.new_zeros(()) for part in parts])

    def _target(self, mixed: Tensor, own: Tensor, own_weight: float) -> Tensor:
        if self._follow == "self" or own_weight >= 1.0:
            return own
        # Where a neighbour is late its weight is with this machine's own, and the rest is still a weighted mean.
        return (mixed - own_weight * own) / (1.0 - own_weight) if self._follow == "others" else mixed

    def _scaled(self, average: Tensor, target: Tensor) -> Tensor:
        factors = (target / self._variances(average)).sqrt()
        scales = (factors >= _NEGLIGIBLE) & factors.isfinite()  # neither of 0/0 nor of the square root of less than 0
        out = average.clone()
        for part, factor, scale in zip(
            out[: self._learned].split(list(self._replica.sizes)), factors.tolist(), scales.tolist(), strict=True
        ):
            if scale:
                mean = part.mean()
                part.sub_(mean).mul_(factor).add_(mean)
        self._corrected = int(scales.sum())
        self._largest = max([1.0, *factors[scales].tolist()])
        return out
