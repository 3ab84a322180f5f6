"""Hadamard transforms of 32 values at a time: they spread an outlier over its neighbours before these are quantised."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from thinwire.kernels.triton_kernel import triton_part

if TYPE_CHECKING:
    import triton.language as tl

ORDER = 32
_STRIDES = (1, 2, 4, 8, 16)


def hadamard_reference(x: Tensor) -> Tensor:
    """H x for each 32 values of x, fp32 (32 n,), where H is Sylvester's matrix of +1 and -1: symmetric, H H = 32.

    Defined by its roundings: for strides 1, 2, 4, 8, 16 in turn, pairs (a, b) of that distance become (a + b, a - b).
    """
    rows = x.reshape(-1, ORDER)
    for stride in _STRIDES:
        pairs = rows.view(-1, ORDER // (2 * stride), 2, stride)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        rows = torch.stack((a + b, a - b), 2).view(-1, ORDER)
    return rows.view(-1)


class HadamardTile:
    """Transforms up to `most` values at a time on the CPU, in memory that is allocated once."""

    def __init__(self, most: int) -> None:
        self._one, self._other = torch.empty(most), torch.empty(most)
        self._columns = -1

    def transform(self, x: Tensor, out: Tensor) -> None:
        """Write the transform of x, fp32 (32 n,), to `out`, which may be x."""
        rows = x.view(-1, ORDER)
        if len(rows) != self._columns:
            self._lay_out(len(rows))
        # Values of the same place side by side, so that every addition runs over long rows.
        np.copyto(self._first, rows.numpy().T)  # twice as fast as PyTorch's
        for a, b, total, difference in self._rounds:
            torch.add(a, b, out=total)
            torch.sub(a, b, out=difference)
        out.view(-1, ORDER).copy_(self._last)

    def _lay_out(self, columns: int) -> None:
        """Make the views for as many 32s: that would take as long as the additions."""
        one, other = (memory[: ORDER * columns].view(ORDER, columns) for memory in (self._one, self._other))
        self._columns, self._first, self._rounds = columns, one.numpy(), []
        for stride in _STRIDES:
            shape = (ORDER // (2 * stride), 2, stride, columns)
            source, target = one.view(shape), other.view(shape)
            self._rounds.append((source[:, 0], source[:, 1], target[:, 0], target[:, 1]))
            one, other = other, one
        self._last = one.t()


@triton_part
def triton_hadamard(x: tl.tensor, COUNT: tl.constexpr) -> tl.tensor:
    """The transform of COUNT values, flat; COUNT is a multiple of 32."""
    # Each turn handles the lowest bit of the place, and makes it the highest: after five, all are where they were.
    for _ in tl.static_range(5):
        a, b = tl.split(tl.reshape(x, (COUNT // 32, 16, 2)))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (COUNT,))
    return x
