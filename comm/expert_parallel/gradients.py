"""The gradients of experts that several ranks hold, and the norm of those that a group has together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from thinwire.comm.channel import Channel
from thinwire.comm.queue import CommQueue
from thinwire.comm.two_shot import TwoShotMean


class ExpertGradients:
    """What is left to do with the gradients of experts after the backward pass.

    There each expert has got sum over the P ranks r of its group of dL_r / dW. All R ranks together mean

        dL / dW = 1/R * sum over all R of dL_r / dW = 1/P * mean over the R/P ranks that hold the same experts.

    Args:
        queue: as in ExpertExchange.
        ranks: that share the experts, P of them. replicas: that hold the same experts; both ascending.
    """

    def __init__(self, queue: CommQueue, ranks: Sequence[int], replicas: Sequence[int]) -> None:
        self._queue = queue
        self._ranks = list(ranks)
        self._replicas = list(replicas)
        self._mean = TwoShotMean(torch.float32)

    def average(self, gradients: Sequence[Tensor]) -> None:
        """Replace the sums over each group by the mean over all ranks: the same bits wherever an expert is held.

        Args:
            gradients: fp32, of the same parameters in the same order on all ranks.
        """
        if len(self._replicas) > 1 and gradients:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            self._queue.submit(
                "experts/weight_gradients", lambda channel: self._mean(channel.among(self._replicas), flat)
            ).wait()
            for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(mean.view_as(gradient))
        for gradient in gradients:
            gradient.div_(len(self._ranks))

    def total_norm(self, shared: Sequence[Tensor], held: Sequence[Tensor]) -> Tensor:
        """The norm of the whole model's gradient, the same bits on all ranks.

        Args:
            shared: gradients of what every rank has. held: of the experts here, averaged.
        """
        norm = torch.nn.utils.get_total_norm(shared)
        own = torch.nn.utils.get_total_norm(held).to(norm)
        norms = self._queue.submit("experts/norm", lambda channel: self._gather(channel, own)).wait()
        whole: Tensor = torch.linalg.vector_norm(torch.cat((norms, norm.view(1))))
        return whole

    def _gather(self, channel: Channel, norm: Tensor) -> Tensor:
        return channel.among(self._ranks).all_gather_same(norm.view(1)).flatten()

    def sent_bytes(self, numel: int) -> dict[str, int]:
        """Payload bytes that this rank sends per step for so many gradients and their norm, by level."""
        levels: dict[str, int] = {}
        place = self._replicas.index(self._queue.rank)
        sent = {self._replicas[r]: n for r, n in self._mean.sent_bytes(numel, place, len(self._replicas)).items()}
        for rank in self._ranks:
            if rank != self._queue.rank:
                sent[rank] = sent.get(rank, 0) + torch.float32.itemsize
        for rank, count in sent.items():
            level = self._queue.meter.level_of(self._queue.peers[rank])
            levels[level] = levels.get(level, 0) + count
        return levels
