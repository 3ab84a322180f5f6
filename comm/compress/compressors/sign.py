"""`sign`: one bit an element, and the mean magnitude of each small block."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from thinwire.comm.compress.compressor import Compressor
from thinwire.comm.compress.compressors.planes import need_bytes, need_finite, need_zero_tail, plane
from thinwire.comm.compress.draw import Draw
from thinwire.comm.wire import PayloadError
from thinwire.kernels.sign_quantize import dequantize_sign, quantize_sign, quantize_sign_with_feedback


class Sign(Compressor):
    """C(x)_i = s sign(x_i) with s = mean |x_j| over the block of i, and sign(0) = 1.

    Bernstein, Wang, Azizzadenesheli, Anandkumar (2018), arXiv 1802.04434, with the scale of Karimireddy, Rebjock,
    Stich, Jaggi (2019), arXiv 1901.09847, over small blocks instead of tensors: ||C(x) - x||^2 = ||x||^2 -
    ||x||_1^2 / block over each. A scale of 0 says that the whole block is zero, so that parameters without a gradient
    get none. Payload: fp32 scales, then bits, 1 for what is not negative.

    Attributes:
        block: elements that share a scale.
    """

    fixed_size: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True
    bits: ClassVar[int] = 1

    kind: Literal["sign"] = "sign"
    block: int = Field(default=256, ge=8, le=1 << 16, multiple_of=8)

    @property
    def granule(self) -> int:
        return self.block

    def payload_bytes(self, shape: torch.Size) -> int:
        return self._scales_bytes(shape.numel()) + -(-shape.numel() // 8)

    def planes(self, payload: Tensor, numel: int) -> tuple[Tensor, Tensor]:
        """Bits, uint8, and scales, fp32, of a payload: views, not checked for hostile content.

        Raises:
            PayloadError: the payload has another length than that of `numel` elements.
        """
        need_bytes(payload, self.payload_bytes(torch.Size((numel,))), type(self).__name__)
        scales = plane(payload, 0, -(-numel // self.block), torch.float32)
        return payload[self._scales_bytes(numel) :], scales

    def checked_planes(self, payload: Tensor, numel: int) -> tuple[Tensor, Tensor]:
        """planes(), for a payload from another rank.

        Raises:
            PayloadError: a length, scale or last byte that the encoder cannot have written.
        """
        bits, scales = self.planes(payload, numel)
        need_finite(scales, type(self).__name__)
        if bool((scales < 0).any()):
            raise PayloadError(f"{type(self).__name__}: a scale that is negative")
        if used := numel % 8:
            need_zero_tail(bits[-1], used, type(self).__name__)
        return bits, scales

    def encode(self, tensor: Tensor, draw: Draw) -> Tensor:
        payload, bits, scales = self._new_payload(tensor)
        quantize_sign(tensor.view(-1), block=self.block, bits=bits, scales=scales)
        return payload

    def decode(self, payload: Tensor, shape: torch.Size, draw: Draw) -> Tensor:
        bits, scales = self.checked_planes(payload, shape.numel())
        return dequantize_sign(bits, scales, block=self.block, numel=shape.numel())

    def decode_into(self, payload: Tensor, out: Tensor, draw: Draw) -> None:
        bits, scales = self.checked_planes(payload, out.numel())
        dequantize_sign(bits, scales, block=self.block, numel=out.numel(), out=out)

    def encode_with_feedback(self, gradient: Tensor, memory: Tensor, next_memory: Tensor, draw: Draw) -> Tensor:
        payload, bits, scales = self._new_payload(gradient)
        quantize_sign_with_feedback(
            gradient.view(-1), memory.view(-1), next_memory.view(-1), block=self.block, bits=bits, scales=scales
        )
        return payload

    def contraction(self, tensor: Tensor) -> float:
        """1 / block, for a block with one element that is not zero; 1 for one of equal magnitudes."""
        return 1 / min(self.block, tensor.numel())

    def _scales_bytes(self, numel: int) -> int:
        return 4 * -(-numel // self.block)

    def _new_payload(self, tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """An empty payload, and its planes to write to."""
        payload = torch.empty(self.payload_bytes(tensor.shape), dtype=torch.uint8, device=tensor.device)
        return payload, *self.planes(payload, tensor.numel())
