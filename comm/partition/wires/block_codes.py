"""The layout of quantised values in a payload, and one run's way into it and out of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from thinwire.comm.partition.wires.smoothing import SPAN, smooth, unsmooth
from thinwire.kernels.block_quantize import Rounding, dequantize, quantize
from thinwire.kernels.code_planes import codes_bytes, scales_count
from thinwire.kernels.dequantize_reduce import dequantize_reduce

ALIGNMENT_BYTES = 16  # of both planes: a GPU reads 16 bytes at a time


@dataclass(frozen=True)
class BlockCodes:
    """Values as codes of 8 or 4 bits, with one fp32 scale for each block: kernels/block_quantize.py.

    A payload is a plane of scales and a plane of codes, each filled up with zero bytes to 16. A block that held a value
    that is not finite decodes to values that are not. Of 4-bit codes the first is in the low bits.

    bits: of a code, 8 or 4.
    block: values that share a scale.
    rounding: nearest, or stochastic: up with the probability of the fraction.
    smooth: the codes stand for the values' Hadamard transforms, 32 by 32: see smoothing.py.
    """

    bits: Literal[8, 4]
    block: int
    rounding: Rounding = "nearest"
    smooth: bool = False

    def payload_bytes(self, numel: int) -> int:
        """Bytes of a run's payload."""
        coded = self.coded(numel)
        return self._scales_bytes(coded) + _aligned(codes_bytes(coded, self.bits))

    def coded(self, numel: int) -> int:
        """How many values are coded for a run: transforms are of 32 values, of which the last are zero if need be."""
        return -(-numel // SPAN) * SPAN if self.smooth else numel

    def planes(self, payloads: Tensor, numel: int) -> tuple[Tensor, Tensor]:
        """Views of the codes, uint8, and scales, fp32, of one payload or of a row of each of several.

        Args:
            payloads: uint8 (..., payload_bytes(numel)), the last dimension contiguous and 4-byte aligned.
        """
        coded = self.coded(numel)
        start = self._scales_bytes(coded)
        codes = payloads[..., start : start + codes_bytes(coded, self.bits)]
        return codes, payloads[..., : 4 * scales_count(coded, self.block)].view(torch.float32)

    def encode(
        self, values: Tensor, payload: Tensor, *, key: int = 0, offset: int = 0, memory: Tensor | None = None
    ) -> None:
        """Write one run.

        Args:
            values: fp32, flat and contiguous, at least one.
            payload: uint8 (payload_bytes,), of zeros.
            key, offset: of random numbers; the place of the first value in what the key is for.
            memory: fp32, as values: added to them first, then overwritten by what the payload leaves out.
        """
        codes, scales = self.planes(payload, values.numel())
        write = partial(
            quantize,
            bits=self.bits,
            block=self.block,
            rounding=self.rounding,
            key=key,
            offset=offset,
            codes=codes,
            scales=scales,
        )
        if memory is None:
            write(smooth(values) if self.smooth else values)
            return
        memory.add_(values)
        coded = smooth(memory) if self.smooth else memory
        write(coded)
        memory.sub_(self.decode(payload, values.numel()))

    def reduce(self, payloads: Tensor, out: Tensor, *, scale: float) -> None:
        """out = scale * sum of the decoded rows, in their order, in fp32.

        Args:
            payloads: uint8 (n, payload_bytes(out.numel())).
            out: fp32, flat and contiguous, at least one value.
        """
        codes, scales = self.planes(payloads, out.numel())
        codes, scales = codes.contiguous(), scales.contiguous()
        coded = self.coded(out.numel())
        total = torch.empty(coded, dtype=torch.float32, device=out.device) if self.smooth else out
        dequantize_reduce(codes, scales, bits=self.bits, block=self.block, numel=coded, scale=scale, out=total)
        if self.smooth:
            out.copy_(unsmooth(total)[: out.numel()])

    def decode(self, payload: Tensor, numel: int) -> Tensor:
        """What one payload says: fp32 (numel,), new memory."""
        codes, scales = self.planes(payload, numel)
        values = dequantize(codes, scales, bits=self.bits, block=self.block, numel=self.coded(numel))
        return unsmooth(values)[:numel] if self.smooth else values

    def _scales_bytes(self, coded: int) -> int:
        return _aligned(4 * scales_count(coded, self.block))


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
