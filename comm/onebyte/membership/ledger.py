"""The replicated log of one machine: what of it is committed, and what the weights have still to take up."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from typing import NoReturn

from thinwire.comm.onebyte.exchange import Change
from thinwire.comm.onebyte.log import Log, LogError
from thinwire.comm.onebyte.membership.errors import HistoryError, MessageError
from thinwire.comm.onebyte.membership.quorum import is_quorum
from thinwire.comm.onebyte.rounds import Record, Roster, Round, Snapshot

CHECK_BYTES = 8
"""As much of a chain hash as messages carry."""


class Ledger:
    """Follows a log as it grows and, at its tip, shrinks.

    A leader proposes a record only when all before it are committed, so of any log at most the last record is not.

    Args:
        log: open for writing; nobody else writes to it.
        snapshot_every: a snapshot follows every so many rounds; such a round, which cannot be undone, is handed out
            only when it is committed.
        handed: how many records the weights have taken up already.
        sync: write through to the disk.
    Attributes:
        committed: records known to be committed.
        must_rebuild: the weights cannot follow by changes; they must start over from the base model.
        undone: rounds taken back so far.
    """

    def __init__(self, log: Log, snapshot_every: int, *, handed: int = 0, sync: bool = True) -> None:
        assert snapshot_every > 0
        self.log = log
        self.committed = max(0, len(log) - 1)
        self.must_rebuild = False
        self.undone = 0
        self._snapshot_every = snapshot_every
        self._sync = sync
        self._handed = handed
        self._changes: deque[Change] = deque()
        self._rosters: list[tuple[int, Roster]] = []
        self._snapshots: list[tuple[int, Snapshot]] = []
        self._round_end = 0
        for index, record in enumerate(log):
            self._note(index, record)
        self._hand_out()

    @property
    def roster(self) -> Roster:
        """The newest, committed or not; one without members before there is any."""
        return self._rosters[-1][1] if self._rosters else Roster(0, ())

    @property
    def rosters_in_force(self) -> list[Roster]:
        """Those of which a quorum must agree: the newest, and the one before it until the newest is committed."""
        if len(self._rosters) > 1 and self._rosters[-1][0] >= self.committed:
            return [self._rosters[-2][1], self._rosters[-1][1]]
        return [self.roster]

    @property
    def base(self) -> bytes:
        """The chain hash up to and with the last round: what a contribution to the next round is based on."""
        return self.log.chain(self._round_end)

    @property
    def ends_in_round(self) -> bool:
        """Whether the last record is a round."""
        return 0 < self._round_end == len(self.log)

    @property
    def newest_round(self) -> Round | None:
        """The last round, if there is one."""
        record = self.log[self._round_end - 1] if self._round_end else None
        return record if isinstance(record, Round) else None

    @property
    def snapshot_due(self) -> int:
        """The number of rounds after which a snapshot must come next; 0 if none must."""
        rounds = self.log.rounds
        if not rounds or rounds % self._snapshot_every or self._round_end < len(self.log):
            return 0
        return rounds

    @property
    def all_taken(self) -> bool:
        """Whether the weights have taken up the whole log."""
        return not self._changes and not self.must_rebuild and self._handed == len(self.log)

    @property
    def has_changes(self) -> bool:
        """Whether take_changes() has any."""
        return bool(self._changes) and not self.must_rebuild

    def has_quorum(self, slots: Collection[int]) -> bool:
        """Whether `slots` may decide."""
        return all(is_quorum(slots, roster) for roster in self.rosters_in_force)

    def roster_at(self, length: int) -> Roster:
        """The newest roster of the first `length` records."""
        for index, roster in reversed(self._rosters):
            if index < length:
                return roster
        return Roster(0, ())

    def samples_of(self, slot: int) -> set[int]:
        """How many samples this slot may have been asked for of late."""
        return {r.samples for _, roster in self._rosters[-3:] for r in roster.members if r.slot == slot}

    def newest_snapshots(self, count: int) -> list[Snapshot]:
        """The last `count` snapshots, the newest last."""
        return [snapshot for _, snapshot in self._snapshots[-count:]]

    def name_of_slot(self, slot: int) -> str | None:
        """Who had this slot last; None if nobody ever."""
        for _, roster in reversed(self._rosters):
            for member in roster.members:
                if member.slot == slot:
                    return member.name
        return None

    @property
    def highest_slot(self) -> int:
        """Of all that were ever assigned; -1 if none was."""
        return max((m.slot for _, roster in self._rosters for m in roster.members), default=-1)

    def check(self, length: int) -> bytes:
        """The first bytes of the chain hash after `length` records."""
        return self.log.chain(length)[:CHECK_BYTES]

    def append(self, record: Record) -> None:
        """Add a record of this machine's own making."""
        self.log.append(record)
        if self._sync:
            self.log.sync()
        self._note(len(self.log) - 1, record)
        self._hand_out()

    def adopt(self, index: int, count: int, records: bytes) -> int:
        """Take over the leader's `count` records from `index` on, where this log agrees with the leader's before.

        Records that contradict them are given up. Returns where the records end.

        Raises:
            MessageError: they are not `count` records that continue this log.
            HistoryError: they contradict committed ones.
        """
        at = 0
        while count and index < len(self.log):
            own = self.log.raw(index, index + 1)
            if records[at : at + len(own)] != own:
                break
            at += len(own)
            index, count = index + 1, count - 1
        if not count:
            return index
        kept = self.log.raw(index)  # at most one record, which is none of the leader's
        self.truncate(index)
        try:
            taken = self.log.extend_raw(records[at:])
        except LogError as error:
            self._put_back(kept)
            raise MessageError(f"proposed records that do not follow: {error}") from None
        if taken != len(records) - at or len(self.log) != index + count:
            self.log.truncate(index)
            self._put_back(kept)
            raise MessageError(f"{len(records)} bytes proposed as {count} records from {index} on are not that")
        self._written(index)
        return index + count

    def truncate(self, length: int) -> None:
        """Give up the records from `length` on. Raises HistoryError if one of them is committed."""
        if length >= len(self.log):
            return
        if length < self.committed:
            self.refuse_history(length)
        for index in reversed(range(length, min(self._handed, len(self.log)))):
            record = self.log[index]
            self.undone += isinstance(record, Round)
            if isinstance(record, Round) and self._ends_in_snapshot(record):
                self.must_rebuild = True
            self._changes.append(Change(record, undone=True))
        self._handed = min(self._handed, length)
        self.log.truncate(length)
        while self._rosters and self._rosters[-1][0] >= length:
            self._rosters.pop()
        while self._snapshots and self._snapshots[-1][0] >= length:
            self._snapshots.pop()
        while self._round_end > length:
            self._round_end -= 1
        while self._round_end and not isinstance(self.log[self._round_end - 1], Round):
            self._round_end -= 1

    def refuse_history(self, index: int) -> NoReturn:
        """Raises HistoryError: the leader's records before or at `index` are not this machine's committed ones."""
        raise HistoryError(
            f"the leader's history differs from this machine's at record {index} or before, which was committed: two "
            "runs of one manifest have met, or machines have lost their logs and gone on. Decide which log is right "
            "and start the others anew from it",
            operation="onebyte/log",
        )

    def commit_to(self, length: int) -> bool:
        """Take the first `length` records as committed. Returns whether that is news."""
        if length <= self.committed:
            return False
        self.committed = min(length, len(self.log))
        self._hand_out()
        return True

    def take_changes(self) -> list[Change]:
        """What the weights have to do now, in this order, since the last call. Pairs that cancel are left out."""
        if self.must_rebuild:
            return []
        taken: list[Change] = []
        while self._changes:
            change = self._changes.popleft()
            if change.undone and taken and not taken[-1].undone:
                assert taken[-1].record == change.record
                taken.pop()
            else:
                taken.append(change)
        return taken

    def put_back(self, changes: list[Change]) -> None:
        """Return the rest of what take_changes() gave, not carried out."""
        self._changes.extendleft(reversed(changes))

    def start_over(self) -> None:
        """The weights are those of the base model: hand out everything again."""
        self.must_rebuild = False
        self._changes.clear()
        self._handed = 0
        self._hand_out()

    def _put_back(self, kept: bytes) -> None:
        start = len(self.log)
        self.log.extend_raw(kept)
        self._written(start)

    def _written(self, start: int) -> None:
        if self._sync:
            self.log.sync()
        for index, record in enumerate(self.log.records(start), start):
            self._note(index, record)
        self.committed = max(self.committed, len(self.log) - 1)
        self._hand_out()

    def _note(self, index: int, record: Record) -> None:
        if isinstance(record, Roster):
            self._rosters.append((index, record))
        elif isinstance(record, Snapshot):
            self._snapshots.append((index, record))
        else:
            self._round_end = index + 1

    def _hand_out(self) -> None:
        for index, record in enumerate(self.log.records(self._handed), self._handed):
            if index >= self.committed and isinstance(record, Round) and self._ends_in_snapshot(record):
                break
            self._changes.append(Change(record))
            self._handed = index + 1

    def _ends_in_snapshot(self, record: Round) -> bool:
        return (record.number + 1) % self._snapshot_every == 0
