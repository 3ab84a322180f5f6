"""The global average: all machines that are alive take the mean of their weights, the same bits on each.

It happens once or a few times in a run, so it may wait for all. They agree on who takes part, average in two shots
(each owns a slice, sums what the others send of it in fp64 and rank order, and gives the mean of it to all), and agree
whether each has all of it. If not, because a machine died in between, they begin anew without it; nobody takes a mean
that another of them does not take.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from thinwire.comm.finite import are_finite
from thinwire.comm.gossip.barrier import MERGE_STREAM, Serving, agree
from thinwire.comm.gossip.message import Kind, Message
from thinwire.comm.gossip.port import Port, Script
from thinwire.comm.two_shot import split_evenly
from thinwire.comm.wire import PayloadError
from thinwire.kernels.weighted_sum import weighted_sum

_SLICE = 0
_MEAN = 1
_ATTEMPTS = 1 << 15


@dataclass(frozen=True)
class Merged:
    """A global average.

    Args:
        value: the mean; of a machine that was left out, its own vector.
        mass: the sum of the members' masses. With value on each member, any masses that sum to this preserve the mean.
        members: whose vectors are in the mean; they all have it.
        nonfinite: machines that were left out because their vector has an element that is not finite.
    """

    value: Tensor
    mass: float
    members: frozenset[int]
    nonfinite: frozenset[int] = frozenset()


def average_all(
    port: Port,
    value: Tensor,
    mass: float,
    *,
    number: int,
    deadline_s: float,
    asked: Callable[[], bool] = lambda: False,
    serve: Callable[[], None] = lambda: None,
    stream: int = 0,
) -> Script[Merged]:
    """value <- (sum_i m_i value_i) / (sum_i m_i) over the machines alive; each sends 2 (n-1)/n of the vector.

    A machine that is later than the deadline is left out and keeps its own vector, so the mean over all is preserved.

    Args:
        value: flat, fp32 or fp64; it is neither changed here nor may it be changed afterwards.
        mass: this machine's share, above 0.
        number: of this merge, the same on all machines, below 2^48; each later one of a stream has a higher one.
        deadline_s: how long the last machine is waited for, and any slice.
        asked, serve: as Algorithm says.
        stream: tells averages apart that may go on at once, 0..15.
    """
    serving = Serving(asked, serve)
    finite = are_finite([value])
    agreements = MERGE_STREAM + 2 * stream
    for attempt in range(_ATTEMPTS):
        phase = number * 2 * _ATTEMPTS + 2 * attempt
        came = yield from agree(port, phase, finite, deadline_s=deadline_s, serving=serving, stream=agreements)
        nonfinite = came.present - came.yes
        # Others decide alike whether they leave this machine out, so it need not take part in what follows.
        if port.rank not in came.yes:
            return Merged(value, mass, came.yes, nonfinite)
        shots = _Shots(port, sorted(came.yes), phase, 2 * stream)
        mean = yield from shots.average(value, mass, port.now() + deadline_s, serving)
        done = yield from agree(
            port, phase + 1, mean is not None, deadline_s=deadline_s, serving=serving, stream=agreements
        )
        if port.rank not in done.present:
            return Merged(value, mass, done.yes, nonfinite)
        if done.yes == done.present and mean is not None:
            return Merged(mean, shots.mass, came.yes, nonfinite)
    raise AssertionError("every attempt loses a machine, and there are fewer machines than attempts")


def average_bytes(numel: int, itemsize: int, rank: int, members: Collection[int]) -> dict[int, int]:
    """Payload bytes that a machine sends in one average among these, by machine."""
    if rank not in members:
        return {}
    ordered = sorted(members)
    splits = dict(zip(ordered, split_evenly(numel, len(ordered)), strict=True))
    return {other: (splits[other] + splits[rank]) * itemsize for other in ordered if other != rank}


def merge_bytes(numel: int, itemsize: int, rank: int, members: int) -> int:
    """Payload bytes of the slices that the member of this place, 0, 1, ..., sends in one average."""
    splits = split_evenly(numel, members)
    return (numel - splits[rank] + (members - 1) * splits[rank]) * itemsize


class _Shots:
    """The two shots of one attempt.

    Attributes: mass, the members' sum; valid once average() has given a mean.
    """

    def __init__(self, port: Port, members: list[int], round: int, stream: int) -> None:
        self._port = port
        self._members = members
        self._others = [rank for rank in members if rank != port.rank]
        self._round = round
        self._stream = stream
        # Slices cut for other members would fit in none of the places that they are meant for.
        self._flags = zlib.crc32(repr(members).encode()) & 0xFFFF
        self.mass = 0.0

    def average(self, value: Tensor, mass: float, until: float, serving: Serving) -> Script[Tensor | None]:
        """The mean; None if a member is lost or late before this machine has all of it."""
        splits = split_evenly(value.numel(), len(self._members))
        slices = dict(zip(self._members, value.split(splits), strict=True))
        for rank in self._others:
            self._send(rank, _SLICE, slices[rank], mass)
        taken = yield from self._receive(_SLICE, until, serving)
        if taken is None:
            return None
        own = slices[self._port.rank]
        masses = {self._port.rank: mass, **{rank: message.mass for rank, message in taken.items()}}
        parts = {self._port.rank: own, **{rank: _read(message.payload, own) for rank, message in taken.items()}}
        self.mass = sum(masses[rank] for rank in self._members)
        # In fp64, so that the mean of equal weights is these weights.
        total = weighted_sum([parts[r].double() for r in self._members], [masses[r] for r in self._members])
        reduced = total.div_(self.mass).to(own.dtype)
        for rank in self._others:
            self._send(rank, _MEAN, reduced, mass)
        taken = yield from self._receive(_MEAN, until, serving)
        if taken is None:
            return None
        means = {rank: _read(message.payload, slices[rank]) for rank, message in taken.items()}
        means[self._port.rank] = reduced
        return torch.cat([means[rank] for rank in self._members])

    def _send(self, rank: int, shot: int, part: Tensor, mass: float) -> None:
        payload = part.cpu().contiguous().view(torch.uint8)
        self._port.send(rank, Message(Kind.MERGE, self._round, mass, self._stream + shot, self._flags, payload))

    def _receive(self, shot: int, until: float, serving: Serving) -> Script[dict[int, Message] | None]:
        """A shot of every other member, once all have come; None: one will not."""
        missing = list(self._others)

        def is_decided() -> bool:
            lost = self._port.lost()
            while missing and self._peek(missing[-1], shot) is not None:
                missing.pop()
            return not missing or any(rank in lost and self._peek(rank, shot) is None for rank in missing)

        yield from serving.wait(self._port, is_decided, until)
        if any(self._peek(rank, shot) is None for rank in self._others):
            return None
        return {rank: self._port.take(rank, Kind.MERGE, self._stream + shot) for rank in self._others}

    def _peek(self, rank: int, shot: int) -> Message | None:
        """The shot of this attempt from a member; those of attempts that were given up are dropped."""
        stream = self._stream + shot
        while (message := self._port.peek(rank, Kind.MERGE, stream)) and message.round < self._round:
            self._port.take(rank, Kind.MERGE, stream)
        fits = message is not None and message.round == self._round and message.flags == self._flags
        return message if fits else None


def _read(payload: Tensor, like: Tensor) -> Tensor:
    expected = like.numel() * like.dtype.itemsize
    if len(payload) != expected:
        raise PayloadError(f"a slice of {like.numel()} elements takes {expected} bytes, not {len(payload)}")
    return payload.view(like.dtype).to(like.device)
