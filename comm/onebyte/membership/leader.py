"""What only the leader does: collect a round, propose records, and see who keeps up."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from thinwire.comm.onebyte.membership import messages as m
from thinwire.comm.onebyte.membership.admission import Admission
from thinwire.comm.onebyte.membership.frame import Frame
from thinwire.comm.onebyte.membership.messages import NO_SLOT
from thinwire.comm.onebyte.membership.peer import SILENT, Peer
from thinwire.comm.onebyte.rounds import Contribution, Record, Roster, Round, Snapshot

if TYPE_CHECKING:
    from thinwire.comm.onebyte.membership.core import Core

_CHUNK_BYTES = 1 << 16
_CHUNK_RECORDS = 4096


class Leader:
    """The leader's part of a core, from its election on."""

    def __init__(self, core: Core, now: float) -> None:
        self._core = core
        self._ledger = core.ledger
        self._settings = core.settings
        self._start = len(core.ledger.log)
        self._codes: dict[int, bytes] = {}
        self._reports: dict[int, bytes] = {}
        self._opened = now
        self.peers: dict[str, Peer] = {}
        self.admission = Admission(core, self.peers)
        self._meet_roster(now)
        for peer in self.peers.values():
            self._send(peer, now)

    def tick(self, now: float) -> None:
        """Show signs of life, and see who still shows some."""
        settings = self._settings
        for address, peer in list(self.peers.items()):
            if now - peer.sent >= settings.heartbeat_s:
                self._send(peer, now, only_heartbeat=True)
            if self._slot_of(address) == NO_SLOT and now - peer.heard > 4 * settings.suspicion_s:
                del self.peers[address]
        reachable = self._slots(p for p in self.peers.values() if now - p.heard <= 2 * settings.suspicion_s)
        if not self._ledger.has_quorum(reachable | {self._core.place.slot}):
            self._resign(now)
        elif (
            self._codes
            and self._core.work.contribution is None
            and now - self._opened > settings.deadline_s + settings.suspicion_s
        ):
            # The others need not wait for this machine's evaluation.
            self._resign(now, patience_s=4 * settings.suspicion_s)

    def advance(self, now: float) -> None:
        """Commit and propose whatever can be."""
        core, ledger = self._core, self._ledger
        while core.leads and not core.failure:
            if ledger.committed < len(ledger.log) and not self._commit(now):
                return
            if core.place.member is None:
                self._resign(now)
                return
            record = self._next_record(now)
            if record is None:
                return
            self._append(record, now)

    def _commit(self, now: float) -> bool:
        """Whether a quorum holds the last record; all before it are committed.

        Who holds it has all that this leader's log had at its election, hence follows this leader and no older one.
        """
        ledger, length = self._ledger, len(self._ledger.log)
        holders = self._slots(p for p in self.peers.values() if p.match >= length)
        if not ledger.has_quorum(holders | {self._core.place.slot}):
            return False
        ledger.commit_to(length)
        if ledger.snapshot_due or not ledger.ends_in_round:
            for peer in self.peers.values():  # who waits to be told
                if self._lives(peer, now):
                    self._send(peer, now, only_heartbeat=True, confirm=False)
        return True

    def lost(self, address: str) -> None:
        """The connection to an address broke."""
        if address in self.peers:
            self.peers[address].heard = SILENT
            self.peers[address].probing = True

    def take(self, sender: str, message: m.Control | Frame, now: float) -> None:
        """What only a leader is sent."""
        if isinstance(message, Frame):
            self.take_frame(sender, message, now)
        elif isinstance(message, m.Join):
            if self.admission.take_join(sender, message, now):
                peer = self.peers[sender]
                if now - peer.sent >= self._settings.heartbeat_s / 4:
                    self._send(peer, now, only_heartbeat=True)
        elif isinstance(message, m.HashReport):
            self.take_report(sender, message, now)
        elif isinstance(message, m.Leave):
            self.admission.leaving.add(message.slot)
        elif isinstance(message, m.Samples):
            self.admission.wanted[message.slot] = message.samples

    def take_own(self) -> None:
        """See what this machine itself contributes."""
        own = self._core.work.contribution
        if own is not None:
            self._codes[self._core.place.slot] = own[0]
        report = self._core.work.report
        if report is not None:
            self._reports[self._core.place.slot] = report.model_hash

    def take_frame(self, sender: str, frame: Frame, now: float) -> None:
        """A contribution; of a round that is closed it only shows that the sender lives."""
        core, ledger = self._core, self._ledger
        peer = self.peers.get(sender)
        if peer is None or frame.slot == NO_SLOT or frame.slot != peer.slot:
            return
        peer.heard = now
        if frame.round < ledger.log.rounds:
            peer.late = False
        if frame.round != ledger.log.rounds:
            return
        for length in range(len(ledger.log), -1, -1):
            if length < len(ledger.log) and isinstance(ledger.log[length], Round):
                return
            if frame.is_from(core.secret, core.place.term, ledger.log.chain(length)):
                break
        else:
            return
        self._holds(peer, length, now)
        may = self._slots([peer]) and any(r.slot == frame.slot for r in ledger.roster.members)
        epoch = ledger.roster_at(length).epoch & 0xFFFF
        if may and epoch == frame.epoch and len(frame.codes) in ledger.samples_of(frame.slot):
            peer.late = False
            self._codes.setdefault(frame.slot, frame.codes)

    def take_ack(self, sender: str, ack: m.Ack, now: float) -> None:
        """A machine holds what it was sent, or cannot follow and says from where it can."""
        peer, ledger = self.peers.get(sender), self._ledger
        if peer is None:
            return
        peer.heard = now
        peer.claim(ack.slot)
        same = ack.length <= len(ledger.log) and ledger.check(ack.length) == ack.check
        if ack.ok:
            if same:
                was_probing = peer.probing
                self._holds(peer, ack.length, now)
                if was_probing and peer.next < len(ledger.log):
                    self._send(peer, now)
            return
        peer.next = ack.length if same else min(ack.committed, len(ledger.log))
        peer.probing = False
        self._send(peer, now)

    def take_report(self, sender: str, report: m.HashReport, now: float) -> None:
        """A machine's hash of its weights."""
        peer = self.peers.get(sender)
        if peer is None or peer.slot != report.slot or report.slot == NO_SLOT:
            return
        peer.heard = now
        if report.rounds == self._ledger.snapshot_due:
            self._reports[report.slot] = report.model_hash

    # The rest is the leader's own.

    def _slot_of(self, address: str) -> int:
        return next((r.slot for r in self._ledger.roster.members if r.address == address), NO_SLOT)

    def _meet_roster(self, now: float) -> None:
        """Have a peer for every member."""
        for member in self._ledger.roster.members:
            if member.slot == self._core.place.slot:
                continue
            peer = self.peers.get(member.address)
            if peer is None:
                heard = SILENT if member.address in self._core.unreachable else now
                self.peers[member.address] = Peer(member.address, member.slot, len(self._ledger.log), heard)

    def _slots(self, peers: Iterable[Peer]) -> set[int]:
        """The slots that these machines rightly claim: where the roster knows their address, or the name they joined
        with. A slot that was assigned by a leader that fell may have become another machine's."""
        rosters = [{r.slot: r for r in roster.members} for roster in self._ledger.rosters_in_force]
        return {
            peer.slot
            for peer in peers
            for members in rosters
            if (member := members.get(peer.slot))
            and (member.address == peer.address or (peer.join and peer.join.name == member.name))
        }

    def _lives(self, peer: Peer, now: float) -> bool:
        return now - peer.heard <= self._settings.suspicion_s

    def _holds(self, peer: Peer, length: int, now: float) -> None:
        peer.match = max(peer.match, length)
        if peer.probing:
            peer.next = max(peer.match, length)
            peer.probing = False
        peer.next = max(peer.next, length)

    def _send(self, peer: Peer, now: float, *, only_heartbeat: bool = False, confirm: bool = True) -> None:
        """Records from peer.next on, or, where that is not known to be the right place, only the question."""
        core, log = self._core, self._ledger.log
        index, count, records = min(peer.next, len(log)), 0, b""
        if not only_heartbeat and not peer.probing and index < len(log):
            count = min(len(log) - index, _CHUNK_RECORDS)
            records = log.raw(index, index + count)
            while len(records) > _CHUNK_BYTES and count > 1:
                count = max(1, count * _CHUNK_BYTES // len(records))
                records = log.raw(index, index + count)
            plain = self._ledger.ends_in_round and not self._ledger.snapshot_due and peer.join is None
            confirm = not plain or count > 1
        peer.next = index + count
        peer.probing |= peer.next < len(log)
        peer.sent = now
        core.send(
            peer.address,
            m.Propose(
                core.place.term,
                index,
                self._ledger.check(index),
                self._start,
                self._ledger.committed,
                confirm,
                peer.slot in self._codes or peer.slot in self._reports,
                count,
                records,
            ),
        )

    def _append(self, record: Record, now: float) -> None:
        self._ledger.append(record)
        if isinstance(record, Roster):
            self._meet_roster(now)
            self.admission.settle(record)
        else:
            self._codes, self._reports = {}, {}
            self._opened = now
        length = len(self._ledger.log)
        for peer in self.peers.values():
            if not peer.probing and peer.next == length - 1 and self._lives(peer, now):
                self._send(peer, now)

    def _next_record(self, now: float) -> Record | None:
        """What to propose now that all before is committed."""
        if self._ledger.snapshot_due:
            return self._snapshot(now)
        return self.admission.changed_roster(now) or self._round(now)

    def _round(self, now: float) -> Round | None:
        own = self._core.work.contribution
        ledger = self._ledger
        if own is None or (ledger.log.rounds == 0 and len(ledger.roster.members) < self._settings.wait_for):
            return None
        self._codes[self._core.place.slot] = own[0]
        slots = {r.slot for r in ledger.roster.members}
        waited = [p for p in self.peers.values() if p.slot in slots and not p.late and self._lives(p, now)]
        missing = [p for p in waited if p.slot not in self._codes]
        if missing and now - self._opened < self._settings.deadline_s:
            return None
        for peer in missing:
            peer.late = True
        for slot in slots:
            self.admission.count_round(slot, missed=slot not in self._codes)
        contributions = tuple(Contribution(slot, self._codes[slot]) for slot in sorted(self._codes) if slot in slots)
        return Round(ledger.log.rounds, own[1], contributions)

    def _snapshot(self, now: float) -> Snapshot | None:
        """The hash on which a quorum agrees. Without one, have all weights made anew."""
        ledger, rounds = self._ledger, self._ledger.snapshot_due
        for model_hash in set(self._reports.values()):
            if ledger.has_quorum({slot for slot, found in self._reports.items() if found == model_hash}):
                return Snapshot(rounds, model_hash)
        slots = {r.slot for r in ledger.roster.members}
        living = {p.slot for p in self.peers.values() if p.slot in slots and self._lives(p, now)}
        living.add(self._core.place.slot)
        overdue = now - self._opened >= self._settings.deadline_s
        if (overdue or living <= self._reports.keys()) and ledger.has_quorum(self._reports.keys()):
            self._reports = {}
            for address, peer in self.peers.items():
                if peer.slot in living:
                    self._core.send(address, m.Rebuild(rounds))
            self._core.work.rebuild(rounds)
        return None

    def _resign(self, now: float, *, patience_s: float = 0.0) -> None:
        for address in self.peers:
            self._core.send(address, m.Resign(self._core.place.term))
        self._core.step_down(now, patience_s=patience_s)
