"""How a machine's vector becomes the payload that its neighbours read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from thinwire.comm.wire import PayloadError


class Codec(Protocol):
    """Encodes this machine's vector once per round, for all neighbours alike, and decodes theirs.

    The mean is preserved because both ends of an edge use the *public* values: what the payload says, not what the
    sender holds.

    Attributes: remembers, whether decode() must see every payload of a sender, also of rounds that are skipped.
    """

    remembers: bool

    def encode(self, round: int, value: Tensor) -> tuple[Tensor, Tensor]:
        """(payload, public) of a vector.

        Args: value, flat; it may change after the call.
        Returns: payload, uint8 on the CPU; public, what every receiver decodes from it: of value's shape, dtype and
            device. Neither is changed by later calls.
        """
        ...

    def decode(self, source: int, round: int, payload: Tensor, like: Tensor) -> Tensor:
        """The public vector of `source`, in the order of its rounds; of the shape, dtype and device of `like`.

        Raises:
            PayloadError: the payload is not one of such a vector.
        """
        ...

    def payload_bytes(self, numel: int, itemsize: int) -> int | None:
        """Length of every payload of such a vector; None if it varies."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Plain:
    """The vector itself, or rounded to a dtype.

    Args:
        dtype: what travels; None: the vector's own.
    """

    remembers = False

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self._dtype = dtype

    def encode(self, round: int, value: Tensor) -> tuple[Tensor, Tensor]:
        """As Codec says."""
        sent = value.to(self._dtype or value.dtype, copy=True)
        return sent.cpu().view(torch.uint8), sent.to(value.dtype)

    def decode(self, source: int, round: int, payload: Tensor, like: Tensor) -> Tensor:
        """As Codec says."""
        dtype = self._dtype or like.dtype
        expected = like.numel() * dtype.itemsize
        if len(payload) != expected:
            raise PayloadError(f"a vector of {like.numel()} elements takes {expected} bytes, not {len(payload)}")
        return payload.view(dtype).to(device=like.device, dtype=like.dtype)

    def payload_bytes(self, numel: int, itemsize: int) -> int | None:
        """As Codec says."""
        return self.expected_bytes(numel, itemsize)

    def expected_bytes(self, numel: int, itemsize: int) -> int:
        """Of every payload."""
        return numel * (self._dtype.itemsize if self._dtype else itemsize)

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing."""
