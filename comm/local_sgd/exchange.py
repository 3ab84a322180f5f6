"""The exchange at the end of a round: a compressed mean of what all ranks have changed."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from thinwire.comm.compress.handle import CompressedExchange
from thinwire.comm.compress.settings import CompressSettings
from thinwire.comm.queue import CommQueue


class RoundExchange(CompressedExchange):
    """Exchanges all named tensors at once, in buckets, when it is asked to.

    Args:
        settings: what is sent.
        shapes: of the tensors, by name; the same on every rank, as is their order.
        queue: joins the ranks.
        bucket_bytes: tensors go in pieces of about this size, which bounds the memory of what is under way.
    """

    def __init__(
        self, settings: CompressSettings, shapes: Mapping[str, torch.Size], queue: CommQueue, bucket_bytes: float
    ) -> None:
        self._names = _in_buckets(shapes, bucket_bytes)
        super().__init__(settings, shapes, queue, buckets=self._names, operation="local_sgd")

    def mean(self, values: Mapping[str, Tensor]) -> bool:
        """values <- 1/n sum_r C(values_r), in place; False, and nothing is remembered, if any is not finite."""
        self.begin()
        self.send_all([{name: values[name] for name in names} for names in self._names])
        return self.finish()

    def remove(self) -> None:
        """Nothing: it does only what it is asked to."""


def _in_buckets(shapes: Mapping[str, torch.Size], bucket_bytes: float) -> list[list[str]]:
    buckets: list[list[str]] = []
    held = math.inf
    for name, shape in shapes.items():
        if held >= bucket_bytes:
            buckets.append([])
            held = 0
        buckets[-1].append(name)
        held += 4 * shape.numel()
    return buckets
