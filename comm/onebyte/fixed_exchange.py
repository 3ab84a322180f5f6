"""Rounds of a fixed job: one all-gather of exactly one byte per direction and rank."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from thinwire.comm.channel import Channel
from thinwire.comm.onebyte.errors import ModelMismatchError
from thinwire.comm.onebyte.exchange import Change, Turn
from thinwire.comm.onebyte.manifest import Manifest
from thinwire.comm.onebyte.rounds import SHARED_SLOT, Contribution, Member, Roster, Round
from thinwire.comm.queue import CommQueue
from thinwire.comm.rank_names import name_ranks

OPERATION = "onebyte/round"
_DIGEST_BYTES = 8


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

    def __init__(self, queue: CommQueue | None, manifest: Manifest, samples: int, first_round: int) -> None:
        self._queue = queue if queue and queue.size > 1 else None
        self._samples = samples
        self._round = first_round
        self._rank, self._size = (queue.rank, queue.size) if queue else (0, 1)
        self._has_compared = False
        if self._size > SHARED_SLOT:
            raise ValueError(f"OneByteSPSA: {self._size} ranks; a run has {SHARED_SLOT} at most")
        if self._queue:
            self._compare_starts(self._queue, manifest)

    def roster(self, epoch: int) -> Roster:
        """The ranks as members."""
        return Roster(epoch, tuple(Member(rank, f"rank {rank}", "", self._samples) for rank in range(self._size)))

    def begin(self) -> Turn:
        """The next round, in this rank's slot."""
        return Turn(self._round, self._rank, self._samples)

    def commit(self, turn: Turn, codes: bytes, rate: float) -> Sequence[Change]:
        """Gather all ranks' codes: they are the round.

        Raises:
            PeerLostError, PeerLateError, PeerFailedError: a rank is gone; no round has come of it here.
        """
        assert len(codes) == self._samples
        self._has_compared = False
        gathered = [codes]
        if self._queue:
            mine = _as_tensor(codes)
            gathered = self._queue.submit(OPERATION, lambda channel: _gather(channel, mine)).wait()
        self._round += 1
        return [Change(Round(turn.round, rate, tuple(Contribution(r, row) for r, row in enumerate(gathered))))]

    def compare_models(self, rounds: int, model_hash: bytes) -> None:
        """At a snapshot, see whether all ranks have the same weights.

        Learning rates are not sent: a schedule that is not the same on all ranks shows here.

        Raises:
            ModelMismatchError: on every rank, naming those that differ.
        """
        if not self._queue:
            return
        mine = _as_tensor(model_hash)
        self._has_compared = True
        rows = self._queue.submit("onebyte/snapshot", lambda channel: channel.all_gather_same(mine)).wait()
        odd = [rank for rank, row in enumerate(rows) if not torch.equal(row, rows[0])]
        if odd:
            raise ModelMismatchError(
                f"onebyte: after {rounds} rounds, {name_ranks(self._in_job(odd))} and rank {self._queue.peers[0]} have "
                "other weights. Their learning rates were not the same, or a machine computes wrongly; compare "
                "`thinwire onebyte verify` of their logs"
            )

    def go_to(self, number: int) -> None:
        """Make `number` the next round, on all ranks alike: a checkpoint of it has been loaded."""
        self._round = number

    def close(self) -> None:
        """Nothing to do: the queue is the caller's."""

    def predicted_bytes(self) -> dict[str, int]:
        """What this rank sends in a round, by level; 32 bytes more to each rank if the last one ended in a snapshot."""
        counts: dict[str, int] = {}
        for rank in range(self._size):
            if self._queue and rank != self._rank:
                level = self._queue.meter.level_of(self._queue.peers[rank])
                counts[level] = counts.get(level, 0) + self._samples + 32 * self._has_compared
        return counts

    def _compare_starts(self, queue: CommQueue, manifest: Manifest) -> None:
        weights = {"base_hash", "tensors"}
        entries = [entry.model_dump(mode="json", exclude={"crc32", "exponent"}) for entry in manifest.tensors]
        parts = {
            "settings": _digest(manifest.model_dump_json(exclude=weights)),
            "parameters (names, shapes, dtypes, or their groups' lr, eps and weight_decay)": _digest(repr(entries)),
            "base weights": _digest(manifest.to_bytes().decode()),
            "samples": self._samples.to_bytes(_DIGEST_BYTES, "little"),
            "next round": self._round.to_bytes(_DIGEST_BYTES, "little"),
        }
        mine = _as_tensor(b"".join(parts.values()))
        rows = queue.submit("control/onebyte", lambda channel: channel.all_gather_same(mine)).wait()
        for name, column in zip(parts, rows.split(_DIGEST_BYTES, dim=1), strict=True):
            odd = [rank for rank, part in enumerate(column) if not torch.equal(part, column[0])]
            if odd:
                raise ValueError(
                    f"OneByteSPSA: {name_ranks(self._in_job(odd))} and rank {queue.peers[0]} do not have the same "
                    f"{name}; start all ranks with the same weights, parameters, settings and rounds"
                )

    def _in_job(self, ranks: Sequence[int]) -> list[int]:
        assert self._queue
        return [self._queue.peers[rank] for rank in ranks]


def _as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:_DIGEST_BYTES]


def _gather(channel: Channel, mine: Tensor) -> list[bytes]:
    return [row.numpy().tobytes() for row in channel.all_gather_same(mine)]
