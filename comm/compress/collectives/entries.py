"""Some entries of a range as sections of a message: how many, where, and their values."""

from __future__ import annotations

import torch
from torch import Tensor

from thinwire.comm.compress.compressors.sparse import written_as
from thinwire.comm.compress.index_code import decode_indices, encode_indices
from thinwire.comm.compress.value_code import ValueKind, decode_values, encode_values, values_bytes
from thinwire.comm.wire import Message, PayloadError, message_bytes

SECTIONS = 3


def write_entries(indices: Tensor, values: Tensor, numel: int, kind: ValueKind, key: int) -> list[Tensor]:
    """Sections for read_entries().

    Args:
        indices: int64, ascending, in 0..numel-1; values: fp32, finite, one for each.
        kind, key: how the values are rounded; see value_code.
    """
    count = torch.tensor([len(indices)], device=indices.device).view(torch.uint8)
    return [count, encode_indices(indices, numel), encode_values(values, written_as(kind, len(values)), key)]


def read_entries(message: Message, numel: int, kind: ValueKind, sender: int) -> tuple[Tensor, Tensor]:
    """Indices and values.

    Raises:
        PayloadError: the sections say nothing about `numel` places.
    """
    try:
        head, coded, rounded = message.sections
        if head.numel() != 8:
            raise PayloadError(f"a count of {head.numel()} bytes")
        count = int(head.clone().view(torch.int64))
        indices, places_end = decode_indices(coded, numel, count)
        values, values_end = decode_values(rounded, count, written_as(kind, count))
        if places_end != coded.numel() or values_end != rounded.numel() or not bool(values.isfinite().all()):
            raise PayloadError(f"{count} entries with bytes too many, or values that are not finite")
    except PayloadError as error:
        raise PayloadError(f"from rank {sender} of the exchange: {error}") from error
    return indices, values


def most_bytes(numel: int) -> int:
    """Length that no message about `numel` places exceeds."""
    return message_bytes([8, numel // 8 + 16, 4 * numel + 16])


def expected_bytes(count: int, kind: ValueKind, bits_per_index: float) -> int:
    """Length of a message with this many entries, about."""
    return message_bytes([8, round(count * bits_per_index / 8), values_bytes(count, written_as(kind, count))])
