"""The entries that a sparse compressor keeps of all tensors of a call: one list of places, and values by tensor.

A code has a price for each call and a table for each list, so that one long list is coded several times faster than
many short ones, and in fewer bytes. The values are rounded tensor by tensor, with the bits of the compressor's own
payload: tensors of different magnitudes share no scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from thinwire.comm.compress.collectives.contribution import contribute, decode
from thinwire.comm.compress.compressors.sparse import SparseCompressor, written_as
from thinwire.comm.compress.decoded import Decoded, Sparse, split_decoded
from thinwire.comm.compress.draw import Draw
from thinwire.comm.compress.index_code import decode_indices, encode_indices
from thinwire.comm.compress.value_code import decode_values, encode_values
from thinwire.comm.finite import are_finite
from thinwire.comm.wire import FLAG_NOT_FINITE, PayloadError, message_bytes

EXTRA_SECTIONS = 2
_LARGEST_COUNT = (1 << 31) - 1


def contribute_jointly(
    compressor: SparseCompressor,
    tensors: Sequence[Tensor],
    draws: Sequence[Draw],
    memories: Sequence[tuple[Tensor, Tensor]] | None,
    *,
    absent: bool,
) -> tuple[int, list[Tensor]]:
    """As contribute(), with sections for decode_jointly(): counts, places, and the values of each tensor.

    Where the tensors themselves are shorter, as at densities near 1, counts and places are empty, and the compressor's
    own payloads follow.
    """
    if absent or not are_finite(tensors):
        return contribute(compressor, tensors, draws, memories, absent=absent)
    counts, places, coded, first = [], [], [], 0
    for i, (x, draw) in enumerate(zip(tensors, draws, strict=True)):
        flat = x.view(-1)
        if not x.numel():
            indices, values = torch.empty(0, dtype=torch.int64, device=x.device), flat
        elif memories is None:
            indices, values = compressor.keep(flat, draw)
        else:
            memory, next_memory = memories[i]
            indices, values = compressor.keep_with_feedback(flat, memory.view(-1), next_memory.view(-1), draw)
        if not are_finite([values]):
            return FLAG_NOT_FINITE, []
        kind = written_as(compressor.values, len(values))
        payload = encode_values(values, kind, draw.own_key())
        if memories is not None and kind != "fp32":
            memories[i][1].view(-1)[indices] = values - decode_values(payload, len(values), kind)[0]
        counts.append(len(values))
        places.append(indices + first)
        coded.append(payload)
        first += x.numel()
    if not are_finite(after for _, after in memories or []):
        return FLAG_NOT_FINITE, []
    head = torch.tensor(counts, device=tensors[0].device).clamp_(max=_LARGEST_COUNT).to(torch.int32).view(torch.uint8)
    sections = [head, encode_indices(torch.cat(places), first), *coded]
    whole_bytes = message_bytes([0, 0, *(4 + 4 * x.numel() for x in tensors)])
    if max(counts) < _LARGEST_COUNT and message_bytes([section.numel() for section in sections]) <= whole_bytes:
        return 0, sections
    flags, payloads = contribute(compressor, tensors, draws, memories)
    return flags, [head[:0], head[:0], *payloads]


def decode_jointly(
    compressor: SparseCompressor,
    sections: Sequence[Tensor],
    shapes: Sequence[torch.Size],
    draws: Sequence[Draw],
    *,
    sender: int,
) -> list[Decoded]:
    """What the sections of contribute_jointly() say about tensors of these shapes.

    Raises:
        PayloadError: the bytes are not such sections.
    """
    head, coded, *payloads = sections
    if not head.numel() and not coded.numel() and shapes:
        return [
            decode(compressor, payload, shape, draw, sender=sender)
            for payload, shape, draw in zip(payloads, shapes, draws, strict=True)
        ]
    numels = [shape.numel() for shape in shapes]
    counts = head.clone().view(torch.int32).tolist() if head.numel() == 4 * len(shapes) else []
    if not counts or any(not 0 <= count <= numel for count, numel in zip(counts, numels, strict=True)):
        raise PayloadError(f"counts of {head.numel()} bytes that are not those of {len(shapes)} tensors")
    indices, used = decode_indices(coded, sum(numels), sum(counts))
    if used != coded.numel():
        raise PayloadError(f"{coded.numel() - used} bytes too many after the places")
    values = [_values(compressor, payload, count) for payload, count in zip(payloads, counts, strict=True)]
    parts = split_decoded(Sparse(sum(numels), indices, torch.cat(values)), numels)
    ends = torch.searchsorted(indices, torch.tensor(list(accumulate(numels)), device=indices.device))
    if ends.tolist() != list(accumulate(counts)):
        raise PayloadError("places that belong to other tensors than the values")
    return parts


def longest_message(shapes: Sequence[torch.Size]) -> int:
    """Bytes that no message of contribute_jointly() exceeds."""
    return message_bytes([4 * len(shapes), 16, *(4 + 4 * shape.numel() for shape in shapes)])


def _values(compressor: SparseCompressor, payload: Tensor, count: int) -> Tensor:
    values, used = decode_values(payload, count, written_as(compressor.values, count))
    if used != payload.numel():
        raise PayloadError(f"{payload.numel() - used} bytes too many after the values")
    if not bool(values.isfinite().all()):
        raise PayloadError("a value that is not finite")
    return values
