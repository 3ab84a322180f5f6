"""Mean of dense quantised tensors: all-to-all of encoded slices, one sum in fp32, encoded once, all-gather."""

from __future__ import annotations

import math
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
    decode_into,
    expected_bytes,
    fill_with_nan,
    nothing,
    slot_bytes,
)
from thinwire.comm.compress.collectives.flat import copy_back, destination, joined, split_like
from thinwire.comm.compress.collectives.owner_errors import OwnerErrors
from thinwire.comm.compress.collectives.reduce import mean_of_payloads
from thinwire.comm.compress.compressor import Compressor
from thinwire.comm.compress.decoded import Decoded
from thinwire.comm.compress.draw import Draw
from thinwire.comm.finite import are_finite
from thinwire.comm.two_shot import is_worth_rounds, split_evenly
from thinwire.comm.wire import FLAG_NOT_FINITE, Message

_UNIT = 16  # elements: slices begin at multiples of this


class TwoShot:
    """outputs <- C(1/n * sum_r weights[r] * C(inputs_r)), the same bits on every rank.

    The tensors of a call are joined, and rank o owns the o-th slice. Every rank encodes each slice for its owner; the
    owner adds the n decoded slices in fp32 and in rank order, divides, encodes the mean and sends it to everyone. Each
    rank sends about 2 (n-1)/n payloads, however many ranks there are, and a value is rounded twice, not n times as in a
    ring that encodes anew at each hop.

    With server_error the owner keeps what the second encoding left behind (the server's half of EF21-BC, Fatkhullin et
    al. 2021, arXiv 2110.03294; of double compression, Tang et al. 2019, arXiv 1905.05957): C(m + E) is sent, and
    E <- m + E - C(m + E). E is kept by parameter name and range, and changes only at commit().

    Args:
        compressor: dense, of fixed size, and elementwise.
        server_error: keep the error of the second encoding.
    Raises:
        ValueError: another compressor.
    """

    def __init__(self, compressor: Compressor, *, server_error: bool = False) -> None:
        if compressor.sparse or not (compressor.fixed_size and compressor.elementwise):
            raise ValueError(
                f"compressor: {compressor!r} cannot be cut into slices of known size, as two_shot needs; use a dense "
                "elementwise one, or the collective all_gather"
            )
        self.compressor = compressor
        self._envelope = Envelope(compressor)
        self._unit = math.lcm(_UNIT, compressor.granule)
        self._errors = OwnerErrors() if server_error else None
        self._absent: dict[tuple[str, ...], list[bool]] = {}  # in the last call, by the tensors' names

    def mean(self, channel: Channel, job: Job) -> list[Decoded] | None:
        """As in Collective."""
        rank, size = channel.rank, channel.size
        weights = job.weights or [1.0] * size
        absent = self._absent[tuple(job.names)] = [weight == 0 for weight in weights]
        flat = joined(job.inputs)
        splits = self.splits(flat.numel(), size)
        draws = [replace(job.draws[0], name=f"{job.names[0]}/slice{owner}") for owner in range(size)]

        next_flat, memories = _join_memories(job, splits)
        flags, payloads = contribute(self.compressor, flat.split(splits), draws, memories, absent=absent[rank])
        if job.memories is not None and next_flat is not None:
            copy_back(next_flat, [after for _, after in job.memories])
        incoming = self._to_owners(channel, flags, payloads, splits, absent, flat.device)
        broken = any(message.flags & FLAG_NOT_FINITE for message in incoming)
        reduced = flat.new_zeros(splits[rank])
        if not broken:
            payloads_of_slice = [message.sections[0] if message.sections else None for message in incoming]
            mean_of_payloads(self.compressor, payloads_of_slice, reduced, draws[rank], weights)
        means = self._from_owners(channel, job, reduced, splits, draws[rank], broken)
        if any(message.flags & FLAG_NOT_FINITE for message in means):
            fill_with_nan(job.outputs)
            return None

        result = destination(job.outputs, job.inputs, flat)
        for owner, (message, part) in enumerate(zip(means, result.split(splits), strict=True)):
            decode_into(self.compressor, message.sections[0], part, _of_mean(draws[owner]), sender=owner)
        copy_back(result, job.outputs)
        if not are_finite([result]):
            fill_with_nan(job.outputs)
            return None
        if job.memories is not None:
            return []
        if absent[rank]:
            return nothing(job.inputs)
        own = torch.empty_like(flat)
        for payload, part, draw in zip(payloads, own.split(splits), draws, strict=True):
            decode_into(self.compressor, payload, part, draw, sender=rank)
        return list(split_like(own, job.inputs))

    def commit(self) -> None:
        """Keep the owner's errors."""
        if self._errors is not None:
            self._errors.commit()

    def rollback(self) -> None:
        """Forget the owner's new errors."""
        if self._errors is not None:
            self._errors.rollback()

    def surrendered(self) -> list[tuple[str, int, Tensor]]:
        """As in Collective."""
        return [] if self._errors is None else self._errors.surrendered()

    def sent_bytes(self, shapes: Mapping[str, Sequence[int]], rank: int, size: int) -> dict[int, int]:
        """As in Collective; exact before the first call unless this rank will be absent."""
        numel = sum(math.prod(shape) for shape in shapes.values())
        splits = self.splits(numel, size)
        absent = self._absent.get(tuple(shapes), [])
        absent = absent if len(absent) == size else [False] * size
        mean_bytes = slot_bytes(self._length(splits[rank]))
        return {
            owner: slot_bytes(self._length(splits[owner], absent[rank])) + mean_bytes
            for owner in range(size)
            if owner != rank
        }

    def splits(self, numel: int, size: int) -> list[int]:
        """Elements of the slice that each rank owns."""
        return split_evenly(numel, size, self._unit)

    def kept_bytes(self, shapes: Mapping[str, Sequence[int]], rank: int, size: int) -> int:
        """Of the errors of this rank's slice, in fp32."""
        numel = sum(math.prod(shape) for shape in shapes.values())
        return 0 if self._errors is None else 4 * self.splits(numel, size)[rank]

    def state_dict(self) -> dict[str, Any]:
        """The owner's errors: {"errors": {name: {offset: fp32 tensor}}}; empty without them."""
        return {} if self._errors is None else {"errors": self._errors.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what state_dict() gave. Ranges that this rank no longer owns are surrendered at the next step."""
        if self._errors is not None:
            self._errors.load_state_dict(state["errors"])

    def merge(self, states: Sequence[Mapping[str, Any]], rank: int, size: int) -> dict[str, Any]:
        """As in Collective: the new ranks share the pieces of the old ones, and surrender what they do not own."""
        if self._errors is None:
            return {}
        return {"errors": OwnerErrors.union([state["errors"] for state in states[rank::size]])}

    def _to_owners(
        self,
        channel: Channel,
        flags: int,
        payloads: Sequence[Tensor],
        splits: Sequence[int],
        absent: Sequence[bool],
        device: torch.device,
    ) -> list[Message]:
        """Send every slice to its owner; what all ranks say about this rank's slice."""
        outgoing = [self._envelope.pack(flags, payloads[o : o + 1], device)[1] for o in range(channel.size)]
        lengths = [self._length(splits[channel.rank], away) for away in absent]
        slots = [slot_bytes(length) for length in lengths]
        received = torch.empty(sum(slots), dtype=torch.uint8, device=device)
        in_rounds = is_worth_rounds(self._length(splits[0]))
        channel.all_to_all(received, torch.cat(outgoing), slots, [x.numel() for x in outgoing], in_rounds=in_rounds)
        return self._envelope.unpack(received, lengths, absent, 1)

    def _from_owners(
        self, channel: Channel, job: Job, reduced: Tensor, splits: Sequence[int], draw: Draw, broken: bool
    ) -> list[Message]:
        """Encode the mean of this rank's slice, with the error of the last time, and collect those of all slices."""
        rank, size = channel.rank, channel.size
        memories = None
        if self._errors is not None:
            numels = [x.numel() for x in job.inputs]
            memories = [self._errors.next(job.names, numels, sum(splits[:rank]), reduced, size)]
        draws = [replace(_of_mean(draw), rank=rank)]
        flags, payloads = contribute(self.compressor, [reduced], draws, memories, broken=broken)
        _, slot = self._envelope.pack(flags, payloads, reduced.device)
        lengths = [self._length(split) for split in splits]
        slots = [slot_bytes(length) for length in lengths]
        received = torch.empty(sum(slots), dtype=torch.uint8, device=reduced.device)
        channel.all_gather(received, slot, slots, in_rounds=is_worth_rounds(self._length(splits[0])))
        return self._envelope.unpack(received, lengths, [False] * size, 1)

    def _length(self, numel: int, absent: bool = False) -> int:
        return expected_bytes(self.compressor, [torch.Size([numel])], absent=absent)


def _of_mean(draw: Draw) -> Draw:
    """The second encoding must not repeat the random numbers of the first."""
    return replace(draw, name=f"{draw.name}/mean")


def _join_memories(job: Job, splits: Sequence[int]) -> tuple[Tensor | None, list[tuple[Tensor, Tensor]] | None]:
    """The flat tensor that receives the next memories, and (memory, next_memory) of every slice."""
    if job.memories is None:
        return None, None
    before, after = zip(*job.memories, strict=True)
    memory = joined(before)
    next_flat = destination(after, before, memory)
    return next_flat, list(zip(memory.split(splits), next_flat.split(splits), strict=True))
