"""Rounds of a fixed job: exactly one byte per direction from each rank to each, and nothing else."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from thinwire.comm.onebyte.errors import ModelMismatchError
from thinwire.comm.onebyte.exchange import Change, Turn
from thinwire.comm.onebyte.flood import Flooding, FloodSettings
from thinwire.comm.onebyte.manifest import Manifest
from thinwire.comm.onebyte.rounds import SHARED_SLOT, Contribution, Member, Roster, Round
from thinwire.comm.onebyte.spread import AllGather, Spread
from thinwire.comm.queue import CommQueue
from thinwire.comm.rank_names import name_ranks

OPERATION = "onebyte/round"
SNAPSHOT = "onebyte/snapshot"
HASH_BYTES = 32
_DIGEST_BYTES = 8


class FixedExchange:
    """All ranks of a queue, each with its rank as slot, and the same number of directions. Collective.

    Args:
        queue: None: this process alone.
        manifest: of the run; must be the same on all ranks.
        samples: directions of this rank in each round.
        first_round: number of the next round.
        flood: over which graph the bytes travel; None: straight from all to all.
    Raises:
        ValueError: the ranks do not have the same manifest, number of directions, graph, or next round.
    """

    def __init__(
        self,
        queue: CommQueue | None,
        manifest: Manifest,
        samples: int,
        first_round: int,
        flood: FloodSettings | None = None,
    ) -> None:
        self._queue = queue if queue and queue.size > 1 else None
        self._samples = samples
        self._round = first_round
        self._rank, self._size = (queue.rank, queue.size) if queue else (0, 1)
        self._has_compared = False
        if self._size > SHARED_SLOT:
            raise ValueError(f"OneByteSPSA: {self._size} ranks; a run has {SHARED_SLOT} at most")
        self._spread = spread_of(flood, self._rank, self._size, samples)
        self._rates: deque[float] = deque()  # of the rounds that are under way, the oldest first
        if self._queue:
            self._compare_starts(self._queue, manifest, flood)

    def roster(self, epoch: int) -> Roster:
        """The ranks as members."""
        return Roster(epoch, tuple(Member(rank, f"rank {rank}", "", self._samples) for rank in range(self._size)))

    def begin(self) -> Turn:
        """The next round, in this rank's slot."""
        return Turn(self._round, self._rank, self._samples)

    def commit(self, turn: Turn, codes: bytes, rate: float) -> Sequence[Change]:
        """Gather all ranks' codes: they are the round. By flooding it may come some turns later.

        Raises:
            PeerLostError, PeerLateError, PeerFailedError: a rank is gone; no round has come of it here.
        """
        assert len(codes) == self._samples
        self._has_compared = False
        rows = mine = _as_tensor(codes)
        if self._queue:
            rows = self._queue.submit(OPERATION, lambda channel: self._spread.exchange(channel, mine)).wait()
        self._round += 1
        self._rates.append(rate)
        if len(self._rates) <= self._spread.lag:
            return []
        whole = [row.numpy().tobytes() for row in rows.view(self._size, self._samples)]
        number = turn.round - self._spread.lag
        contributions = tuple(Contribution(rank, row) for rank, row in enumerate(whole))
        return [Change(Round(number, self._rates.popleft(), contributions))]

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
        rows = self._queue.submit(SNAPSHOT, lambda channel: self._spread.gather(channel, mine)).wait()
        odd = [rank for rank, row in enumerate(rows) if not torch.equal(row, rows[0])]
        if odd:
            raise ModelMismatchError(
                f"onebyte: after {rounds} rounds, {name_ranks(self._in_job(odd))} and rank {self._queue.peers[0]} have "
                "other weights. Their learning rates were not the same, or a machine computes wrongly; compare "
                "`thinwire onebyte verify` of their logs"
            )

    def go_to(self, number: int) -> None:
        """Make `number` the next round to be committed, on all ranks alike; those under way are measured again."""
        if number != self._round - len(self._rates):
            self._round = number
            self._rates.clear()
            self._spread.reset()

    def state(self) -> dict[str, Any]:
        """The rounds under way, as this rank knows them; empty where a round is complete in its own turn."""
        if not self._spread.lag:
            return {}
        return {"round": self._round, "rates": list(self._rates), "spread": self._spread.state()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take back what state() gave, on all ranks alike. Raises ValueError if it is of another way to exchange."""
        if bool(state) != bool(self._spread.lag) or (state and len(state["rates"]) > self._spread.lag):
            raise ValueError(
                "OneByteSPSA: the state is of a run with another `exchange`; give it the same graph and hops"
            )
        if state:
            self._round = int(state["round"])
            self._rates = deque(state["rates"])
            self._spread.load(state["spread"])

    def close(self) -> None:
        """Nothing to do: the queue is the caller's."""

    def predicted_bytes(self) -> dict[str, int]:
        """What this rank sends in a round, by level; more if the last one ended in a snapshot, which is compared."""
        counts: dict[str, int] = {}
        if self._queue:
            compared = self._spread.gather_bytes(HASH_BYTES) if self._has_compared else [0] * self._size
            for peer, codes_bytes, hash_bytes in zip(
                self._queue.peers, self._spread.sent_bytes(), compared, strict=True
            ):
                if codes_bytes:
                    level = self._queue.meter.level_of(peer)
                    counts[level] = counts.get(level, 0) + codes_bytes + hash_bytes
        return counts

    def _compare_starts(self, queue: CommQueue, manifest: Manifest, flood: FloodSettings | None) -> None:
        weights = {"base_hash", "tensors"}
        entries = [entry.model_dump(mode="json", exclude={"crc32", "exponent"}) for entry in manifest.tensors]
        parts = {
            "settings": _digest(manifest.model_dump_json(exclude=weights)),
            "parameters (names, shapes, dtypes, or their groups' lr, eps and weight_decay)": _digest(repr(entries)),
            "base weights": _digest(manifest.to_bytes().decode()),
            "exchange": _digest(flood.model_dump_json() if flood else "all_gather"),
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


def spread_of(flood: FloodSettings | None, rank: int, size: int, samples: int) -> Spread:
    """How a rank's bytes reach the others.

    Raises: ValueError: the graph is not one of so many ranks.
    """
    return Flooding(flood, rank, size, samples) if flood else AllGather(rank, size, samples)


def _as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:_DIGEST_BYTES]
