"""`int8`, `int4` and `ternary`: whole numbers of few bits, times one scale for each block of elements."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from thinwire.comm.compress.compressor import Compressor
from thinwire.comm.compress.compressors.block_contraction import block_contraction
from thinwire.comm.compress.compressors.planes import need_bytes, need_finite, need_zero_tail, plane
from thinwire.comm.compress.draw import Draw
from thinwire.comm.wire import PayloadError
from thinwire.kernels.block_quantize import dequantize, quantize, quantize_with_feedback


class BlockQuantized(Compressor):
    """C(x)_i = s round(x_i / s) with s = max |x_j| / levels over the block of i.

    The range is symmetric, -levels to levels, so that the largest element of a block comes back whole whatever its
    sign. A block of zeros has scale 0, and so has one whose elements are all below 2^-100 (8e-31). Payload: fp32
    scales, then codes in two's complement, several to a byte, the first in the low bits.

    Attributes:
        block: elements that share a scale.
        rounding: "nearest" (to even; the smaller error) or "stochastic" (up with the probability of the fraction,
            unbiased: E C(x) = x).
    """

    fixed_size: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True
    bits: ClassVar[int]

    block: int = Field(default=256, ge=8, le=1 << 16, multiple_of=8)
    rounding: Literal["nearest", "stochastic"] = "nearest"

    @property
    def granule(self) -> int:
        return self.block

    @property
    def levels(self) -> int:
        return (1 << (self.bits - 1)) - 1

    def payload_bytes(self, shape: torch.Size) -> int:
        return self._scales_bytes(shape.numel()) + self._codes_bytes(shape.numel())

    def planes(self, payload: Tensor, numel: int) -> tuple[Tensor, Tensor]:
        """Codes, uint8, and scales, fp32, of a payload: views, not checked for hostile content.

        Raises:
            PayloadError: the payload has another length than that of `numel` elements.
        """
        need_bytes(payload, self.payload_bytes(torch.Size((numel,))), type(self).__name__)
        scales = plane(payload, 0, -(-numel // self.block), torch.float32)
        return payload[self._scales_bytes(numel) :], scales

    def encode(self, tensor: Tensor, draw: Draw) -> Tensor:
        payload, codes, scales = self._new_payload(tensor)
        quantize(
            tensor.view(-1),
            bits=self.bits,
            block=self.block,
            rounding=self.rounding,
            key=draw.own_key(),
            codes=codes,
            scales=scales,
        )
        return payload

    def decode(self, payload: Tensor, shape: torch.Size, draw: Draw) -> Tensor:
        numel = shape.numel()
        codes, scales = self.checked_planes(payload, numel)
        return dequantize(codes, scales, bits=self.bits, block=self.block, numel=numel)

    def decode_into(self, payload: Tensor, out: Tensor, draw: Draw) -> None:
        codes, scales = self.checked_planes(payload, out.numel())
        dequantize(codes, scales, bits=self.bits, block=self.block, numel=out.numel(), out=out)

    def checked_planes(self, payload: Tensor, numel: int) -> tuple[Tensor, Tensor]:
        """planes(), for a payload from another rank.

        Raises:
            PayloadError: a length, scale or code that the encoder cannot have written.
        """
        codes, scales = self.planes(payload, numel)
        need_finite(scales, type(self).__name__)
        if bool((scales < 0).any()) or not math.isfinite(float(scales.max() * self.levels)):
            raise PayloadError(f"{type(self).__name__}: a scale that is negative or too large")
        if used := numel * self.bits % 8:
            need_zero_tail(codes[-1], used, type(self).__name__)
        if self._has_lowest(codes):
            raise PayloadError(f"{type(self).__name__}: a code below -{self.levels}")
        return codes, scales

    def encode_with_feedback(self, gradient: Tensor, memory: Tensor, next_memory: Tensor, draw: Draw) -> Tensor:
        payload, codes, scales = self._new_payload(gradient)
        quantize_with_feedback(
            gradient.view(-1),
            memory.view(-1),
            next_memory.view(-1),
            bits=self.bits,
            block=self.block,
            rounding=self.rounding,
            key=draw.own_key(),
            codes=codes,
            scales=scales,
        )
        return payload

    def contraction(self, tensor: Tensor) -> float | None:
        return block_contraction(min(self.block, tensor.numel()), self.levels, stochastic=self.rounding == "stochastic")

    def _scales_bytes(self, numel: int) -> int:
        return 4 * -(-numel // self.block)

    def _codes_bytes(self, numel: int) -> int:
        return -(-numel * self.bits // 8)

    def _new_payload(self, tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """An empty payload, and its planes to write to."""
        payload = torch.empty(self.payload_bytes(tensor.shape), dtype=torch.uint8, device=tensor.device)
        return payload, *self.planes(payload, tensor.numel())

    def _has_lowest(self, codes: Tensor) -> bool:
        """Whether any code is the one whose top bit alone is set: -levels - 1, which no encoder writes.

        Moved to the top of its byte, with nothing below, that code alone is the least number of 8 bits.
        """
        top = 0x100 - (1 << 8 - self.bits)
        moved = [codes] if self.bits == 8 else (codes << shift & top for shift in range(0, 8, self.bits))
        return any(int(each.view(torch.int8).amin()) == -128 for each in moved)


class Int8(BlockQuantized):
    """8 bits an element: -127 to 127 times the block's scale; numel (1 + 4 / block) bytes."""

    kind: Literal["int8"] = "int8"
    bits: ClassVar[int] = 8


class Int4(BlockQuantized):
    """4 bits an element: -7 to 7 times the block's scale; numel (1/2 + 4 / block) bytes."""

    kind: Literal["int4"] = "int4"
    bits: ClassVar[int] = 4


class Ternary(BlockQuantized):
    """2 bits an element: -1, 0 or 1 times the largest magnitude of the block.

    With rounding="stochastic" this is TernGrad (Wen, Xu, Yan, Wu, Wang, Chen, Li, 2017, arXiv 1705.07878) for each
    block instead of each layer, and without its clipping.
    """

    kind: Literal["ternary"] = "ternary"
    bits: ClassVar[int] = 2
