"""Changed weights as they are, rounded to codes, or as coded differences."""

from __future__ import annotations

import torch
from torch import Tensor

from thinwire.comm.partition.wires.block_codes import BlockCodes
from thinwire.kernels.block_payload import plain_runs
from thinwire.kernels.reduce_payloads import reduce_payloads
from thinwire.kernels.weight_difference import apply_difference, encode_difference


class PlainUpdate:
    """The new weights, rounded to the weights' dtype."""

    is_exact = True

    def payload_bytes(self, numel: int, dtype: torch.dtype) -> int:
        return numel * dtype.itemsize

    def encode(self, new: Tensor, old: Tensor, *, key: int) -> Tensor:
        return new.to(old.dtype).view(torch.uint8)

    def apply(self, payload: Tensor, weights: Tensor) -> None:
        weights.copy_(payload.view(weights.dtype))


class QuantizedUpdate:
    """w <- Q(new): the weights themselves as block codes."""

    is_exact = False

    def __init__(self, codes: BlockCodes) -> None:
        self.codes = codes

    def payload_bytes(self, numel: int, dtype: torch.dtype) -> int:
        return self.codes.payload_bytes(numel)

    def encode(self, new: Tensor, old: Tensor, *, key: int) -> Tensor:
        return self.codes.encode(new, plain_runs((new.numel(),)), key=key)

    def apply(self, payload: Tensor, weights: Tensor) -> None:
        reduce_payloads(payload[None], self.codes.form, weights)


class DifferenceUpdate:
    """w <- w + Q(new - w), added in fp32 and then rounded to the weights' dtype.

    Jia et al. 2024 (2410.15526). What Q and the rounding leave out is not lost: the owner's fp32 master keeps it, so
    the next difference contains it.
    """

    is_exact = False

    def __init__(self, codes: BlockCodes) -> None:
        self.codes = codes

    def payload_bytes(self, numel: int, dtype: torch.dtype) -> int:
        return self.codes.payload_bytes(numel)

    def encode(self, new: Tensor, old: Tensor, *, key: int) -> Tensor:
        return encode_difference(new, old, self.codes.form, rounding=self.codes.rounding, key=key)

    def apply(self, payload: Tensor, weights: Tensor) -> None:
        apply_difference(payload, self.codes.form, weights)
