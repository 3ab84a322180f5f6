"""The smallest compressors of each sort, so that the collectives' tests depend on no real one."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from thinwire.comm.compress.compressor import Compressor
from thinwire.comm.compress.decoded import Decoded, Sparse
from thinwire.comm.compress.draw import Draw
from thinwire.comm.wire import PayloadError


class ToyGrid(Compressor):
    """Dense, fixed size: multiples of 1/8 near x, shifted by less than a step that the sender draws; as bf16."""

    kind: Literal["toy_grid"] = "toy_grid"
    fixed_size: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True
    cell: int = 1

    @property
    def granule(self) -> int:
        return self.cell

    def payload_bytes(self, shape: torch.Size) -> int:
        return 2 * shape.numel()

    def encode(self, tensor: Tensor, draw: Draw) -> Tensor:
        return ((tensor.view(-1) - _shift(draw)) * 8).round().to(torch.bfloat16).view(torch.uint8)

    def decode(self, payload: Tensor, shape: torch.Size, draw: Draw) -> Decoded:
        if payload.numel() != self.payload_bytes(shape):
            raise PayloadError(f"{payload.numel()} bytes for {tuple(shape)}")
        return payload.view(torch.bfloat16).float() / 8 + _shift(draw)


class ToyTop(Compressor):
    """Sparse, any size: the elements of at least this magnitude, as int64 and fp32."""

    kind: Literal["toy_top"] = "toy_top"
    fixed_size: ClassVar[bool] = False
    sparse: ClassVar[bool] = True
    threshold: float = 1.0

    def payload_bytes(self, shape: torch.Size) -> int:
        return 12 * (shape.numel() // 3)

    def encode(self, tensor: Tensor, draw: Draw) -> Tensor:
        indices = (tensor.view(-1).abs() >= self.threshold).nonzero().view(-1)[: tensor.numel() // 3]
        return torch.cat([indices.view(torch.uint8), tensor.view(-1)[indices].view(torch.uint8)])

    def decode(self, payload: Tensor, shape: torch.Size, draw: Draw) -> Decoded:
        count, rest = divmod(payload.numel(), 12)
        if rest:
            raise PayloadError(f"{payload.numel()} bytes")
        indices = payload[: 8 * count].clone().view(torch.int64)
        if count and not (indices[0] >= 0 and indices[-1] < shape.numel() and bool((indices.diff() > 0).all())):
            raise PayloadError("indices out of order")
        return Sparse(shape.numel(), indices, payload[8 * count :].clone().view(torch.float32))


def _shift(draw: Draw) -> float:
    return draw.own_key() % 64 / 1024
