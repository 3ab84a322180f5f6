"""Rounds of a fixed job: one all-gather of exactly one byte per direction and rank."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from thinwire.comm.channel import Channel
from thinwire.comm.onebyte.exchange import Change, Turn
from thinwire.comm.onebyte.rounds import Contribution, Member, Roster, Round
from thinwire.comm.queue import CommQueue
from thinwire.comm.rank_names import name_ranks

OPERATION = "onebyte/round"


class FixedExchange:
    """All ranks of a queue, each with its rank as slot, and the same number of directions. Collective.

    Args:
        queue: None: this process alone.
        manifest: of the run; must be the same on all ranks.
        samples: directions of this rank in each round.
        first_round: number of the next round.
    Raises:
        ValueError: the ranks do not have the same manifest, number of directions, or next round.
    """

    def __init__(self, queue: CommQueue | None, manifest: bytes, samples: int, first_round: int) -> None:
        self._queue = queue
        self._samples = samples
        self._round = first_round
        self._rank, self._size = (queue.rank, queue.size) if queue else (0, 1)
        if queue and queue.size > 1:
            self._compare(queue, manifest)

    @property
    def roster(self) -> Roster:
        """The ranks as members."""
        names = tuple(Member(rank, f"rank {rank}", "", self._samples) for rank in range(self._size))
        return Roster(0, names)

    def begin(self) -> Turn:
        """The next round, in this rank's slot."""
        return Turn(self._round, self._rank, self._samples)

    def commit(self, turn: Turn, codes: bytes, rate: float) -> Sequence[Change]:
        """Gather all ranks' codes: they are the round.

        Raises:
            PeerLostError, PeerLateError, PeerFailedError: a rank is gone; no rank has taken the round up.
        """
        assert len(codes) == self._samples
        gathered = [codes]
        if self._queue:
            mine = torch.frombuffer(bytearray(codes), dtype=torch.uint8)
            gathered = self._queue.submit(OPERATION, lambda channel: _gather(channel, mine)).wait()
        self._round += 1
        return [Change(Round(turn.round, rate, tuple(Contribution(r, row) for r, row in enumerate(gathered))))]

    def go_to(self, number: int) -> None:
        """Make `number` the next round, on all ranks alike: a checkpoint of it has been loaded."""
        self._round = number

    def close(self) -> None:
        """Nothing to do: the queue is the caller's."""

    def predicted_bytes(self) -> dict[str, int]:
        """What this rank sends in a round, by level."""
        counts: dict[str, int] = {}
        for rank in range(self._size):
            if self._queue and rank != self._rank:
                level = self._queue.meter.level_of(self._queue.peers[rank])
                counts[level] = counts.get(level, 0) + self._samples
        return counts

    def _compare(self, queue: CommQueue, manifest: bytes) -> None:
        fields = (
            hashlib.sha256(manifest).digest(),
            self._samples.to_bytes(8, "little"),
            self._round.to_bytes(8, "little"),
        )
        mine = torch.frombuffer(bytearray(b"".join(fields)), dtype=torch.uint8)
        rows = queue.submit("control/onebyte", lambda channel: channel.all_gather_same(mine)).wait()
        for name, start, end in (("manifest", 0, 32), ("samples", 32, 40), ("next round", 40, 48)):
            odd = [rank for rank, row in enumerate(rows) if not torch.equal(row[start:end], rows[0, start:end])]
            if odd:
                raise ValueError(
                    f"onebyte: {name_ranks(odd)} and rank 0 do not have the same {name}; start all ranks with the same "
                    "weights, parameters and settings"
                )


def _gather(channel: Channel, mine: torch.Tensor) -> list[bytes]:
    return [row.numpy().tobytes() for row in channel.all_gather_same(mine)]
