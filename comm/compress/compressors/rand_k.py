"""`randk`: entries at random places, which the receiver draws as well instead of being told."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from thinwire.comm.compress.compressor import Compressor
from thinwire.comm.compress.compressors.planes import need_bytes, need_finite
from thinwire.comm.compress.compressors.sparse import (
    kept_count,
    refuse_two_sizes,
    values_contraction,
    with_default_density,
    written_as,
)
from thinwire.comm.compress.decoded import Sparse
from thinwire.comm.compress.draw import Draw
from thinwire.comm.compress.value_code import ValueKind, decode_values, encode_values, values_bytes


class RandK(Compressor):
    """k entries, the same random ones on every rank and others in each step: only their values are sent.

    C(x)_i = x_i, or x_i numel / k if unbiased, for i in a random set of k places, which depends on nothing but the
    seed, the step and the name of the tensor; 0 elsewhere. Unbiased, E C(x) = x and E ||C(x) - x||^2 =
    (numel / k - 1) ||x||^2; otherwise E ||C(x) - x||^2 = (1 - k / numel) ||x||^2, which is what error feedback needs.

    Attributes:
        density: kept / all; at least one entry is kept. 0.01 where neither density nor k is given.
        k: entries to keep instead.
        unbiased: multiply by numel / k.
        values: how they are written; see value_code.
    """

    fixed_size: ClassVar[bool] = True
    sparse: ClassVar[bool] = True

    kind: Literal["randk"] = "randk"
    density: float | None = Field(default=None, gt=0, le=1)
    k: int | None = Field(default=None, ge=1)
    unbiased: bool = False
    values: ValueKind = "fp32"

    @model_validator(mode="before")
    @classmethod
    def _default_density(cls, given: Any) -> Any:
        return with_default_density(given)

    @model_validator(mode="after")
    def _one_size(self) -> RandK:
        refuse_two_sizes("randk", self.density, self.k)
        if self.unbiased and self.values in {"int8", "int4", "2bit", "sign"}:
            raise ValueError(
                f"randk: unbiased is true, but values {self.values!r} are not; set unbiased to false, or values to "
                "int8_stochastic, int4_stochastic, fp32, bf16 or fp16"
            )
        return self

    def payload_bytes(self, shape: torch.Size) -> int:
        count = kept_count(self.density, self.k, shape.numel())
        return values_bytes(count, written_as(self.values, count))

    def encode(self, tensor: Tensor, draw: Draw) -> Tensor:
        flat = tensor.view(-1)
        return self._write(flat[self.places(flat.numel(), draw).to(flat.device)], draw)

    def decode(self, payload: Tensor, shape: torch.Size, draw: Draw) -> Sparse:
        need_bytes(payload, self.payload_bytes(shape), "RandK")
        numel = shape.numel()
        places = self.places(numel, draw).to(payload.device)
        return Sparse(numel, places, need_finite(self._read(payload, len(places), numel), "RandK"))

    def encode_with_feedback(self, gradient: Tensor, memory: Tensor, next_memory: Tensor, draw: Draw) -> Tensor:
        torch.add(gradient, memory, out=next_memory)
        flat = next_memory.view(-1)
        places = self.places(flat.numel(), draw).to(flat.device)
        kept = flat[places]
        payload = self._write(kept, draw)
        flat[places] = kept - self._read(payload, len(places), flat.numel())
        return payload

    def places(self, numel: int, draw: Draw) -> Tensor:
        """The indices, int64 (k,), ascending, on the CPU: a set of k, each as likely as any other."""
        return random_subset(numel, kept_count(self.density, self.k, numel), draw.shared())

    def contraction(self, tensor: Tensor) -> float | None:
        """In expectation: k / numel, times that of the rounded values; unbiased, 2 - numel / k if that is positive."""
        numel = tensor.numel()
        count = kept_count(self.density, self.k, numel)
        if self.unbiased:
            return 2 - numel / count if self.values == "fp32" and 2 * count > numel else None
        of_values = values_contraction(self.values, count)
        return None if of_values is None else count / numel * of_values

    def _write(self, kept: Tensor, draw: Draw) -> Tensor:
        return encode_values(kept, written_as(self.values, len(kept)), draw.own_key())

    def _read(self, payload: Tensor, count: int, numel: int) -> Tensor:
        values, _ = decode_values(payload, count, written_as(self.values, count))
        return values * (numel / count) if self.unbiased else values


def random_subset(numel: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` distinct numbers below numel, int64, ascending; each set of so many is as likely as any other."""
    fewer = min(count, numel - count)  # those in the set, or those left out
    drawn = np.zeros(numel, dtype=np.bool_)  # NumPy finds what is set ten times faster
    found = 0
    while found < fewer:
        missing = fewer - found
        drawn[torch.randint(numel, (missing + missing // 8 + 16,), generator=generator).numpy()] = True
        found = int(np.count_nonzero(drawn))
    # No number is treated unlike another, so that what is left after dropping some at random is uniform too.
    surplus = torch.randperm(found, generator=generator)[: found - fewer]
    drawn[np.flatnonzero(drawn)[surplus.numpy()]] = False
    return torch.from_numpy(np.flatnonzero(drawn if fewer == count else ~drawn))
