"""What every wire format of this package can do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Wire(Protocol):
    """A format for flat runs of values. Everyone who decodes a payload gets the same bits."""

    def payload_bytes(self, numel: int) -> int:
        """Bytes that a run of this many values takes: a multiple of 16, but for formats without planes."""
        ...

    def encode(self, values: Tensor, counts: Sequence[int], *, key: int, memory: Tensor | None = None) -> Tensor:
        """Write runs of values one after another.

        Args:
            values: fp32 (sum(counts),), contiguous; may be handed on as it is, so the caller leaves it alone until the
                payload is sent.
            counts: elements of each run.
            key: of random numbers, different for every call of a run of training and the same on no two ranks' calls.
            memory: fp32, as values: error feedback. Added to the values first; then overwritten by what the payload
                left out.
        Returns: uint8 (sum of payload_bytes,).
        """
        ...

    def reduce(self, payloads: Tensor, out: Tensor, *, scale: float) -> None:
        """out = scale * sum of the decoded payloads, added in their order in fp32.

        Args:
            payloads: uint8 (n, payload_bytes(out.numel())).
            out: fp32, flat and contiguous.
        """
        ...

    def decode(self, payload: Tensor, out: Tensor) -> None:
        """Overwrite `out` by what one payload says."""
        ...
