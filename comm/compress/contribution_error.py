"""How much of what a rank wants to send its compressor leaves out: measured, in some of the steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from thinwire.comm.compress.decoded import Decoded, add_to

Memories = Sequence[tuple[Tensor, Tensor]]


class ContributionError:
    """||c - C(c)|| / ||c|| over all compressed tensors of a step, c being what this rank's compressor is given.

    With classic error feedback c is gradient + memory. What a collective does to the mean afterwards is not in it.

    Args:
        every: steps between two that are measured: it costs two passes over the tensors.
    """

    def __init__(self, every: int = 8) -> None:
        self.every = every
        self._due = False
        self._given = 0.0
        self._lost = 0.0

    def begin_step(self, step: int) -> None:
        """Forget the step before."""
        self._due = step % self.every == 0
        self._given = self._lost = 0.0

    def before(self, inputs: Sequence[Tensor], memories: Memories | None) -> Sequence[Tensor]:
        """Of a call of a collective that comes now; returns what after() needs of the inputs."""
        if not self._due:
            return ()
        for i, x in enumerate(inputs):
            self._given += _squared_norm(x if memories is None else x + memories[i][0])
        return () if memories is not None else [x.clone() for x in inputs]

    def after(self, kept: Sequence[Tensor], memories: Memories | None, sent: Sequence[Decoded]) -> None:
        """Of the same call, before the feedback changes its memories.

        Args:
            kept: what before() returned; is overwritten.
            sent: what this rank contributed, where there are no memories.
        """
        if not self._due:
            return
        if memories is not None:
            self._lost += sum(_squared_norm(following) for _, following in memories)
            return
        for c, contributed in zip(kept, sent, strict=True):
            add_to(c, contributed, -1.0)
            self._lost += _squared_norm(c)

    def metrics(self) -> dict[str, float]:
        """`compression_error` of the last step, if it was measured."""
        if not (0 < self._given < math.inf and math.isfinite(self._lost)):
            return {}
        return {"compression_error": math.sqrt(self._lost / self._given)}


def _squared_norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2
