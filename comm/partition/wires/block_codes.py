"""Values as block codes: the format of a payload and the way of rounding, and one run's way into it and out of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from thinwire.kernels.block_payload import BlockFormat, Runs
from thinwire.kernels.block_quantize import Rounding
from thinwire.kernels.encode_runs import encode_runs
from thinwire.kernels.reduce_payloads import reduce_payloads


@dataclass(frozen=True)
class BlockCodes:
    """Values as codes of 8 or 4 bits, with one fp32 scale for each block: kernels/block_quantize.py.

    A payload is a plane of scales and a plane of codes, each filled up with zero bytes to 16. A block that held a value
    that is not finite decodes to values that are not. Of 4-bit codes the first is in the low bits.

    bits: of a code, 8 or 4.
    block: values that share a scale.
    rounding: nearest, or stochastic: up with the probability of the fraction.
    smooth: the codes stand for the values' Hadamard transforms, 32 by 32: see kernels/hadamard.py.
    """

    bits: Literal[8, 4]
    block: int
    rounding: Rounding = "nearest"
    smooth: bool = False

    @cached_property
    def form(self) -> BlockFormat:
        """The layout of a payload."""
        return BlockFormat(self.bits, self.block, self.smooth)

    def payload_bytes(self, numel: int) -> int:
        """Bytes of a run's payload."""
        return self.form.payload_bytes(numel)

    def planes(self, payloads: Tensor, numel: int) -> tuple[Tensor, Tensor]:
        """Views of the codes, uint8, and scales, fp32, of one payload or of a row of each of several."""
        return self.form.planes(payloads, numel)

    def encode(self, values: Tensor, runs: Runs, *, key: int = 0, memory: Tensor | None = None) -> Tensor:
        """Runs of values, each with blocks of its own: see encode_runs()."""
        return encode_runs(values, runs, self.form, rounding=self.rounding, key=key, memory=memory)

    def decode(self, payload: Tensor, numel: int) -> Tensor:
        """What one payload says: fp32 (numel,), new memory."""
        out = torch.empty(numel, dtype=torch.float32, device=payload.device)
        return reduce_payloads(payload[None], self.form, out)
