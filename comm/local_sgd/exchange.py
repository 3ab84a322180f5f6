"""The exchange at the end of a round: a compressed mean of what all ranks have changed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from thinwire.comm.compress.handle import CompressedExchange, in_groups
from thinwire.comm.compress.settings import CompressSettings
from thinwire.comm.queue import CommQueue


class RoundExchange(CompressedExchange):
    """Exchanges all named tensors when it is asked to.

    Args:
        settings: what is sent.
        shapes: of the tensors, by name; the same on every rank, as is their order.
        queue: joins the ranks.
        group_bytes: tensors go in groups of about this size, which bounds the memory of what is under way.
    """

    def __init__(
        self, settings: CompressSettings, shapes: Mapping[str, torch.Size], queue: CommQueue, group_bytes: int
    ) -> None:
        super().__init__(settings, shapes, queue, groups=in_groups(shapes, group_bytes), operation="local_sgd")
        self._pipeline.error.every = 1  # a round is rare enough

    def mean(self, values: Mapping[str, Tensor]) -> bool:
        """values <- 1/n sum_r C(values_r), in place; False, and nothing is remembered, if any is not finite."""
        self.begin()
        self.send_all([values])
        return self.finish()

    def remove(self) -> None:
        """Nothing: it does only what it is asked to."""
