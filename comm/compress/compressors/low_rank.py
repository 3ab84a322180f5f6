"""`lowrank`: a matrix as the product of two thin ones."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from thinwire.comm.compress.compressor import Compressor
from thinwire.comm.compress.compressors.dense import saturating_cast
from thinwire.comm.compress.compressors.planes import join, need_bytes, need_finite, plane
from thinwire.comm.compress.draw import Draw

FACTOR_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class LowRank(Compressor):
    """C(M) = P Q^T: P an orthonormal basis of M Q0, Q = M^T P, and Q0 a random matrix that every rank knows.

    One step of subspace iteration, as in PowerSGD: Vogels, Karimireddy, Jaggi (2019), arXiv 1905.13727. A tensor is
    seen as the matrix (shape[0], rest). Exact where the rank of M is at most `rank`. Vectors, and matrices that two
    factors would not make smaller, are sent as they are, in fp32. This codec knows the tensor of one rank; averaging P
    and Q over the ranks, and beginning with the Q of the step before, is for the collective of these settings.

    Payload: P (rows, r), then Q (columns, r), with r = min(rank, rows, columns).

    Attributes:
        rank: columns of the factors.
        warm_start: the collective begins with the Q of the step before; False: with a new random one in each step.
        dtype: of the factors on the wire.
    """

    fixed_size: ClassVar[bool] = True

    kind: Literal["lowrank"] = "lowrank"
    rank: int = Field(default=4, ge=1)
    warm_start: bool = True
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"

    def payload_bytes(self, shape: torch.Size) -> int:
        factors = self.factors(shape)
        if factors is None:
            return 4 * shape.numel()
        rows, columns, rank = factors
        return (rows + columns) * rank * FACTOR_DTYPES[self.dtype].itemsize

    def factors(self, shape: torch.Size) -> tuple[int, int, int] | None:
        """(rows, columns, r) of a tensor that is sent as factors; None for one that is sent as it is."""
        if len(shape) < 2:
            return None
        rows = shape[0]
        columns = shape.numel() // rows
        rank = min(self.rank, rows, columns)
        smaller = (rows + columns) * rank * FACTOR_DTYPES[self.dtype].itemsize < 4 * rows * columns
        return (rows, columns, rank) if smaller else None

    def encode(self, tensor: Tensor, draw: Draw) -> Tensor:
        factors = self.factors(tensor.shape)
        if factors is None:
            return join(tensor)
        rows, columns, rank = factors
        matrix = tensor.view(1, rows, columns)
        dtype = FACTOR_DTYPES[self.dtype]
        start = random_start(columns, rank, draw).to(tensor.device)
        # Q belongs to the P that the receiver has, rounded.
        left = orthonormalise(matrix @ start).to(dtype)
        right = matrix.mT @ left.to(torch.float32)
        return join(left, saturating_cast(right, dtype))

    def decode(self, payload: Tensor, shape: torch.Size, draw: Draw) -> Tensor:
        need_bytes(payload, self.payload_bytes(shape), "LowRank")
        factors = self.factors(shape)
        if factors is None:
            return need_finite(plane(payload, 0, shape.numel(), torch.float32).clone(), "LowRank")
        rows, columns, rank = factors
        dtype = FACTOR_DTYPES[self.dtype]
        left = plane(payload, 0, rows * rank, dtype).to(torch.float32, copy=True).view(rows, rank)
        right = plane(payload, rows * rank * dtype.itemsize, columns * rank, dtype).to(torch.float32, copy=True)
        return need_finite((left @ right.view(columns, rank).mT).view(-1), "LowRank")

    def contraction(self, tensor: Tensor) -> float | None:
        """1 where tensors of this shape are sent whole; nothing is guaranteed of one step from a random start."""
        return 1.0 if self.factors(tensor.shape) is None else None


def random_start(columns: int, rank: int, draw: Draw) -> Tensor:
    """Q0, fp32 (columns, rank), on the CPU: normal numbers, the same on every rank."""
    return torch.randn(columns, rank, generator=draw.shared())


def orthonormalise(matrices: Tensor) -> Tensor:
    """An orthonormal basis of the columns of each matrix of a batch, each by itself.

    Householder's QR: the columns are orthonormal even where the matrix is zero or its columns depend on each other, and
    what the spare ones then are matters nothing, since they are multiplied by what M has in their direction.

    Args: matrices, fp32 (batch, rows, r), finite.
    Returns: fp32, of the same shape; where r > rows, the columns after the first `rows` are zero.
    """
    basis = torch.linalg.qr(matrices).Q
    missing = matrices.shape[-1] - basis.shape[-1]
    return torch.nn.functional.pad(basis, (0, missing))
