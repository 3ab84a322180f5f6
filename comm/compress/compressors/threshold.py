"""`threshold`: the entries above a threshold that is estimated from a sample."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field
from torch import Tensor

from thinwire.comm.compress.compressors.sparse import SparseCompressor, kept_count, values_contraction
from thinwire.comm.compress.draw import Draw
from thinwire.kernels.threshold_select import sampled_threshold, select_above


class Threshold(SparseCompressor):
    """Every entry whose magnitude reaches a threshold, chosen on a sample so that about density * numel do.

    Lin, Han, Mao, Wang, Dally (2017), arXiv 1712.01887. Between 0.8 and 1.3 times as many entries as asked for are
    sent, where so many are not zero; of equal magnitudes at the threshold all, or those of lower index up to 1.3 times.

    Attributes:
        density: kept / all, about; at least one entry is kept.
    """

    kind: Literal["threshold"] = "threshold"
    density: float = Field(default=0.01, gt=0, le=1)

    def expected_count(self, numel: int) -> int:
        return kept_count(self.density, None, numel)

    def keep(self, flat: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        numel = flat.numel()
        wanted = self.expected_count(numel)
        at_most = min(math.ceil(1.3 * wanted), numel)
        return select_above(flat, sampled_threshold(flat, wanted, draw.own_key()), at_most)

    def contraction(self, tensor: Tensor) -> float | None:
        """That of the largest 0.8 k entries."""
        numel = tensor.numel()
        count = math.ceil(0.8 * self.expected_count(numel))
        of_values = values_contraction(self.values, count)
        return None if of_values is None else count / numel * of_values
