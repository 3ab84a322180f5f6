"""`none`, `bf16` and `fp16`: every element as it is, or rounded to half precision."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from thinwire.comm.compress.compressor import Compressor
from thinwire.comm.compress.compressors.planes import need_bytes, need_finite, plane
from thinwire.comm.compress.draw import Draw


class Cast(Compressor):
    """C(x) = cast(x), to nearest even. Magnitudes beyond the largest of the dtype become that one, not infinite."""

    fixed_size: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True
    dtype: ClassVar[torch.dtype]

    def payload_bytes(self, shape: torch.Size) -> int:
        return shape.numel() * self.dtype.itemsize

    def encode(self, tensor: Tensor, draw: Draw) -> Tensor:
        return saturating_cast(tensor, self.dtype).view(-1).view(torch.uint8)

    def decode(self, payload: Tensor, shape: torch.Size, draw: Draw) -> Tensor:
        out = torch.empty(shape.numel(), dtype=torch.float32, device=payload.device)
        self.decode_into(payload, out, draw)
        return out

    def decode_into(self, payload: Tensor, out: Tensor, draw: Draw) -> None:
        need_finite(out.copy_(self.values(payload, out.numel())), type(self).__name__)

    def values(self, payload: Tensor, numel: int) -> Tensor:
        """The elements of a payload as they were sent: a view where the alignment allows one, not checked to be finite.

        Raises:
            PayloadError: the payload has another length than that of `numel` elements.
        """
        need_bytes(payload, self.payload_bytes(torch.Size((numel,))), type(self).__name__)
        return plane(payload, 0, numel, self.dtype)

    def encode_with_feedback(self, gradient: Tensor, memory: Tensor, next_memory: Tensor, draw: Draw) -> Tensor:
        torch.add(gradient, memory, out=next_memory)
        payload = self.encode(next_memory, draw)
        next_memory.view(-1).sub_(payload.view(self.dtype).to(torch.float32))
        return payload


class Dense(Cast):
    """Every element as fp32: nothing is lost and nothing is saved."""

    kind: Literal["none"] = "none"
    dtype: ClassVar[torch.dtype] = torch.float32

    def contraction(self, tensor: Tensor) -> float:
        return 1.0


class BF16(Cast):
    """Every element rounded to bf16: half the bytes, the range of fp32, 8 significant bits."""

    kind: Literal["bf16"] = "bf16"
    dtype: ClassVar[torch.dtype] = torch.bfloat16

    def contraction(self, tensor: Tensor) -> float:
        """1 - 2^-16: an element that is not subnormal is off by at most 2^-8 of itself."""
        return 1.0 - 2.0**-16


class FP16(Cast):
    """Every element rounded to fp16: half the bytes, 11 significant bits, a narrow range.

    Magnitudes above 65504 are sent as 65504, and below 2^-25 (3e-8) as zero: use it with error feedback, which sends
    the rest later, or where gradients are known to lie in between. bf16 has no such limits.
    """

    kind: Literal["fp16"] = "fp16"
    dtype: ClassVar[torch.dtype] = torch.float16
    homogeneous: ClassVar[bool] = False


def saturating_cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in `dtype`, rounded to nearest even; what would round to infinity becomes the largest finite number."""
    if dtype == torch.float32:
        return tensor.clone()
    largest = torch.finfo(dtype).max
    return tensor.clamp(-largest, largest).to(dtype)
