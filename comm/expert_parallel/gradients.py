"""The gradients of experts that several ranks hold, and the norm of those that a group has together."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from thinwire.comm.channel import Channel
from thinwire.comm.queue import CommQueue, Pending
from thinwire.comm.two_shot import TwoShotMean

WEIGHT_GRADIENTS, NORM = "experts/weight_gradients", "experts/norm"


class ExpertGradients:
    """What is left to do with the gradients of experts after the backward pass.

    There each expert has got sum over the P ranks r of its group of dL_r / dW. All R ranks together mean

        dL / dW = 1/R * sum over all R of dL_r / dW = 1/P * mean over the R/P ranks that hold the same experts.

    Args:
        queue: nobody else uses it meanwhile, the rows that travel least of all: they would wait for gradients.
        ranks: that share the experts, P of them. replicas: that hold the same experts; both ascending.
        wire_dtype: of gradients on the wire: torch.float32, torch.bfloat16 or torch.float16; sums are fp32.
    """

    def __init__(
        self, queue: CommQueue, ranks: Sequence[int], replicas: Sequence[int], *, wire_dtype: torch.dtype
    ) -> None:
        self._queue = queue
        self._ranks = list(ranks)
        self._replicas = list(replicas)
        self._mean = TwoShotMean(wire_dtype)
        self._pending: list[Pending[None]] = []

    def start(self, gradient: Tensor) -> None:
        """Begin to average a gradient that has been added up, while the backward pass goes on.

        Args:
            gradient: contiguous; replaced. The same parameter's on all ranks, in the same order.
        """
        if len(self._replicas) == 1:
            return
        flat = gradient.view(-1)
        self._pending.append(
            self._queue.submit(WEIGHT_GRADIENTS, lambda channel: self._mean(channel.among(self._replicas), flat))
        )

    def finish(self, gradients: Sequence[Tensor]) -> None:
        """Wait for all that were begun: these. They are the mean over all ranks then, the same bits on each replica."""
        pending, self._pending = self._pending, []
        assert len(pending) == (len(gradients) if len(self._replicas) > 1 else 0)
        for one in pending:
            one.wait()
        for gradient in gradients:
            gradient.div_(len(self._ranks))

    def total_norm(self, shared: Sequence[Tensor], held: Sequence[Tensor]) -> Tensor:
        """The norm of the whole model's gradient, the same bits on all ranks.

        Args:
            shared: gradients of what every rank has. held: of the experts here, averaged.
        """
        norm = torch.nn.utils.get_total_norm(shared)
        own = torch.nn.utils.get_total_norm(held).to(norm)
        norms = self._queue.submit(NORM, lambda channel: self._gather(channel, own)).wait()
        whole: Tensor = torch.linalg.vector_norm(torch.cat((norms, norm.view(1))))
        return whole

    def _gather(self, channel: Channel, norm: Tensor) -> Tensor:
        return channel.among(self._ranks).all_gather_same(norm.view(1)).flatten()

    def sent_bytes(self, numels: Sequence[int]) -> dict[str, int]:
        """Payload bytes that this rank sends per step, by level, for gradients of so many elements and their norm."""
        by_rank = Counter(norm_bytes(self._queue.rank, self._ranks))
        for numel in numels:
            by_rank.update(gradient_bytes(self._mean, numel, self._queue.rank, self._replicas))
        levels: dict[str, int] = defaultdict(int)
        for rank, count in by_rank.items():
            levels[self._queue.meter.level_of(self._queue.peers[rank])] += count
        return dict(levels)


def gradient_bytes(mean: TwoShotMean, numel: int, rank: int, replicas: Sequence[int]) -> dict[int, int]:
    """Payload bytes that `rank` sends for a gradient of so many elements, by the replica that it is sent to."""
    sent = mean.sent_bytes(numel, list(replicas).index(rank), len(replicas))
    return {replicas[place]: count for place, count in sent.items()}


def norm_bytes(rank: int, ranks: Sequence[int]) -> dict[int, int]:
    """Payload bytes that `rank` sends for the norm, by receiver."""
    return {other: torch.float32.itemsize for other in ranks if other != rank}
