"""What every compressor is: frozen settings that can encode one tensor and decode what another rank encoded."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from thinwire.comm.compress.decoded import Decoded, add_to, to_dense
from thinwire.comm.compress.draw import Draw
from thinwire.comm.settings import Settings


class Compressor(Settings):
    """Settings with a `kind`, and the codec that they describe. Stateless: the same input gives the same bytes.

    Attributes:
        fixed_size: payload_bytes() is exact for every tensor, so that no lengths need to be exchanged.
        sparse: decode() gives a Sparse; collectives that exchange indices need this.
        elementwise: tensors may be joined into one flat tensor before encoding, and that cut at multiples of
            `granule` elements, without a change of meaning: what the two-shot collective needs.
        granule: elements that share a scale; 1 where none do.
        homogeneous: decode(encode(t x)) = t decode(encode(x)) for every power of two t, ranges permitting.
    """

    fixed_size: ClassVar[bool]
    sparse: ClassVar[bool] = False
    elementwise: ClassVar[bool] = False
    homogeneous: ClassVar[bool] = True

    @property
    def granule(self) -> int:
        return 1

    @abstractmethod
    def payload_bytes(self, shape: torch.Size) -> int:
        """Bytes of the payload of a tensor of this shape: exact if fixed_size, otherwise what to expect."""

    @abstractmethod
    def encode(self, tensor: Tensor, draw: Draw) -> Tensor:
        """Encode a contiguous, finite fp32 tensor of any shape, with at least one element.

        Returns: the payload, uint8 (payload_bytes,), on the tensor's device; never longer than the tensor itself
        plus a tag of 4 bytes. The tensor is not changed.
        """

    @abstractmethod
    def decode(self, payload: Tensor, shape: torch.Size, draw: Draw) -> Decoded:
        """What `payload` says about a tensor of this shape, with the sender's draw. Safe with hostile bytes.

        Raises:
            PayloadError: the bytes are not a payload of this compressor for this shape.
        """

    def decode_into(self, payload: Tensor, out: Tensor, draw: Draw) -> None:
        """out <- decode(payload), for elementwise compressors: equal bits, one pass where there is a kernel for that.

        Args:
            out: fp32, flat, contiguous, with as many elements as were encoded.
        Raises:
            PayloadError: as decode(); what is in `out` then is not defined.
        """
        out.copy_(to_dense(self.decode(payload, out.shape, draw)))

    def encode_with_feedback(self, gradient: Tensor, memory: Tensor, next_memory: Tensor, draw: Draw) -> Tensor:
        """Encode c = gradient + memory, and write next_memory <- c - decode(payload): what was left behind.

        This is the definition; a compressor with a fused kernel overrides it, with equal bits.

        Args: contiguous fp32 tensors of one shape. next_memory shares memory with neither of the others, but may be
            `memory` itself if the compressor is elementwise.
        """
        torch.add(gradient, memory, out=next_memory)
        payload = self.encode(next_memory, draw)
        add_to(next_memory, self.decode(payload, gradient.shape, draw), -1.0)
        return payload

    def contraction(self, tensor: Tensor) -> float | None:
        """alpha in ||C(x) - x||^2 <= (1 - alpha) ||x||^2 for tensors of this size; None where none is guaranteed."""
        return None
