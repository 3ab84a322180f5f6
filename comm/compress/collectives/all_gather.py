"""Mean of compressed tensors by gathering everybody's message: for payloads that cannot be summed or cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from thinwire.comm.channel import Channel
from thinwire.comm.compress.collective import Job
from thinwire.comm.compress.collectives.contribution import (
    Envelope,
    contribute,
    decode,
    expected_bytes,
    fill_with_nan,
    nothing,
    slot_bytes,
)
from thinwire.comm.compress.collectives.joint_entries import (
    EXTRA_SECTIONS,
    contribute_jointly,
    decode_jointly,
    longest_message,
)
from thinwire.comm.compress.compressor import Compressor
from thinwire.comm.compress.compressors.sparse import SparseCompressor
from thinwire.comm.compress.decoded import Decoded, Sparse, add_to
from thinwire.comm.finite import are_finite
from thinwire.comm.two_shot import is_worth_rounds
from thinwire.comm.wire import FLAG_NOT_FINITE, Message, PayloadError

_LENGTH_BYTES = 8


class AllGather:
    """outputs[i] <- 1/n * sum_r weights[r] * C(inputs_r[i]): every rank receives and adds the messages of all.

    A call sends one message to each other rank: (n-1) payloads. So it suits sparse payloads on few ranks; its traffic
    grows with n. Compressors without a fixed size exchange 8 bytes of length first; the places of all tensors of a
    call that topk and threshold keep are coded as one list.

    With contributors_only the divisor of an element is not n but the number of ranks that sent it (of weight 0, none
    has), as SparseLoCo's implementation has it (Sarfi et al. 2025, arXiv 2508.15706), and DeMo's. Where few ranks agree
    on what is large, the result is up to n times as large as the mean.

    Args:
        compressor: any; with contributors_only a sparse one.
        contributors_only: divide by the number of contributions.
    """

    def __init__(self, compressor: Compressor, *, contributors_only: bool = False) -> None:
        self.compressor = compressor
        self._contributors_only = contributors_only
        self._envelope = Envelope(compressor)
        self._lengths: dict[tuple[str, ...], list[int]] = {}  # of the last call's messages, by the tensors' names

    def mean(self, channel: Channel, job: Job) -> list[Decoded] | None:
        """As in Collective."""
        rank, size = channel.rank, channel.size
        weights = job.weights or [1.0] * size
        absent = [weight == 0 for weight in weights]
        shapes = [x.shape for x in job.inputs]
        flags, sections = self._encode(job, absent=absent[rank])
        length, slot = self._envelope.pack(flags, sections, job.inputs[0].device)
        lengths = self._exchange_lengths(channel, length, slot, shapes, absent)
        self._lengths[tuple(job.names)] = lengths
        slots = [slot_bytes(n) for n in lengths]
        received = torch.empty(sum(slots), dtype=torch.uint8, device=slot.device)
        channel.all_gather(received, slot, slots, in_rounds=is_worth_rounds(max(slots)))
        messages = self._envelope.unpack(received, lengths, absent, self._sections(len(shapes)))
        if any(message.flags & FLAG_NOT_FINITE for message in messages):
            fill_with_nan(job.outputs)
            return None
        own = nothing(job.inputs)
        for output in job.outputs:
            output.zero_()
        senders = [torch.zeros_like(output) for output in job.outputs] if self._contributors_only else []
        for sender, (message, weight) in enumerate(zip(messages, weights, strict=True)):
            if not weight:
                continue
            decoded = self._decode(message, shapes, job, sender)
            for output, part in zip(job.outputs, decoded, strict=True):
                add_to(output, part, weight)
            for count, part in zip(senders, decoded if senders else [], strict=True):
                add_to(count, _ones_where_sent(part))
            if sender == rank:
                own = decoded
        if self._contributors_only:
            for output, count in zip(job.outputs, senders, strict=True):
                output.div_(count.clamp_(min=1.0))
        elif size > 1:
            for output in job.outputs:
                output.mul_(1.0 / size)
        if not are_finite(job.outputs):
            fill_with_nan(job.outputs)
            return None
        return own if job.memories is None else []

    def commit(self) -> None:
        """Nothing is kept."""

    def rollback(self) -> None:
        """Nothing is kept."""

    def surrendered(self) -> list[tuple[str, int, Tensor]]:
        """Nothing."""
        return []

    def sent_bytes(self, shapes: Mapping[str, Sequence[int]], rank: int, size: int) -> dict[int, int]:
        """As in Collective; of the last call with these names, or before the first as the compressor expects."""
        lengths = self._lengths.get(tuple(shapes), [])
        if len(lengths) == size:
            length = lengths[rank]
        else:
            length = expected_bytes(self.compressor, [torch.Size(shape) for shape in shapes.values()])
        to_each = slot_bytes(length) + (0 if self.compressor.fixed_size else _LENGTH_BYTES)
        return {r: to_each for r in range(size) if r != rank}

    def state_dict(self) -> dict[str, Any]:
        """Empty."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Accept the empty state."""
        assert not state

    def merge(self, states: Sequence[Mapping[str, Any]], rank: int, size: int) -> dict[str, Any]:
        """Empty."""
        return {}

    def _encode(self, job: Job, *, absent: bool) -> tuple[int, list[Tensor]]:
        if isinstance(self.compressor, SparseCompressor):
            return contribute_jointly(self.compressor, job.inputs, job.draws, job.memories, absent=absent)
        return contribute(self.compressor, job.inputs, job.draws, job.memories, absent=absent)

    def _sections(self, tensors: int) -> int:
        return tensors + (EXTRA_SECTIONS if isinstance(self.compressor, SparseCompressor) else 0)

    def _decode(self, message: Message, shapes: Sequence[torch.Size], job: Job, sender: int) -> list[Decoded]:
        if isinstance(self.compressor, SparseCompressor):
            return decode_jointly(self.compressor, message.sections, shapes, job.draws, sender=sender)
        return [
            decode(self.compressor, payload, shape, draw, sender=sender)
            for payload, shape, draw in zip(message.sections, shapes, job.draws, strict=True)
        ]

    def _exchange_lengths(
        self, channel: Channel, own: int, slot: Tensor, shapes: Sequence[torch.Size], absent: Sequence[bool]
    ) -> list[int]:
        """Bytes of every rank's message; asked for only if they cannot be known."""
        if self.compressor.fixed_size:
            return [expected_bytes(self.compressor, shapes, absent=away) for away in absent]
        lengths: list[int] = channel.all_gather_same(torch.tensor(own, device=slot.device)).tolist()
        longest = longest_message(shapes)
        for r, length in enumerate(lengths):
            if not 0 < length <= longest:
                raise PayloadError(f"from rank {r} of the exchange: a message of {length} bytes; at most {longest}")
        return lengths


def _ones_where_sent(decoded: Decoded) -> Decoded:
    if isinstance(decoded, Sparse):
        return replace(decoded, values=torch.ones_like(decoded.values))
    return (decoded != 0).to(torch.float32)  # sent whole because that was shorter: zeros are what was not kept
