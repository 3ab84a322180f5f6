"""`natural`: a sign and a power of two."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from thinwire.comm.compress.compressor import Compressor
from thinwire.comm.compress.compressors.planes import join, need_bytes, need_zero_tail
from thinwire.comm.compress.draw import Draw
from thinwire.comm.wire import PayloadError
from thinwire.kernels.bit_pack import pack_bits, unpack_bits
from thinwire.kernels.counter_random import random_words

_MANTISSA = 23  # bits
_MANTISSA_MASK = (1 << _MANTISSA) - 1
_EXPONENTS = 254  # the exponent field of the largest finite power of two; 255 would be infinity
_WINDOW = 127  # exponents that 7 bits can tell apart, beside zero


class Natural(Compressor):
    """C(x) = sign(x) 2^e or sign(x) 2^(e+1), around |x|, at random so that E C(x) = x.

    Horvath, Ho, Horvath, Sahu, Canini, Richtarik (2019), arXiv 1905.10988: E ||C(x) - x||^2 <= 1/8 ||x||^2. Written in
    9 bits, any power of two of fp32 can be sent: what lies between 0 and 2^-126 becomes either, and 2^128, which fp32
    lacks, becomes 2^127. Written in 8 bits, the exponent has 7, for the 127 powers of two up to the largest of the
    tensor, and what is smaller becomes the smallest of these or 0, at random, again without bias; where there is such,
    the factor 1/8 does not hold for it, but it is less than 2^-126 of the largest.

    Payload: 9 bits: exponents (u8), then signs; 8 bits: u8 first exponent, then a byte each, the sign in its top bit.

    Attributes:
        bits: for each element.
    """

    fixed_size: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True

    kind: Literal["natural"] = "natural"
    bits: Literal[8, 9] = 8

    def payload_bytes(self, shape: torch.Size) -> int:
        numel = shape.numel()
        return numel + (1 if self.bits == 8 else -(-numel // 8))

    def encode(self, tensor: Tensor, draw: Draw) -> Tensor:
        flat = tensor.view(-1)
        magnitude = flat.view(torch.int32) & 0x7FFFFFFF
        words = random_words(draw.own_key(), flat.numel(), device=flat.device)
        # Adding a random mantissa carries into the exponent with the probability of the mantissa, and for subnormal
        # numbers, whose exponent field is 0, that is |x| / 2^-126 as it should be.
        exponent = (words & _MANTISSA_MASK).to(torch.int32).add_(magnitude) >> _MANTISSA
        exponent.clamp_(max=_EXPONENTS)
        negative = torch.signbit(flat).to(torch.uint8)
        if self.bits == 9:
            return join(exponent.to(torch.uint8), pack_bits(negative, 1))
        base = max(int(exponent.max()) - _WINDOW, 0)
        exponent.sub_(base).clamp_(min=0)
        if base:
            small = (magnitude < (base + 1) << _MANTISSA).nonzero().view(-1)
            chance = torch.ldexp(flat[small].abs().double(), torch.tensor(126 - base, device=flat.device))
            exponent[small] = (words[small] < chance * 2.0**32).to(torch.int32)
        codes = exponent.to(torch.uint8) | negative << 7
        return join(torch.tensor([base], dtype=torch.uint8, device=flat.device), codes)

    def decode(self, payload: Tensor, shape: torch.Size, draw: Draw) -> Tensor:
        numel = shape.numel()
        need_bytes(payload, self.payload_bytes(shape), "Natural")
        powers = (torch.arange(_EXPONENTS + 1, dtype=torch.int32, device=payload.device) << _MANTISSA).view(
            torch.float32
        )
        if self.bits == 9:
            exponents = payload[:numel].to(torch.int32)
            if int(exponents.max()) > _EXPONENTS:
                raise PayloadError("Natural: a power of two that fp32 has not")
            if used := numel % 8:
                need_zero_tail(payload[-1], used, "Natural")
            signs = 1 - 2 * unpack_bits(payload[numel:], 1, numel).to(torch.float32)
            return powers[exponents].mul_(signs)
        base = int(payload[0])
        if base > _EXPONENTS - _WINDOW:
            raise PayloadError("Natural: a power of two that fp32 has not")
        table = torch.cat([powers[:1], powers[base + 1 : base + _WINDOW + 1]])
        return torch.cat([table, -table])[payload[1:].to(torch.int32)]

    def contraction(self, tensor: Tensor) -> float:
        """7/8, in expectation, for elements of at least 2^-126 (with 8 bits: 2^-126 times the largest)."""
        return 7 / 8
