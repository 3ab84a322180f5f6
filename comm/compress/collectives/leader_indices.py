"""Mean of sparse tensors that have the same places on every rank: one rank chooses them for all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from thinwire.comm.channel import Channel, broadcast_bytes
from thinwire.comm.compress.collective import Job
from thinwire.comm.compress.collectives.contribution import (
    Envelope,
    fill_with_nan,
    slot_bytes,
)
from thinwire.comm.compress.collectives.two_shot import TwoShot
from thinwire.comm.compress.compressor import Compressor
from thinwire.comm.compress.compressors.block_quantized import Int4, Int8
from thinwire.comm.compress.compressors.dense import BF16, FP16, Dense
from thinwire.comm.compress.compressors.rand_k import RandK
from thinwire.comm.compress.compressors.sign import Sign
from thinwire.comm.compress.compressors.sparse import SparseCompressor, index_bits, kept_count
from thinwire.comm.compress.decoded import Decoded, Sparse, to_dense
from thinwire.comm.compress.index_code import decode_indices, encode_indices
from thinwire.comm.finite import are_finite
from thinwire.comm.wire import PayloadError, message_bytes

_OF_VALUES: dict[str, Compressor] = {
    "fp32": Dense(),
    "bf16": BF16(),
    "fp16": FP16(),
    "int8": Int8(),
    "int8_stochastic": Int8(rounding="stochastic"),
    "int4": Int4(),
    "int4_stochastic": Int4(rounding="stochastic"),
    "sign": Sign(),
}
_STATUS_BYTES = 8
_NOT_FINITE = -1


class LeaderIndices:
    """outputs <- 1/n * sum_r weights[r] * C(inputs_r), with C to keep, on every rank, the places that one rank chose.

    ScaleCom: Chen et al. (2020), arXiv 2104.11125. In step t rank t mod n, among those that take part, chooses the
    places by its own input; they are coded once and handed on from rank to rank. The values there are averaged by the
    two-shot mean, rounded as the compressor's `values` say, also once more after the sum. Traffic per rank does not
    grow with n: at most 2 index sets and 2 (n-1)/n sets of values, and headers; int8, int4 and sign share their values
    out in blocks of 256, which should be at least n. The paper's low-pass filter is a matter of the
    feedback, not of this.

    Of `randk` every rank knows the places, and no index is sent at all.

    Args:
        compressor: topk, threshold or randk; values other than "2bit".
    Raises:
        ValueError: another compressor.
    """

    def __init__(self, compressor: Compressor) -> None:
        if not isinstance(compressor, SparseCompressor | RandK):
            raise ValueError(
                f"compressor: {compressor!r} does not choose places, which leader_indices shares; use topk, threshold "
                "or randk, or the collective two_shot or all_gather"
            )
        if compressor.values not in _OF_VALUES:
            raise ValueError(
                f"compressor.values: {compressor.values!r} cannot be averaged slice by slice, as leader_indices does; "
                f"use one of {', '.join(_OF_VALUES)}, or the collective all_gather"
            )
        self.compressor = compressor
        self._envelope = Envelope(compressor)
        self._values = TwoShot(_OF_VALUES[compressor.values])
        # Leader, bytes of its message, values of the last call; None if it ended with the status.
        self._last: dict[tuple[str, ...], tuple[int, int, int] | None] = {}

    def mean(self, channel: Channel, job: Job) -> list[Decoded] | None:
        """As in Collective."""
        tensors = list(job.inputs)
        if job.memories is not None:
            for x, (memory, next_memory) in zip(job.inputs, job.memories, strict=True):
                torch.add(x, memory, out=next_memory)
            tensors = [after for _, after in job.memories]
        finite = are_finite(tensors)
        places = self._agree_on_places(channel, job, tensors, finite)
        if places is None:
            fill_with_nan(job.outputs)
            return None
        counts = [len(indices) for indices in places]
        values = torch.cat([x.view(-1)[indices] for x, indices in zip(tensors, places, strict=True)])
        if isinstance(self.compressor, RandK):
            if self.compressor.unbiased:
                parts = zip(values.split(counts), tensors, strict=True)
                values = torch.cat([part * (x.numel() / max(len(part), 1)) for part, x in parts])
            if not finite:
                values.fill_(float("nan"))  # wherever the bad element is, all ranks shall know
        mean = torch.empty_like(values)
        names = [_values_of(job.names)]
        draws = [replace(job.draws[0], name=names[0])]
        sent = self._values.mean(channel, Job(names, [values], [mean], draws, weights=job.weights))
        if sent is None:
            fill_with_nan(job.outputs)
            return None
        for output, indices, part in zip(job.outputs, places, mean.split(counts), strict=True):
            output.zero_().view(-1)[indices] = part
        parts = to_dense(sent[0]).split(counts)
        if job.memories is None:
            return [Sparse(x.numel(), indices, part) for x, indices, part in zip(tensors, places, parts, strict=True)]
        for left, indices, part in zip(tensors, places, parts, strict=True):
            left.view(-1)[indices] -= part
        return []

    def commit(self) -> None:
        """Nothing is kept."""

    def rollback(self) -> None:
        """Nothing is kept."""

    def surrendered(self) -> list[tuple[str, int, Tensor]]:
        """Nothing."""
        return []

    def sent_bytes(self, shapes: Mapping[str, Sequence[int]], rank: int, size: int) -> dict[int, int]:
        """As in Collective; of the last call with these names, or before the first as the compressor expects."""
        numels = [torch.Size(shape).numel() for shape in shapes.values()]
        counts = [self._expected_count(numel) for numel in numels]
        bits = sum(n * index_bits(n / numel) for n, numel in zip(counts, numels, strict=True) if n)
        expected = 0, message_bytes([8 * len(numels), math.ceil(bits / 8)]), sum(counts)
        last = self._last.get(tuple(shapes), expected)
        if last is None:
            return {r: _STATUS_BYTES for r in range(size) if r != rank}
        leader, index_bytes, count = last
        sent = self._values.sent_bytes({_values_of(tuple(shapes)): (count,)}, rank, size)
        if not isinstance(self.compressor, RandK):
            for r, handed_on in broadcast_bytes(slot_bytes(index_bytes), leader, rank, size).items():
                sent[r] += handed_on + _STATUS_BYTES
        return sent

    def state_dict(self) -> dict[str, Any]:
        """Empty."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Accept the empty state."""
        assert not state

    def merge(self, states: Sequence[Mapping[str, Any]], rank: int, size: int) -> dict[str, Any]:
        """Empty."""
        return {}

    def _agree_on_places(
        self, channel: Channel, job: Job, tensors: Sequence[Tensor], finite: bool
    ) -> list[Tensor] | None:
        """Ascending indices for each tensor, the same on every rank; None if a rank's tensors are not finite."""
        device = tensors[0].device
        if isinstance(self.compressor, RandK):
            return [
                self.compressor.places(x.numel(), draw).to(device) if x.numel() else _no_places(x)
                for x, draw in zip(tensors, job.draws, strict=True)
            ]
        present = [r for r in range(channel.size) if job.weights is None or job.weights[r]]
        leader = present[job.draws[0].step % len(present)] if present else 0
        length, slot = 0, torch.empty(0, dtype=torch.uint8, device=device)
        if channel.rank == leader and finite:
            length, slot = self._choose(job, tensors)
        status = torch.tensor(length if finite else _NOT_FINITE, device=device)
        statuses: list[int] = channel.all_gather_same(status).tolist()
        if _NOT_FINITE in statuses:
            self._last[tuple(job.names)] = None
            return None
        length, longest = statuses[leader], message_bytes([8 * (len(tensors) + 1), *(x.numel() + 8 for x in tensors)])
        if not 0 < length <= longest:
            raise PayloadError(f"from rank {leader} of the exchange: {length} bytes of indices; at most {longest}")
        if channel.rank != leader:
            slot = torch.empty(slot_bytes(length), dtype=torch.uint8, device=device)
        channel.broadcast(slot, leader)
        places = self._read(slot, length, tensors, leader)
        self._last[tuple(job.names)] = (leader, length, sum(map(len, places)))
        return places

    def _choose(self, job: Job, tensors: Sequence[Tensor]) -> tuple[int, Tensor]:
        """The message that names the places by which the compressor would keep this rank's tensors."""
        assert isinstance(self.compressor, SparseCompressor)
        chosen = [
            self.compressor.keep(x.view(-1), draw)[0] if x.numel() else _no_places(x)
            for x, draw in zip(tensors, job.draws, strict=True)
        ]
        counts = torch.tensor([len(indices) for indices in chosen], device=tensors[0].device)
        coded = [encode_indices(indices, x.numel()) for indices, x in zip(chosen, tensors, strict=True)]
        return self._envelope.pack(0, [counts.view(torch.uint8), *coded], counts.device)

    def _read(self, slot: Tensor, length: int, tensors: Sequence[Tensor], leader: int) -> list[Tensor]:
        (message,) = self._envelope.unpack(slot, [length], [False], len(tensors) + 1)
        head, *coded = message.sections
        if head.numel() != 8 * len(tensors):
            raise PayloadError(f"from rank {leader} of the exchange: {head.numel()} bytes of counts")
        places = []
        for count, payload, x in zip(head.clone().view(torch.int64).tolist(), coded, tensors, strict=True):
            indices, used = decode_indices(payload, x.numel(), count)
            if used != payload.numel():
                raise PayloadError(f"from rank {leader} of the exchange: {payload.numel() - used} bytes too many")
            places.append(indices)
        return places

    def _expected_count(self, numel: int) -> int:
        if not numel:
            return 0
        if isinstance(self.compressor, RandK):
            return kept_count(self.compressor.density, self.compressor.k, numel)
        return self.compressor.expected_count(numel)


def _values_of(names: Sequence[str]) -> str:
    return f"values of {names[0]}"


def _no_places(x: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.int64, device=x.device)
