"""What only the leader does: collect a round, propose records, and see who keeps up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from thinwire.comm.onebyte.membership import messages as m
from thinwire.comm.onebyte.membership.frame import Frame
from thinwire.comm.onebyte.membership.messages import NO_SLOT
from thinwire.comm.onebyte.rounds import Contribution, Member, Record, Roster, Round, Snapshot

if TYPE_CHECKING:
    from thinwire.comm.onebyte.membership.core import Core

_CHUNK_BYTES = 1 << 16
_CHUNK_RECORDS = 4096
_SILENT = float("-inf")


@dataclass
class Peer:
    """A machine that is sent records.

    slot: the one that it claims. match: so many records it holds, in this term. next: the first record to send.
    probing: what it holds is not known, or it has been sent a part; wait for its answer. late: its last contribution
    missed the deadline, so do not wait for the next. heard, sent: moments. join: what it asked for, while it is not in
    the roster as it wants; assigned: the slot that it shall have then.
    """

    address: str
    slot: int
    next: int
    heard: float
    match: int = 0
    sent: float = _SILENT
    probing: bool = True
    late: bool = False
    join: m.Join | None = None
    assigned: int = NO_SLOT

    def claim(self, slot: int) -> None:
        """The machine at this address says that it has this slot. What another one there held says nothing of it."""
        if slot != self.slot:
            self.slot, self.match = slot, 0


class Leader:
    """The leader's part of a core, from its election on."""

    def __init__(self, core: Core, now: float) -> None:
        self._core = core
        self._ledger = core.ledger
        self._settings = core.settings
        self._start = len(core.ledger.log)
        self._codes: dict[int, bytes] = {}
        self._reports: dict[int, bytes] = {}
        self._missed: Counter[int] = Counter()
        self._wanted: dict[int, int] = {}
        self._assigned: dict[str, int] = {}
        self._opened = now
        self.leaving: set[int] = set()
        self.peers: dict[str, Peer] = {}
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
        if not self._ledger.has_quorum(reachable | {self._core.slot}):
            self._resign(now)
        elif (
            self._codes
            and self._core.own_contribution() is None
            and now - self._opened > settings.deadline_s + settings.suspicion_s
        ):
            # The others need not wait for this machine's evaluation.
            self._resign(now, patience_s=4 * settings.suspicion_s)

    def advance(self, now: float) -> None:
        """Commit and propose whatever can be."""
        core, ledger = self._core, self._ledger
        while core.leads and not core.failure:
            lengths = sorted({len(ledger.log), *(p.match for p in self.peers.values() if p.match >= self._start)})
            for length in reversed(lengths):
                holders = self._slots(p for p in self.peers.values() if p.match >= max(length, self._start))
                if length <= ledger.committed or not ledger.has_quorum(holders | {core.slot}):
                    continue
                tip_matters = not isinstance(ledger.log[length - 1], Round) or ledger.snapshot_due
                if ledger.commit_to(length) and tip_matters:
                    for peer in self.peers.values():
                        if self._lives(peer, now):
                            self._send(peer, now, only_heartbeat=True, confirm=False)
                break
            if ledger.committed < len(ledger.log):
                return
            if core.member is None:
                self._resign(now)
                return
            record = self._next_record(now)
            if record is None:
                return
            self._append(record, now)

    def lost(self, address: str) -> None:
        """The connection to an address broke."""
        if address in self.peers:
            self.peers[address].heard = _SILENT
            self.peers[address].probing = True

    def take_own(self, now: float) -> None:
        """See what this machine itself contributes."""
        own = self._core.own_contribution()
        if own is not None:
            self._codes[self._core.slot] = own[0]
        report = self._core.own_report()
        if report is not None:
            self._reports[self._core.slot] = report.model_hash

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
            if frame.is_from(core.secret, core.promise.term, ledger.log.chain(length)):
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

    def take_join(self, sender: str, join: m.Join, now: float) -> None:
        """A machine wants to take part, or to go on."""
        core, ledger = self._core, self._ledger
        same_name = next((r for r in ledger.roster.members if r.name == join.name), None)
        if same_name and (same_name.slot != join.slot or same_name.address != sender):
            holder = self.peers.get(same_name.address)
            if same_name.address == core.me.address or (
                same_name.address != sender and holder and now - holder.heard < self._settings.suspicion_s
            ):
                core.send(sender, m.Refuse(f"another machine is called {join.name!r}: give it another `name`"))
                return
        slot = self._slot_for(sender, join)
        if slot is None:
            core.send(sender, m.Refuse("the run has had 65535 machines, and there is no slot left"))
            return
        peer = self.peers.setdefault(sender, Peer(sender, join.slot, len(ledger.log), now))
        peer.heard = now
        peer.claim(join.slot)
        at_home = any((r.slot, r.name, r.address) == (slot, join.name, sender) for r in ledger.roster.members)
        peer.join, peer.assigned = (None, NO_SLOT) if at_home else (join, slot)
        if join.slot != slot:
            core.send(sender, m.Assign(slot))
        if now - peer.sent >= self._settings.heartbeat_s / 4:
            self._send(peer, now, only_heartbeat=True)

    def want_samples(self, slot: int, samples: int) -> None:
        """A member can do more or less per round."""
        self._wanted[slot] = samples

    # The rest is the leader's own.

    def _slot_of(self, address: str) -> int:
        return next((r.slot for r in self._ledger.roster.members if r.address == address), NO_SLOT)

    def _slot_for(self, sender: str, join: m.Join) -> int | None:
        """Its old slot, if it remembers having had one; otherwise one that nobody ever had."""
        if join.slot != NO_SLOT and self._ledger.name_of_slot(join.slot) == join.name:
            return join.slot
        taken = {r.slot for r in self._ledger.roster.members}
        if sender not in self._assigned or self._ledger.name_of_slot(self._assigned[sender]) not in (None, join.name):
            self._assigned.pop(sender, None)
        if sender in self._assigned and join.slot == NO_SLOT and self._assigned[sender] in taken:
            del self._assigned[sender]  # it had it, and forgot
        if sender not in self._assigned:
            slot = max([self._ledger.highest_slot, *self._assigned.values()]) + 1
            if slot >= NO_SLOT:
                return None
            self._assigned[sender] = slot
        return self._assigned[sender]

    def _meet_roster(self, now: float) -> None:
        """Have a peer for every member."""
        for member in self._ledger.roster.members:
            if member.slot == self._core.slot:
                continue
            peer = self.peers.get(member.address)
            if peer is None:
                self.peers[member.address] = Peer(member.address, member.slot, len(self._ledger.log), now)

    def _slots(self, peers: Iterable[Peer]) -> set[int]:
        """The slots that these machines rightly claim: where the roster knows their address, or the name they joined
        with. A slot that was assigned by a leader that fell may have become another machine's."""
        rosters = self._ledger.rosters_in_force
        return {
            peer.slot
            for peer in peers
            for roster in rosters
            for r in roster.members
            if r.slot == peer.slot and (r.address == peer.address or (peer.join and peer.join.name == r.name))
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
            plain = isinstance(log[-1], Round) and not self._ledger.snapshot_due and peer.join is None
            confirm = not plain or count > 1
        peer.next = index + count
        peer.probing |= peer.next < len(log)
        peer.sent = now
        core.send(
            peer.address,
            m.Propose(
                core.promise.term,
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
            self._wanted = {}
            members = {r.slot: r for r in record.members}
            for peer in self.peers.values():
                member = members.get(peer.assigned)
                if peer.join and member and (member.name, member.address) == (peer.join.name, peer.address):
                    peer.join, peer.assigned = None, NO_SLOT
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
        return self._changed_roster(now) or self._round(now)

    def _round(self, now: float) -> Round | None:
        own = self._core.own_contribution()
        ledger = self._ledger
        if own is None or (ledger.log.rounds == 0 and len(ledger.roster.members) < self._settings.wait_for):
            return None
        self._codes[self._core.slot] = own[0]
        slots = {r.slot for r in ledger.roster.members}
        waited = [p for p in self.peers.values() if p.slot in slots and not p.late and self._lives(p, now)]
        missing = [p for p in waited if p.slot not in self._codes]
        if missing and now - self._opened < self._settings.deadline_s:
            return None
        for peer in missing:
            peer.late = True
        for slot in slots:
            self._missed[slot] = 0 if slot in self._codes else self._missed[slot] + 1
        contributions = tuple(Contribution(slot, self._codes[slot]) for slot in sorted(self._codes) if slot in slots)
        return Round(ledger.log.rounds, own[1], contributions)

    def _snapshot(self, now: float) -> Snapshot | None:
        """The hash on which a quorum agrees. Without one, have all weights made anew."""
        ledger, rounds = self._ledger, self._ledger.snapshot_due
        for model_hash in set(self._reports.values()):
            if ledger.has_quorum({slot for slot, found in self._reports.items() if found == model_hash}):
                return Snapshot(rounds, model_hash)
        slots = {r.slot for r in ledger.roster.members}
        living = {p.slot for p in self.peers.values() if p.slot in slots and self._lives(p, now)} | {self._core.slot}
        if living <= self._reports.keys() and ledger.has_quorum(self._reports.keys()):
            self._reports = {}
            for address, peer in self.peers.items():
                if peer.slot in living:
                    self._core.send(address, m.Rebuild(rounds))
            self._core.rebuild(rounds)
        return None

    def _changed_roster(self, now: float) -> Roster | None:
        ledger = self._ledger
        old = {r.slot: r for r in ledger.roster.members}
        new = dict(old)
        for address, peer in self.peers.items():
            join = peer.join
            if join is None or join.slot != peer.assigned or not self._lives(peer, now):
                continue
            if peer.slot in old:  # it has moved
                new[peer.slot] = replace(old[peer.slot], address=address)
            elif self._is_proven(join) and peer.match >= ledger.committed - 1:
                for slot, member in old.items():  # whoever listened there, or had that name, is no more
                    if address == member.address or join.name == member.name:
                        new.pop(slot, None)
                new[peer.slot] = Member(peer.slot, join.name, address, join.samples)
            self._missed[peer.slot] = 0
        for slot, samples in self._wanted.items():
            if slot in new:
                new[slot] = replace(new[slot], samples=samples)
        for slot in old:
            gone = self._missed[slot] >= self._settings.remove_after and slot != self._core.slot
            if slot in self.leaving or gone:
                new.pop(slot, None)
        self.leaving &= old.keys()
        if new == old or not new:
            self._core.left |= not new
            return None
        return Roster(ledger.roster.epoch + 1, tuple(new[slot] for slot in sorted(new)))

    def _is_proven(self, join: m.Join) -> bool:
        snapshots = self._ledger.newest_snapshots(2)
        if not snapshots:
            return (join.proof_rounds, join.proof) == (0, self._core.me.base_hash)
        return any((join.proof_rounds, join.proof) == (s.rounds, s.model_hash) for s in snapshots)

    def _resign(self, now: float, *, patience_s: float = 0.0) -> None:
        for address in self.peers:
            self._core.send(address, m.Resign(self._core.promise.term))
        self._core.step_down(now, patience_s=patience_s)
