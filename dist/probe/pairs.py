"""Bandwidth and latency between each two ranks."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from thinwire.comm.channel import Channel
from thinwire.dist.probe.clock import Lockstep, now
from thinwire.dist.probe.records import PairTimes
from thinwire.dist.probe.rounds import pair_rounds

_MOST_ROUNDS = 128
_FIRST_BYTES, _MOST_BYTES = 1 << 16, 1 << 26
_GROWTH = 16  # from one transfer to the next, at most
_PINGS = 9


def measure_pairs(lockstep: Lockstep, hosts: Sequence[str], seconds: float) -> PairTimes:
    """Let all pairs of ranks meet in rounds. Collective.

    Args:
        hosts: a name for each rank's: two pairs never share the link of one.
        seconds: for all rounds together; transfers grow until one takes its part of it.
    """
    queue = lockstep.queue
    rounds = pair_rounds(hosts, _MOST_ROUNDS)
    found = torch.zeros(2, queue.size, dtype=torch.float64, device=lockstep.device)
    for number, pairs in enumerate(rounds):
        lockstep.wait()  # who went on to the next round would share a link with who has not
        peer = next((a + b - queue.rank for a, b in pairs if queue.rank in (a, b)), None)

        def meet(channel: Channel, peer: int | None = peer) -> tuple[float, float] | None:
            return None if peer is None else _meet(_Line(channel, peer, lockstep.device), seconds / len(rounds))

        figures = queue.submit(f"probe/pairs{number}", meet).wait()
        if peer is not None and figures is not None:
            found[:, peer] = torch.tensor(figures, dtype=torch.float64)
    rows = lockstep.share(found.flatten().tolist())
    size = queue.size
    bps = [row[:size] for row in rows]
    latency = [row[size:] for row in rows]
    return PairTimes(
        bps=tuple(tuple(value or None for value in row) for row in bps),
        # The lower rank of a pair has timed it.
        latency_s=tuple(tuple(max(latency[a][b], latency[b][a]) or None for b in range(size)) for a in range(size)),
    )


class _Line:
    """Two ranks that talk to each other, and in turns."""

    def __init__(self, channel: Channel, peer: int, device: torch.device) -> None:
        self.is_first = channel.rank < peer
        self.device = device
        self._channel = channel.among(sorted((channel.rank, peer)))
        self._nothing = torch.empty(0, dtype=torch.uint8, device=device)

    def send(self, data: Tensor) -> None:
        splits = [0, len(data)] if self.is_first else [len(data), 0]
        self._channel.all_to_all(data[:0], data, [0, 0], splits)

    def receive(self, data: Tensor) -> None:
        splits = [0, len(data)] if self.is_first else [len(data), 0]
        self._channel.all_to_all(data, data[:0], splits, [0, 0])

    def send_number(self, number: int) -> None:
        self.send(torch.tensor([number], dtype=torch.int64, device=self.device))

    def receive_number(self) -> int:
        number = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.receive(number)
        return int(number)

    def now(self) -> float:
        return now(self.device)


def _meet(line: _Line, seconds: float) -> tuple[float, float]:
    """Bits per second that this rank sends to the other; and on the first of the two the latency, else 0."""
    latency_s = _latency_s(line)
    if line.is_first:
        bps = _send(line, latency_s, seconds / 2)
        _receive(line)
        return bps, latency_s
    _receive(line)
    return _send(line, latency_s, seconds / 2), 0.0


def _latency_s(line: _Line) -> float:
    """Half a round trip of a byte: the median, after one that wakes both up. On the second rank with its own waits."""
    byte = torch.zeros(1, dtype=torch.uint8, device=line.device)
    trips = []
    for _ in range(1 + _PINGS):
        began = line.now()
        if line.is_first:
            line.send(byte)
            line.receive(byte)
        else:
            line.receive(byte)
            line.send(byte)
        trips.append(line.now() - began)
    return statistics.median(trips[1:]) / 2


def _send(line: _Line, latency_s: float, seconds: float) -> float:
    """Send more and more until a transfer takes a good part of the time; the last one's rate counts."""
    byte = torch.zeros(1, dtype=torch.uint8, device=line.device)
    size, spent_s = _FIRST_BYTES, 0.0
    while True:
        data = torch.zeros(size, dtype=torch.uint8, device=line.device)
        began = line.now()
        line.send_number(size)
        line.send(data)
        line.receive(byte)  # it has arrived
        taken_s = line.now() - began
        spent_s += taken_s
        per_s = size / max(taken_s - 2 * latency_s, taken_s / 2)
        larger = min(_MOST_BYTES, _GROWTH * size, int(per_s * (seconds - spent_s)))
        if larger < 2 * size:
            line.send_number(0)
            return 8 * per_s
        size = larger


def _receive(line: _Line) -> None:
    """The other end of _send()."""
    byte = torch.zeros(1, dtype=torch.uint8, device=line.device)
    while size := line.receive_number():
        line.receive(torch.empty(size, dtype=torch.uint8, device=line.device))
        line.send(byte)
