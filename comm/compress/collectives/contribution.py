"""What one rank contributes to an exchange: payloads, or the reason why there are none. Alike in all collectives."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from thinwire.comm.compress.compressor import Compressor
from thinwire.comm.compress.decoded import Decoded, Sparse
from thinwire.comm.compress.draw import Draw
from thinwire.comm.finite import are_finite
from thinwire.comm.settings import Settings
from thinwire.comm.wire import (
    FLAG_ABSENT,
    FLAG_NOT_FINITE,
    Message,
    PayloadError,
    message_bytes,
    pack_message,
    unpack_message,
)

_ALIGNMENT = 4  # of messages within a buffer, so that their sections are aligned too


class Envelope:
    """Packs and unpacks the messages of ranks that all have the same settings.

    Args:
        settings: whose fingerprint is the messages' codec: a rank with others is found out.
    """

    def __init__(self, settings: Settings) -> None:
        text = f"{type(settings).__name__} {settings.model_dump_json()}"
        self._codec = zlib.crc32(text.encode()) & 0xFF

    def pack(self, flags: int, sections: Sequence[Tensor], device: torch.device) -> tuple[int, Tensor]:
        """The length of one message, and the message in its slot."""
        message = pack_message(sections, codec=self._codec, flags=flags).to(device)
        length = message.numel()
        return length, torch.nn.functional.pad(message, (0, slot_bytes(length) - length))

    def unpack(self, received: Tensor, lengths: Sequence[int], absent: Sequence[bool], sections: int) -> list[Message]:
        """The messages of all ranks, slot after slot.

        Args:
            lengths: of the messages in bytes.
            absent: which ranks were to take no part.
            sections: how many each message must have, unless it says that it has none.
        Raises:
            PayloadError: the bytes are no such messages.
        """
        slots = received.split([slot_bytes(length) for length in lengths])
        messages = []
        for sender, (slot, length, away) in enumerate(zip(slots, lengths, absent, strict=True)):
            try:
                message = unpack_message(slot[:length], codec=self._codec)
                if bool(message.flags & FLAG_ABSENT) != away:
                    raise PayloadError(f"the sender takes {'' if away else 'no '}part, against the weights given here")
                if not message.flags and len(message.sections) != sections:
                    raise PayloadError(f"a message of {len(message.sections)} sections, not of {sections}")
            except PayloadError as error:
                raise PayloadError(f"from rank {sender} of the exchange: {error}") from error
            messages.append(message)
        return messages


def slot_bytes(length: int) -> int:
    """What a message of `length` bytes takes up on the wire."""
    return -(-length // _ALIGNMENT) * _ALIGNMENT


def expected_bytes(compressor: Compressor, shapes: Sequence[torch.Size], *, absent: bool = False) -> int:
    """Bytes of the message with one payload per tensor; exact for compressors of fixed size."""
    return message_bytes([] if absent else [_payload_bytes(compressor, shape) for shape in shapes])


def contribute(
    compressor: Compressor,
    tensors: Sequence[Tensor],
    draws: Sequence[Draw],
    memories: Sequence[tuple[Tensor, Tensor]] | None,
    *,
    absent: bool = False,
    broken: bool = False,
) -> tuple[int, list[Tensor]]:
    """Flags and payloads of this rank; with memories, the next ones are written too.

    Payloads of a fixed size keep their place in a message that says NOT_FINITE, since nobody expects another length.

    Args:
        absent: send nothing; all of input + memory is left behind.
        broken: say NOT_FINITE whatever the tensors hold.
    """
    flags = FLAG_ABSENT if absent else 0
    payloads: list[Tensor] = []
    if not broken and are_finite(tensors):
        if memories is None:
            payloads = [] if absent else [_encode(compressor, x, draw) for x, draw in zip(tensors, draws, strict=True)]
            return flags, payloads
        for x, draw, (memory, next_memory) in zip(tensors, draws, memories, strict=True):
            if absent:
                torch.add(x, memory, out=next_memory)
            elif x.numel():
                payloads.append(compressor.encode_with_feedback(x, memory, next_memory, draw))
            else:
                payloads.append(_blank(x, 0))
        if are_finite(left for _, left in memories):
            return flags, payloads
    if absent or not compressor.fixed_size:
        return flags | FLAG_NOT_FINITE, []
    return FLAG_NOT_FINITE, [_blank(x, _payload_bytes(compressor, x.shape)) for x in tensors]


def decode(compressor: Compressor, payload: Tensor, shape: torch.Size, draw: Draw, *, sender: int) -> Decoded:
    """What a payload of contribute() says.

    Args:
        draw: this rank's; the sender's differs from it in the rank alone.
    Raises:
        PayloadError: the bytes are not such a payload.
    """
    if shape.numel():
        return compressor.decode(payload, shape, replace(draw, rank=sender))
    if payload.numel():
        raise PayloadError(f"a payload of {payload.numel()} bytes for a tensor of no elements")
    return torch.empty(0, dtype=torch.float32, device=payload.device)


def decode_into(compressor: Compressor, payload: Tensor, out: Tensor, draw: Draw, *, sender: int) -> None:
    """out <- decode(), out being flat and fp32.

    Raises:
        PayloadError: as decode().
    """
    if out.numel():
        compressor.decode_into(payload, out, replace(draw, rank=sender))
    else:
        decode(compressor, payload, out.shape, draw, sender=sender)


def fill_with_nan(outputs: Sequence[Tensor]) -> None:
    """What the outputs are when an input of any rank was not finite."""
    for output in outputs:
        output.fill_(float("nan"))


def nothing(tensors: Sequence[Tensor]) -> list[Decoded]:
    """The contribution of an absent rank."""
    return [Sparse(x.numel(), torch.empty(0, dtype=torch.int64, device=x.device), x.new_empty(0)) for x in tensors]


def _payload_bytes(compressor: Compressor, shape: torch.Size) -> int:
    return compressor.payload_bytes(shape) if shape.numel() else 0


def _encode(compressor: Compressor, tensor: Tensor, draw: Draw) -> Tensor:
    return compressor.encode(tensor, draw) if tensor.numel() else _blank(tensor, 0)


def _blank(like: Tensor, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.uint8, device=like.device)
