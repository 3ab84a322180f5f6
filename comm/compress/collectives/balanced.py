"""Mean of sparse tensors whose owners add up the entries of a region each, and keep the largest sums of all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from thinwire.comm.channel import Channel
from thinwire.comm.compress.collective import Job
from thinwire.comm.compress.collectives.contribution import (
    Envelope,
    fill_with_nan,
    slot_bytes,
)
from thinwire.comm.compress.collectives.entries import (
    SECTIONS,
    expected_bytes,
    most_bytes,
    read_entries,
    write_entries,
)
from thinwire.comm.compress.collectives.flat import copy_back
from thinwire.comm.compress.compressor import Compressor
from thinwire.comm.compress.compressors.sparse import SparseCompressor, index_bits
from thinwire.comm.compress.decoded import Decoded, Sparse, add_to, split_decoded
from thinwire.comm.finite import are_finite
from thinwire.comm.two_shot import is_worth_rounds
from thinwire.comm.wire import FLAG_ABSENT, FLAG_NOT_FINITE, Message, PayloadError

_THRESHOLD_STEPS = 32
_REGIONS_STEPS = 64
_DRIFT = 1.5  # a count this many times too large or too small asks for a new threshold
_LENGTH_BYTES = 8
_NOT_FINITE = -1


@dataclass(frozen=True)
class _Plan:
    """What a group of tensors goes by until it is made anew; the same on every rank.

    Attributes: regions, the size + 1 borders of the owners' regions in the joined tensor; threshold, the smallest
    magnitude of a mean that is sent; age, steps since the regions were drawn; count, entries of the last mean.
    """

    regions: list[int]
    threshold: float = 0.0
    age: int = 0
    count: int = 0


class Balanced:
    """outputs <- the largest k entries of 1/n * sum_r weights[r] * C(inputs_r), k being what C keeps of one rank's.

    Ok-Topk: Li, Hoefler (2022), arXiv 2201.07598. The tensors of a call are joined and cut into a region for each rank,
    with borders by which every rank's entries spread evenly. Each rank sends each owner the entries of its region; the
    owner adds them in fp32 and in rank order, and sends everyone the sums that reach a threshold. It is the k-th
    largest sum of all, looked for every 32 steps, and at once when the count has drifted by half; the regions are drawn
    every 64 steps. Traffic per rank is about 2 (n-1)/n coded payloads of k entries while the ranks' entries are spread
    alike, where the paper has up to 6k (n-1)/n words, and does not grow with n as that of all_gather does.

    A rank contributes what it has sent of the entries that made it; the rest stays in its memory. The sums are rounded
    once more, as the compressor's `values` say; with fp32 values outputs are exactly the mean of the contributions.

    Args:
        compressor: topk or threshold.
    Raises:
        ValueError: another compressor.
    """

    def __init__(self, compressor: Compressor) -> None:
        if not isinstance(compressor, SparseCompressor):
            raise ValueError(
                f"compressor: {compressor!r} does not choose the largest entries, which balanced adds up; use topk or "
                "threshold, or the collective two_shot or all_gather"
            )
        self.compressor = compressor
        self._envelope = Envelope(compressor)
        self._plans: dict[tuple[str, ...], _Plan] = {}
        self._staged: dict[tuple[str, ...], _Plan] = {}
        self._sent: dict[tuple[str, ...], Counter[int]] = {}  # bytes of the last call, by receiver

    def mean(self, channel: Channel, job: Job) -> list[Decoded] | None:
        """As in Collective."""
        call = _Call(channel, self._sent.setdefault(tuple(job.names), Counter()))
        call.sent.clear()
        weights = list(job.weights or [1.0] * channel.size)
        flat = torch.cat([x.flatten() for x in job.inputs])
        if job.memories is not None:
            flat += torch.cat([memory.flatten() for memory, _ in job.memories])
        finite = are_finite([flat])
        places, values = self._choose(flat, job) if finite and weights[channel.rank] else _no_entries(flat)
        plan = self._plan(call, job, places, flat.numel())

        messages, sent = self._to_owners(call, job, plan.regions, places, values, weights, finite)
        if messages is None:
            fill_with_nan(job.outputs)
            return None
        places, sums = self._reduce(messages, plan.regions, channel.rank, weights)
        plan = self._with_threshold(call, plan, sums, self._wanted([x.numel() for x in job.inputs]))
        kept = (sums.abs() >= plan.threshold) & (sums != 0)
        mean = self._from_owners(call, job, plan.regions, places[kept], sums[kept])
        if mean is None:
            fill_with_nan(job.outputs)
            return None

        self._staged[tuple(job.names)] = replace(plan, age=plan.age + 1, count=len(mean.indices))
        return self._finish(job, flat, mean, _common(sent, mean.indices))

    def commit(self) -> None:
        """Keep the regions and thresholds of this step."""
        self._plans |= self._staged
        self._staged = {}

    def rollback(self) -> None:
        """Forget them."""
        self._staged = {}

    def surrendered(self) -> list[tuple[str, int, Tensor]]:
        """Nothing: regions and thresholds hold no gradients."""
        return []

    def sent_bytes(self, shapes: Mapping[str, Sequence[int]], rank: int, size: int) -> dict[int, int]:
        """As in Collective; of the last call with these names, or before the first what a later call may send."""
        others = [r for r in range(size) if r != rank]
        last = self._sent.get(tuple(shapes))
        if last:
            return {r: last[r] for r in others}
        numels = [torch.Size(shape).numel() for shape in shapes.values()]
        each = slot_bytes(self._expected_bytes(numels, size)) + _LENGTH_BYTES
        return dict.fromkeys(others, 2 * each)

    def state_dict(self) -> dict[str, Any]:
        """Regions and thresholds, the same on every rank: {"plans": [{"names": [...], "regions": [...], ...}]}."""
        return {"plans": [{"names": list(names), **vars(plan)} for names, plan in self._plans.items()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what state_dict() gave."""
        self._staged = {}
        self._plans = {}
        for saved in state["plans"]:
            fields = {key: value for key, value in saved.items() if key != "names"}
            self._plans[tuple(saved["names"])] = _Plan(**fields)

    def merge(self, states: Sequence[Mapping[str, Any]], rank: int, size: int) -> dict[str, Any]:
        """As in Collective: other ranks need other regions, so all is found anew."""
        return {"plans": []}

    def _wanted(self, numels: Sequence[int]) -> int:
        return sum(self.compressor.expected_count(numel) for numel in numels if numel)

    def _expected_bytes(self, numels: Sequence[int], size: int) -> int:
        """Length of the message about one region, if entries are spread evenly and no more than wanted."""
        wanted, numel = self._wanted(numels), sum(numels)
        bits = index_bits(wanted / numel) if wanted else 0.0
        return expected_bytes(-(-wanted // size), self.compressor.values, bits)

    def _choose(self, flat: Tensor, job: Job) -> tuple[Tensor, Tensor]:
        """What this rank would keep of its tensors: places in the joined one, ascending, and values."""
        places, values, first = [], [], 0
        for part, draw in zip(flat.split([x.numel() for x in job.inputs]), job.draws, strict=True):
            if part.numel():
                indices, kept = self.compressor.keep(part, draw)
                places.append(indices + first)
                values.append(kept)
            first += part.numel()
        return (torch.cat(places), torch.cat(values)) if places else _no_entries(flat)

    def _plan(self, call: _Call, job: Job, places: Tensor, numel: int) -> _Plan:
        """The present plan, or a new one: borders that would give each region as many of every rank's entries."""
        size = call.channel.size
        plan = self._plans.get(tuple(job.names))
        if (
            plan is not None
            and plan.age < _REGIONS_STEPS
            and plan.regions[-1] == numel
            and len(plan.regions) == size + 1
        ):
            return plan
        parts = range(1, size)
        if len(places):
            borders = places[torch.tensor([len(places) * part // size for part in parts], dtype=torch.int64)]
        else:
            borders = torch.tensor([numel * part // size for part in parts], device=places.device)
        found = call.gather_same(borders.to(torch.int64)).sum(0) // size
        regions = [min(max(border, 0), numel) for border in found.tolist()]
        return _Plan([0, *sorted(regions), numel])

    def _to_owners(
        self,
        call: _Call,
        job: Job,
        regions: Sequence[int],
        places: Tensor,
        values: Tensor,
        weights: Sequence[float],
        finite: bool,
    ) -> tuple[list[Message] | None, Sparse]:
        """Send the entries of each region to its owner; what all say about this rank's, and what this rank has sent.

        The messages are None if those of any rank were not finite.
        """
        rank = call.channel.rank
        absent = [weight == 0 for weight in weights]
        borders = torch.tensor(regions, device=places.device)
        cuts = torch.searchsorted(places, borders).tolist()
        packed, sent = [], []
        for owner, ((start, stop), (begin, end)) in enumerate(zip(pairwise(regions), pairwise(cuts), strict=True)):
            key = replace(job.draws[0], name=f"{job.names[0]}/region{owner}").own_key()
            numel, kind = stop - start, self.compressor.values
            sections = write_entries(places[begin:end] - start, values[begin:end], numel, kind, key)
            _, rounded = read_entries(Message(0, sections), numel, kind, rank)
            sent.append(rounded)
            flags = FLAG_ABSENT if absent[rank] else 0
            packed.append(self._envelope.pack(flags, [] if absent[rank] else sections, places.device))
        lengths = call.swap_lengths([length if finite else _NOT_FINITE for length, _ in packed], places.device)
        own = Sparse(regions[-1], places, torch.cat(sent))
        if _NOT_FINITE in lengths:
            return None, own
        _check_lengths(lengths, [regions[rank + 1] - regions[rank]] * len(lengths))
        in_rounds = is_worth_rounds(self._expected_bytes([x.numel() for x in job.inputs], len(lengths)))
        received = call.swap([slot for _, slot in packed], lengths, in_rounds=in_rounds)
        return self._envelope.unpack(received, lengths, absent, SECTIONS), own

    def _reduce(
        self, messages: Sequence[Message], regions: Sequence[int], rank: int, weights: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """Places in this rank's region, ascending, and the means there, added up in rank order."""
        numel = regions[rank + 1] - regions[rank]
        entries = [
            (weight, *read_entries(message, numel, self.compressor.values, sender))
            for sender, (message, weight) in enumerate(zip(messages, weights, strict=True))
            if weight
        ]
        if not entries:
            return _no_entries(messages[0].sections[0] if messages[0].sections else torch.empty(0))
        places = torch.cat([indices for _, indices, _ in entries]).unique()
        sums = torch.zeros(len(places), dtype=torch.float32, device=places.device)
        for weight, indices, values in entries:
            sums.index_add_(0, torch.searchsorted(places, indices), values * weight)
        return places, sums.mul_(1.0 / len(messages))

    def _with_threshold(self, call: _Call, plan: _Plan, sums: Tensor, wanted: int) -> _Plan:
        """The plan, with the magnitude of the wanted-th largest mean of all regions if it is time to look for it."""
        drifted = plan.age > 0 and not wanted / _DRIFT <= plan.count <= wanted * _DRIFT
        if plan.age % _THRESHOLD_STEPS and not drifted:
            return plan
        largest = sums.abs().topk(min(wanted, len(sums))).values
        counts: list[int] = call.gather_same(torch.tensor(len(largest), device=sums.device)).tolist()
        if not all(0 <= count <= wanted for count in counts):
            raise PayloadError(f"{max(counts)} sums where {wanted} are wanted")
        everywhere = call.gather(largest, counts)
        found = everywhere.topk(wanted).values[-1] if 0 < wanted <= len(everywhere) else torch.zeros(1)
        return replace(plan, threshold=float(found))

    def _from_owners(
        self, call: _Call, job: Job, regions: Sequence[int], places: Tensor, sums: Tensor
    ) -> Sparse | None:
        """The entries of all regions, rounded once more; None if a sum is not finite."""
        kind, rank = self.compressor.values, call.channel.rank
        key = replace(job.draws[0], name=f"{job.names[0]}/region{rank}/mean").own_key()
        finite = are_finite([sums])
        own_numel = regions[rank + 1] - regions[rank]
        sections = write_entries(places, sums, own_numel, kind, key) if finite else []
        length, slot = self._envelope.pack(0 if finite else FLAG_NOT_FINITE, sections, places.device)
        lengths: list[int] = call.gather_same(torch.tensor(length, device=places.device)).tolist()
        _check_lengths(lengths, [stop - start for start, stop in pairwise(regions)])
        received = call.gather(slot, [slot_bytes(n) for n in lengths])
        messages = self._envelope.unpack(received, lengths, [False] * len(lengths), SECTIONS)
        if any(message.flags & FLAG_NOT_FINITE for message in messages):
            return None
        indices, values = [], []
        for owner, (message, (start, stop)) in enumerate(zip(messages, pairwise(regions), strict=True)):
            found, means = read_entries(message, stop - start, kind, owner)
            indices.append(found + start)
            values.append(means)
        return Sparse(regions[-1], torch.cat(indices), torch.cat(values))

    def _finish(self, job: Job, flat: Tensor, mean: Sparse, contributed: Sparse) -> list[Decoded]:
        numels = [x.numel() for x in job.inputs]
        for output, part in zip(job.outputs, split_decoded(mean, numels), strict=True):
            add_to(output.zero_(), part)
        parts = split_decoded(contributed, numels)
        if job.memories is None:
            return parts
        add_to(flat, contributed, -1.0)
        copy_back(flat, [after for _, after in job.memories])
        return []


class _Call:
    """The exchanges of one call, which it counts.

    Attributes: sent, bytes by receiver.
    """

    def __init__(self, channel: Channel, sent: Counter[int]) -> None:
        self.channel = channel
        self.sent = sent

    def swap_lengths(self, lengths: Sequence[int], device: torch.device) -> list[int]:
        """Send each rank a number; what each sends here."""
        outgoing = torch.tensor(lengths, device=device)
        incoming = torch.empty_like(outgoing)
        ones = [1] * self.channel.size
        self.channel.all_to_all(incoming, outgoing, ones, ones)
        self._count([_LENGTH_BYTES] * self.channel.size)
        found: list[int] = incoming.tolist()
        return found

    def swap(self, slots: Sequence[Tensor], lengths: Sequence[int], *, in_rounds: bool) -> Tensor:
        """Send each rank its slot; the slots from all, of messages of these lengths, one after another."""
        incoming = [slot_bytes(length) for length in lengths]
        received = torch.empty(sum(incoming), dtype=torch.uint8, device=slots[0].device)
        outgoing = [len(slot) for slot in slots]
        self.channel.all_to_all(received, torch.cat(list(slots)), incoming, outgoing, in_rounds=in_rounds)
        self._count(outgoing)
        return received

    def gather(self, local: Tensor, splits: Sequence[int]) -> Tensor:
        """Everybody's `local`, of these lengths, one after another."""
        received = local.new_empty(sum(splits))
        in_rounds = is_worth_rounds(max(splits) * local.itemsize)
        self.channel.all_gather(received, local, splits, in_rounds=in_rounds)
        self._count([local.nbytes] * self.channel.size)
        return received

    def gather_same(self, local: Tensor) -> Tensor:
        """Everybody's `local`, of one shape, stacked."""
        received = self.channel.all_gather_same(local)
        self._count([local.nbytes] * self.channel.size)
        return received

    def _count(self, sent_bytes: Sequence[int]) -> None:
        self.sent.update(dict(enumerate(sent_bytes)))


def _check_lengths(lengths: Sequence[int], numels: Sequence[int]) -> None:
    for sender, (length, numel) in enumerate(zip(lengths, numels, strict=True)):
        if not 0 < length <= most_bytes(numel):
            raise PayloadError(f"from rank {sender} of the exchange: {length} bytes of entries among {numel} places")


def _common(entries: Sparse, indices: Tensor) -> Sparse:
    """The entries at places that are among the indices."""
    kept = torch.isin(entries.indices, indices, assume_unique=True)
    return Sparse(entries.numel, entries.indices[kept], entries.values[kept])


def _no_entries(like: Tensor) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(0, dtype=torch.int64, device=like.device),
        torch.empty(0, dtype=torch.float32, device=like.device),
    )
