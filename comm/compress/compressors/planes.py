"""Planes of numbers in a payload: laid end to end when writing, cut out with a check of the length when reading."""

from __future__ import annotations

import torch
from torch import Tensor

from thinwire.comm.wire import PayloadError


def join(*planes: Tensor) -> Tensor:
    """One payload of planes of any dtype, with nothing between them."""
    return torch.cat([plane.contiguous().view(-1).view(torch.uint8) for plane in planes])


def plane(payload: Tensor, start: int, count: int, dtype: torch.dtype) -> Tensor:
    """`count` numbers that begin at byte `start`; a view where the alignment allows one.

    Raises:
        PayloadError: the payload ends before them.
    """
    stop = start + count * dtype.itemsize
    if count < 0 or stop > payload.numel():
        raise PayloadError(f"a payload of {payload.numel()} bytes where {stop} are needed")
    part = payload[start:stop]
    return (part.clone() if part.storage_offset() % dtype.itemsize else part).view(dtype)


def need_bytes(payload: Tensor, count: int, what: str) -> None:
    """Raises PayloadError unless the payload has exactly `count` bytes."""
    if payload.numel() != count:
        raise PayloadError(f"{what}: a payload of {payload.numel()} bytes where {count} are needed")


def need_finite(values: Tensor, what: str) -> Tensor:
    """The values, if none is NaN or infinite; PayloadError otherwise."""
    if values.numel():
        low, high = torch.aminmax(values)  # NaN wins both; one pass, nothing allocated
        if not (low.isfinite() & high.isfinite()):
            raise PayloadError(f"{what}: a value that is not finite")
    return values


def need_zero_tail(last: Tensor, used_bits: int, what: str) -> None:
    """Raises PayloadError if the last byte has a bit set beyond the first `used_bits`, 1 to 8 of them."""
    if int(last) >> used_bits:
        raise PayloadError(f"{what}: bits are set behind the last element")
