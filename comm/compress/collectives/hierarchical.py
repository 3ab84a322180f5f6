"""Mean over a machine of two levels: exact between the ranks of a host, compressed between the hosts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from thinwire.comm.channel import Channel
from thinwire.comm.compress.collective import Collective, Job
from thinwire.comm.compress.collectives.contribution import fill_with_nan, nothing
from thinwire.comm.compress.collectives.flat import copy_back
from thinwire.comm.compress.decoded import Decoded, Sparse, add_to
from thinwire.comm.finite import are_finite
from thinwire.comm.two_level import Groups
from thinwire.comm.two_shot import TwoShotMean, split_evenly


@dataclass(frozen=True)
class _Piece:
    """The part of one of the call's tensors that lies in a shard.

    Attributes: place, which tensor; start and stop, within the flat tensor; at, where it begins in the shard.
    """

    place: int
    start: int
    stop: int
    at: int

    def of(self, shard: Tensor) -> Tensor:
        """This part of the shard; a view."""
        return shard[self.at : self.at + self.stop - self.start]

    def name(self, names: Sequence[str]) -> str:
        return f"{names[self.place]}[{self.start}:{self.stop}]"


class Hierarchical:
    """outputs <- outer mean, over the hosts h, of m_h = 1/L sum of the inputs of h's L ranks, which is exact in fp32.

    The tensors of a call are joined and cut into L shards. The l-th rank of a host reduces the l-th shard within the
    host, takes part with it in the outer collective among the l-th ranks of all hosts, and hands the result to its
    host. So only 1/L of the compressed bytes passes through each rank, and all ranks of a host use its link at once.

    Errors and contributions are those of the hosts, and the l-th rank keeps its host's for the l-th shard, L times as
    large, and nothing elsewhere. So the mean over all ranks is what it is in any other collective, and input + memory
    is exact within the host again whichever rank keeps what: shards may move, and hosts come and go, without loss. Only
    feedbacks that are linear in what was sent can be told so; masking by places (dgc) cannot.

    Args:
        hosts: the ranks of each host, as Groups has them.
        outer: keeps no state by range: not LowRankMean and not TwoShot(server_error=True).
    Raises:
        ValueError: hosts other than these.
    """

    def __init__(self, hosts: Sequence[Sequence[int]], outer: Collective) -> None:
        self.outer = outer
        self._hosts = Groups(hosts)
        self._local = self._hosts.local_size
        self._inner = TwoShotMean(torch.float32)

    def mean(self, channel: Channel, job: Job) -> list[Decoded] | None:
        """As in Collective.

        Raises:
            ValueError: the ranks of a host have different weights, or the channel has another number of ranks.
        """
        host, peers = self._hosts.places(channel.rank, channel.size)
        inner, between = channel.among(host), channel.among(peers)
        weights = self._weights_of_hosts(job.weights, peers)
        flat = torch.cat([x.flatten() for x in job.inputs])
        if job.memories is not None:
            flat += torch.cat([memory.flatten() for memory, _ in job.memories])
        shard = self._inner.reduce(inner, flat)
        result = torch.empty_like(shard)
        pieces = self._pieces([x.numel() for x in job.inputs], inner.rank)
        sent = self._mean_of_hosts(between, job, pieces, shard, result, weights) if pieces else []
        self._inner.gather(inner, flat, result)
        copy_back(flat, job.outputs)
        if sent is None or not are_finite([flat]):
            fill_with_nan(job.outputs)
            return None
        if job.memories is None:
            return self._of_this_rank(job, pieces, sent)
        for _, next_memory in job.memories:
            next_memory.zero_()
        for piece, part in zip(pieces, sent, strict=True):
            left = piece.of(shard)
            add_to(left, part, -1.0)
            next_memory = job.memories[piece.place][1].view(-1)
            torch.mul(left, self._local, out=next_memory[piece.start : piece.stop])
        return []

    def commit(self) -> None:
        self.outer.commit()

    def rollback(self) -> None:
        self.outer.rollback()

    def surrendered(self) -> list[tuple[str, int, Tensor]]:
        """Nothing: the outer collective keeps no errors."""
        return []

    def sent_bytes(self, shapes: Mapping[str, Sequence[int]], rank: int, size: int) -> dict[int, int]:
        """As in Collective; as exact as that of the outer one."""
        inner, outer, peers = self.parts(shapes, rank, size)
        sent = dict.fromkeys((r for r in range(size) if r != rank), 0) | inner
        if outer:
            for r, count in self.outer.sent_bytes(outer, peers.index(rank), len(peers)).items():
                sent[peers[r]] += count
        return sent

    def parts(
        self, shapes: Mapping[str, Sequence[int]], rank: int, size: int
    ) -> tuple[dict[int, int], dict[str, torch.Size], list[int]]:
        """Bytes by receiver within the host; the shapes that go by the outer collective; and among which ranks."""
        host, peers = self._hosts.places(rank, size)
        index, numels = host.index(rank), [torch.Size(shape).numel() for shape in shapes.values()]
        inner = self._inner.sent_bytes(sum(numels), index, self._local)
        names = list(shapes)
        pieces = self._pieces(numels, index)
        outer = {piece.name(names): torch.Size([piece.stop - piece.start]) for piece in pieces}
        return {host[r]: count for r, count in inner.items()}, outer, peers

    def state_dict(self) -> dict[str, Any]:
        """That of the outer collective."""
        return self.outer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what state_dict() gave."""
        self.outer.load_state_dict(state)

    def merge(self, states: Sequence[Mapping[str, Any]], rank: int, size: int) -> dict[str, Any]:
        """As in Collective."""
        return self.outer.merge(states, rank, size)

    def _weights_of_hosts(self, weights: Sequence[float] | None, peers: Sequence[int]) -> list[float] | None:
        if weights is None:
            return None
        if any(weights[r] != weights[host[0]] for host in self._hosts.members for r in host):
            raise ValueError(
                f"weights: {list(weights)} differ between ranks of one host ({self._hosts.members}), whose mean is "
                "exact and has one weight; use a feedback without weights (not ef21_w or ef21_pp), or compress between "
                "all ranks"
            )
        return [weights[r] for r in peers]

    def _pieces(self, numels: Sequence[int], index: int) -> list[_Piece]:
        """What the index-th shard of the joined tensors holds of each of them."""
        splits = split_evenly(sum(numels), self._local)
        begin = sum(splits[:index])
        pieces, first = [], 0
        for place, numel in enumerate(numels):
            start, stop = max(begin - first, 0), min(begin + splits[index] - first, numel)
            if start < stop:
                pieces.append(_Piece(place, start, stop, first + start - begin))
            first += numel
        return pieces

    def _mean_of_hosts(
        self,
        between: Channel,
        job: Job,
        pieces: Sequence[_Piece],
        shard: Tensor,
        result: Tensor,
        weights: Sequence[float] | None,
    ) -> list[Decoded] | None:
        names = [piece.name(job.names) for piece in pieces]
        draws = [
            replace(job.draws[piece.place], name=name, rank=between.rank)
            for piece, name in zip(pieces, names, strict=True)
        ]
        inputs, outputs = [piece.of(shard) for piece in pieces], [piece.of(result) for piece in pieces]
        return self.outer.mean(between, Job(names, inputs, outputs, draws, weights=weights))

    def _of_this_rank(self, job: Job, pieces: Sequence[_Piece], sent: Sequence[Decoded]) -> list[Decoded]:
        """The host's contribution to this rank's shard, L times, so that the mean over its ranks is the host's."""
        contributed = nothing(job.inputs)
        for piece, part in zip(pieces, sent, strict=True):
            numel = job.inputs[piece.place].numel()
            if isinstance(part, Sparse):
                indices, values = part.indices + piece.start, part.values
            else:
                indices, values = torch.arange(piece.start, piece.stop, device=part.device), part.view(-1)
            contributed[piece.place] = Sparse(numel, indices, values * self._local)
        return contributed
