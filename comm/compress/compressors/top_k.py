"""`topk`: the entries of largest magnitude."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from thinwire.comm.compress.compressors.sparse import (
    SparseCompressor,
    kept_count,
    refuse_two_sizes,
    values_contraction,
    with_default_density,
)
from thinwire.comm.compress.draw import Draw
from thinwire.kernels.chunk_topk import chunk_top_k
from thinwire.kernels.threshold_select import select_with_feedback, top_k


class TopK(SparseCompressor):
    """The k entries of largest magnitude, of the tensor or of each chunk of it; of equal ones those of lower index.

    ||C(x) - x||^2 <= (1 - k / numel) ||x||^2 where values are fp32. Zeros are never sent.

    Attributes:
        density: kept / all; at least one entry is kept. 0.01 where neither density nor k is given.
        k: entries to keep instead, of each chunk if `chunk` is given, otherwise of the whole tensor.
        chunk: elements, of the flat tensor, among which k compete; the last chunk may be shorter.
        scope: "tensor" ranks the entries of each tensor by themselves; "global" those of all tensors of one exchange
            together: the caller joins them into one before encoding.

    Example:
        TopK(density=0.01, values="int8"); TopK(k=64, chunk=4096, values="2bit")
    """

    kind: Literal["topk"] = "topk"
    density: float | None = Field(default=None, gt=0, le=1)
    k: int | None = Field(default=None, ge=1)
    chunk: int | None = Field(default=None, ge=2)
    scope: Literal["tensor", "global"] = "tensor"

    @model_validator(mode="before")
    @classmethod
    def _default_density(cls, given: Any) -> Any:
        return with_default_density(given)

    @model_validator(mode="after")
    def _one_size(self) -> TopK:
        refuse_two_sizes("topk", self.density, self.k)
        if self.chunk is not None and self.k is None:
            raise ValueError(f"topk: chunk is {self.chunk} but k is not given; say how many of each chunk are kept: k")
        if self.chunk is not None and self.k is not None and self.k > self.chunk:
            raise ValueError(f"topk: k is {self.k}, but a chunk has {self.chunk} elements; k is at most chunk")
        return self

    def expected_count(self, numel: int) -> int:
        if self.chunk is None:
            return kept_count(self.density, self.k, numel)
        chunks, rest = divmod(numel, self.chunk)
        assert self.k is not None
        return chunks * self.k + min(self.k, rest)

    def keep(self, flat: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        if self.chunk is None or self.chunk >= flat.numel():
            return top_k(flat, self.expected_count(flat.numel()))
        assert self.k is not None
        return top_k_of_chunks(flat, self.k, self.chunk)

    def keep_with_feedback(
        self, gradient: Tensor, memory: Tensor, next_memory: Tensor, draw: Draw
    ) -> tuple[Tensor, Tensor]:
        if self.chunk is not None:
            return super().keep_with_feedback(gradient, memory, next_memory, draw)
        return select_with_feedback(gradient, memory, next_memory, k=self.expected_count(gradient.numel()))

    def contraction(self, tensor: Tensor) -> float | None:
        """k / numel, tight where all magnitudes are equal; for chunks k / chunk. Times that of the rounded values."""
        of_values = values_contraction(self.values, self.expected_count(tensor.numel()))
        if of_values is None:
            return None
        among = min(self.chunk or tensor.numel(), tensor.numel())
        return kept_count(self.density, self.k, among) / among * of_values


def top_k_of_chunks(flat: Tensor, k: int, chunk: int) -> tuple[Tensor, Tensor]:
    """The k largest of each chunk of a flat tensor, zeros left out: indices in the tensor, ascending, and values."""
    places, values = chunk_top_k(flat, k, chunk=chunk)
    starts = torch.arange(0, flat.numel(), chunk, device=flat.device)
    indices = (places + starts[:, None]).view(-1)
    values = values.view(-1)
    kept = values != 0
    return indices[kept], values[kept]
