"""Values as they are, or rounded to 16 bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from thinwire.kernels.cast_reduce import cast_reduce

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class PlainWire:
    """Values cast to a dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def payload_bytes(self, numel: int) -> int:
        return numel * self.dtype.itemsize

    def encode(self, values: Tensor, counts: Sequence[int], *, key: int, memory: Tensor | None = None) -> Tensor:
        if memory is None:
            return values.to(self.dtype).view(torch.uint8)
        memory.add_(values)
        payload = memory.to(self.dtype, copy=True)
        memory.sub_(payload)
        return payload.view(torch.uint8)

    def reduce(self, payloads: Tensor, out: Tensor, *, scale: float) -> None:
        cast_reduce(payloads.view(self.dtype), scale=scale, out=out)

    def decode(self, payload: Tensor, out: Tensor) -> None:
        out.copy_(payload.view(self.dtype))
