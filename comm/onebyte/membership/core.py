"""The protocol of one machine, without sockets, threads or clocks: messages and moments in, messages out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from thinwire.comm.onebyte.exchange import Change, Turn
from thinwire.comm.onebyte.membership import messages as m
from thinwire.comm.onebyte.membership.errors import HistoryError, MessageError, ModelMismatchError, RefusedError
from thinwire.comm.onebyte.membership.frame import Frame, pack_frame
from thinwire.comm.onebyte.membership.leader import Leader
from thinwire.comm.onebyte.membership.ledger import Ledger
from thinwire.comm.onebyte.membership.messages import NO_SLOT, NOT_PROVEN
from thinwire.comm.onebyte.membership.promise import PromiseStore
from thinwire.comm.onebyte.membership.settings import MembershipSettings
from thinwire.comm.onebyte.rounds import Member, Roster, Round

Outgoing = m.Control | bytes
"""A control message, or the frame of a contribution."""

_LATE_IN_A_ROW = 2


class Me(NamedTuple):
    """This machine. run: first 8 bytes of the manifest's SHA-256. base_hash: of the base model's weights."""

    name: str
    address: str
    run: bytes
    base_hash: bytes


class Seat(NamedTuple):
    """A turn, and the history that it is based on."""

    turn: Turn
    base: bytes


@dataclass
class _Pending:
    """A contribution whose round is open. sent_term: in which term the leader was sent it; -1: not yet."""

    seat: Seat
    codes: bytes
    rate: float
    sent_term: int = -1
    sent_at: float = 0.0


class Core:
    """Elects, follows, leads, joins and leaves. The safety argument is in the package's docstring.

    Every method that takes `now`, in seconds of this machine's steady clock, may put messages for addresses into
    `outbox`; the caller takes them from there. Any message may be lost, delayed, repeated or overtaken.

    Attributes:
        outbox: (address, message) pairs to send.
        failure: what ended this machine's part, if anything did.
        left: this machine was asked to leave, and the run goes on without it.
    """

    def __init__(
        self,
        me: Me,
        ledger: Ledger,
        promises: PromiseStore,
        settings: MembershipSettings,
        *,
        chance: random.Random,
        now: float,
    ) -> None:
        self.me = me
        self.ledger = ledger
        self.settings = settings
        self.secret = settings.secret.get_secret_value().encode()
        self.outbox: list[tuple[str, Outgoing]] = []
        self.failure: Exception | None = None
        self.left = False
        self.elections = 0
        self.rounds_missed = 0
        self.rounds_committed = 0
        self.promise = promises.load()
        self._promises = promises
        self._chance = chance
        self._leader: Leader | None = None
        self._leader_address: str | None = None
        self._leader_heard = now
        self._leader_lost = False
        self._votes: set[int] = set()
        self._asking = False
        self._election_at = now
        self._join_at = now
        self._join_targets: list[str] = []
        self._hint: str | None = None
        self._proof = (NOT_PROVEN, bytes(32))
        self._pending: _Pending | None = None
        self._report: m.HashReport | None = None
        self._report_sent = False
        self._seen_rounds = ledger.log.rounds
        self._evaluating: Seat | None = None
        self._late = 0
        self._wanted_samples: int | None = None
        self._leaving = False
        self._rebuilt = False
        self._put_off_election(now)
        if not settings.contacts and not len(ledger.log):
            self._found(now)

    # What the rest of the package asks.

    @property
    def slot(self) -> int:
        """This machine's slot, or NO_SLOT."""
        return self.promise.slot

    @property
    def member(self) -> Member | None:
        """This machine's entry in the newest roster."""
        return next((r for r in self.ledger.roster.members if r.slot == self.slot and r.name == self.me.name), None)

    @property
    def is_voter(self) -> bool:
        """Whether this machine's vote may count."""
        rosters = self.ledger.rosters_in_force
        return any(r.slot == self.slot and r.name == self.me.name for roster in rosters for r in roster.members)

    @property
    def leads(self) -> bool:
        """Whether this machine believes that it leads."""
        return self._leader is not None

    @property
    def leader_address(self) -> str | None:
        """Where the leader listens, if known."""
        return self.me.address if self._leader else self._leader_address

    @property
    def samples(self) -> int:
        """What this machine asks for when it joins."""
        return self.settings.samples if self._wanted_samples is None else self._wanted_samples

    # What the optimizer's thread does.

    def seat(self) -> Seat | None:
        """What this machine should evaluate now; None while it takes no part, or has to do something else first."""
        member = self.member
        if member is None or self.left or self.failure or not self.ledger.all_taken or self.ledger.snapshot_due:
            return None
        self._evaluating = Seat(Turn(self.ledger.log.rounds, member.slot, member.samples), self.ledger.base)
        return self._evaluating

    def contribute(self, seat: Seat, codes: bytes, rate: float, now: float) -> None:
        """Hand in what seat() asked for. Dropped if the history has moved on."""
        if seat.base == self.ledger.base:
            self._pending = _Pending(seat, codes, rate)
            self._offer(now)
            self._lead_on(now)

    def is_open(self, seat: Seat) -> bool:
        """Whether the contribution for this seat is still waiting for its round to be decided."""
        return self._pending is not None and self._pending.seat == seat

    @property
    def hash_due(self) -> int:
        """The number of rounds after which the weights' hash is wanted now; 0 if none is."""
        rounds = self.ledger.snapshot_due
        if not rounds or not self.ledger.all_taken or self.slot == NO_SLOT:
            return 0
        return 0 if self._report is not None and self._report.rounds == rounds else rounds

    def report_hash(self, rounds: int, model_hash: bytes, now: float) -> None:
        """Say what hash_due asked for."""
        if self.ledger.snapshot_due == rounds:
            self._report = m.HashReport(self.slot, rounds, model_hash)
            self._offer(now)
            self._lead_on(now)

    def prove(self, rounds: int, model_hash: bytes) -> None:
        """The weights had this hash, the right one, after `rounds` rounds."""
        self._proof = (rounds, model_hash)

    def ask_samples(self, samples: int, now: float) -> None:
        """Ask for another number of samples per round."""
        self._wanted_samples = samples
        if self._leader:
            self._leader.want_samples(self.slot, samples)
            self._lead_on(now)

    def leave(self, now: float) -> None:
        """Leave: `left` becomes true when the others go on without this machine."""
        self._leaving = True
        self._join_at = now
        self.tick(now)

    # What the network and the clock do.

    def tick(self, now: float) -> None:
        """To be called a few times per heartbeat_s."""
        if self.failure or self.left:
            return
        try:
            self._tick(now)
            self._lead_on(now)
        except (HistoryError, ModelMismatchError) as error:
            self.fail(error)

    def lost(self, address: str, now: float) -> None:
        """The connection to an address broke. A hint: nothing follows from it but less waiting."""
        if self._leader:
            self._leader.lost(address)
            self._lead_on(now)
        elif address == self._leader_address:
            self._leader_lost = True
            self._election_at = min(self._election_at, now + self._chance.uniform(0.1, 1.0) * self.settings.heartbeat_s)
            if self._pending:
                self._pending.sent_term = -1

    def receive(self, sender: str, message: m.Control | Frame, now: float) -> None:
        """Take a message from the machine that listens at `sender`. Raises MessageError for what makes no sense."""
        if self.failure or self.left:
            return
        try:
            self._receive(sender, message, now)
            self._after_change(now)
            self._lead_on(now)
        except (HistoryError, ModelMismatchError) as error:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """Take part no longer."""
        self.failure = self.failure or error
        self._leader = None

    # For the leader.

    def send(self, address: str, message: Outgoing) -> None:
        """Put a message into the outbox."""
        self.outbox.append((address, message))

    def own_contribution(self) -> tuple[bytes, float] | None:
        """This machine's codes for the open round, and the rate."""
        pending = self._pending
        return (pending.codes, pending.rate) if pending and pending.seat.base == self.ledger.base else None

    def own_report(self) -> m.HashReport | None:
        """This machine's hash of the weights, where a snapshot is due."""
        return self._report if self._report and self._report.rounds == self.ledger.snapshot_due else None

    def rebuild(self, rounds: int) -> None:
        """Have the weights made anew, because no quorum agrees on them."""
        if self.ledger.snapshot_due != rounds or self._report is None:
            return
        if self._rebuilt:
            raise ModelMismatchError(
                f"after {rounds} rounds no quorum of machines has the same weights, though each has made its own anew "
                "from base and log. Their base models, their thinwire or their hardware differ: compare `thinwire "
                "onebyte verify` on each"
            )
        self._rebuilt = True
        self._report = None
        self.ledger.must_rebuild = True

    def step_down(self, now: float, *, patience_s: float = 0.0) -> None:
        """Lead no longer. patience_s: do not stand for election so long."""
        self._leader = None
        self._leader_address = None
        self._leader_lost = True
        self._put_off_election(now, patience_s)

    # The rest is this machine's own.

    def _found(self, now: float) -> None:
        self._save(term=1, log_term=1, slot=0, vote=0)
        member = Member(0, self.me.name, self.me.address, self.settings.samples)
        self.ledger.append(Roster(0, (member,)))
        self._lead(now)

    def _save(self, **changes: int) -> None:
        promise = replace(self.promise, **changes)
        if promise != self.promise:
            self._promises.save(promise)
            self.promise = promise

    def _put_off_election(self, now: float, patience_s: float = 0.0) -> None:
        self._election_at = now + patience_s + self._chance.uniform(1.0, 2.0) * self.settings.suspicion_s

    def _hears_leader(self, now: float) -> bool:
        if self._leader:
            return True
        known = self._leader_address is not None and not self._leader_lost
        return known and now - self._leader_heard < self.settings.suspicion_s

    def _lead_on(self, now: float) -> None:
        if self._leader is None:
            return
        try:
            self._leader.advance(now)
        except ModelMismatchError as error:
            self.fail(error)
        self._after_change(now)

    def _tick(self, now: float) -> None:
        if self._leader:
            self._leader.tick(now)
        elif self.is_voter and now >= self._election_at:
            self._stand(now, asking=True)
        if self._leaving and not self.is_voter:
            self.left = True
            return
        if now < self._join_at:
            return
        self._join_at = now + self.settings.heartbeat_s
        if self._leaving:
            if self._leader:
                self._leader.leaving.add(self.slot)
            elif self._leader_address:
                self.send(self._leader_address, m.Leave(self.slot))
        elif not self._leader and (not self._at_home or not self._hears_leader(now)):
            self._ask_to_join(now)
        elif not self._leader and self._wanted_samples is not None and self._leader_address:
            member = self.member
            if member and member.samples != self._wanted_samples:
                self.send(self._leader_address, m.Samples(self.slot, self._wanted_samples))

    @property
    def _at_home(self) -> bool:
        member = self.member
        return member is not None and member.address == self.me.address

    def _ask_to_join(self, now: float) -> None:
        rounds, proof = self._proof
        join = m.Join(self.slot, self.samples, rounds, proof, self.me.name)
        if self._hears_leader(now) and self._leader_address:
            self.send(self._leader_address, join)
            return
        if self._hint:
            target, self._hint = self._hint, None
        else:
            if not self._join_targets:
                known = [*self.settings.contacts, *(member.address for member in self.ledger.roster.members)]
                self._join_targets = [a for a in dict.fromkeys(known) if a != self.me.address]
            if not self._join_targets:
                return
            target = self._join_targets.pop(0)
        self.send(target, join)

    def _stand(self, now: float, *, asking: bool) -> None:
        self._put_off_election(now)
        self._asking = asking
        self._votes = {self.slot}
        if not asking:
            self._save(term=self.promise.term + 1, vote=self.slot)
        self._leader_address = None
        request = m.VoteRequest(
            self.promise.term + asking, self.slot, asking, self.promise.log_term, len(self.ledger.log)
        )
        for address in dict.fromkeys(r.address for r in self._voters()):
            self.send(address, request)
        self._count_votes(now)

    def _voters(self) -> list[Member]:
        rosters = self.ledger.rosters_in_force
        return [r for roster in rosters for r in roster.members if r.slot != self.slot]

    def _count_votes(self, now: float) -> None:
        if self._votes and self.is_voter and self.ledger.has_quorum(self._votes):
            if self._asking:
                self._stand(now, asking=False)
            else:
                self._votes = set()
                self._save(log_term=self.promise.term)
                self._lead(now)

    def _lead(self, now: float) -> None:
        self.elections += 1
        self._leader_address = None
        self._leader = Leader(self, now)
        self._offer(now)
        self._lead_on(now)

    def _receive(self, sender: str, message: m.Control | Frame, now: float) -> None:
        if isinstance(message, Frame):
            if self._leader:
                self._leader.take_frame(sender, message, now)
        elif isinstance(message, m.Propose):
            self._follow(sender, message, now)
        elif isinstance(message, m.Ack):
            if message.term > self.promise.term:
                self._learn_term(message.term, now)
            elif self._leader and message.term == self.promise.term:
                self._leader.take_ack(sender, message, now)
        elif isinstance(message, m.VoteRequest):
            self._answer_vote(sender, message, now)
        elif isinstance(message, m.Vote):
            self._take_vote(message, now)
        elif isinstance(message, m.Join):
            if self._leader:
                self._leader.take_join(sender, message, now)
            elif self._leader_address and self._hears_leader(now) and self._leader_address != sender:
                self.send(sender, m.Hint(self.promise.term, self._leader_address))
        elif isinstance(message, m.Assign):
            if self.slot != message.slot and not self.is_voter and message.slot != NO_SLOT:
                self._save(slot=message.slot)
        elif isinstance(message, m.Hint):
            if message.term >= self.promise.term and message.address != self.me.address:
                self._hint = message.address
                self._join_at = min(self._join_at, now + self.settings.heartbeat_s / 4)
        elif isinstance(message, m.Refuse):
            if not self.is_voter:
                self.fail(RefusedError(f"{sender} does not take this machine: {message.reason}", operation="join"))
        elif isinstance(message, m.Leave):
            if self._leader:
                self._leader.leaving.add(message.slot)
        elif isinstance(message, m.Samples):
            if self._leader:
                self._leader.want_samples(message.slot, message.samples)
        elif isinstance(message, m.HashReport):
            if self._leader:
                self._leader.take_report(sender, message, now)
        elif isinstance(message, m.Rebuild):
            if sender == self._leader_address:
                self.rebuild(message.rounds)
        elif message.term >= self.promise.term and sender == self._leader_address:
            self.lost(sender, now)

    def _learn_term(self, term: int, now: float) -> None:
        if term > self.promise.term:
            self._save(term=term, vote=NO_SLOT)
            self._votes = set()
            self._leader_address = None
            if self._leader:
                self.step_down(now)

    def _follow(self, sender: str, message: m.Propose, now: float) -> None:
        ledger = self.ledger
        length = len(ledger.log)
        if message.term < self.promise.term:
            self._acknowledge(sender, False, length)
            return
        self._learn_term(message.term, now)
        if self._leader:
            raise MessageError(f"{sender} claims to lead in term {message.term}, in which this machine leads")
        self._leader_address, self._leader_heard, self._leader_lost = sender, now, False
        self._votes = set()
        self._put_off_election(now)
        if message.index > length or ledger.check(message.index) != message.check:
            if message.index <= ledger.committed:
                ledger.truncate(message.index - 1)  # raises, and says why
            self._acknowledge(sender, False, length)
            return
        end = ledger.adopt(message.index, message.count, message.records)
        if end >= message.start and self.promise.log_term != message.term:
            ledger.truncate(end)
            self._save(log_term=message.term)
        ledger.commit_to(min(message.committed, end))
        if message.confirm:
            self._acknowledge(sender, True, end)
        overdue = self._pending and now - self._pending.sent_at >= self.settings.suspicion_s / 2
        if self._pending and not message.have and overdue and not message.count:
            self._pending.sent_term = -1
        self._offer(now, again=not message.count and not message.have)

    def _acknowledge(self, leader: str, ok: bool, length: int) -> None:
        ledger = self.ledger
        self.send(leader, m.Ack(self.promise.term, self.slot, ok, length, ledger.check(length), ledger.committed))

    def _offer(self, now: float, *, again: bool = False) -> None:
        """Give the leader what it may not have yet: the contribution, or the hash."""
        if self._leader:
            self._leader.take_own(now)
            return
        leader = self._leader_address
        if leader is None or self.member is None or self.promise.log_term != self.promise.term:
            return
        report = self.own_report()
        if report is not None and (again or not self._report_sent):
            self._report_sent = True
            self.send(leader, report)
        pending = self._pending
        if pending is None or pending.sent_term == self.promise.term:
            return
        pending.sent_term, pending.sent_at = self.promise.term, now
        log = self.ledger.log
        self.send(
            leader,
            pack_frame(
                self.me.run,
                pending.seat.turn.round,
                self.ledger.roster.epoch,
                self.slot,
                pending.codes,
                secret=self.secret,
                term=self.promise.term,
                chain=log.chain(len(log)),
            ),
        )

    def _answer_vote(self, sender: str, message: m.VoteRequest, now: float) -> None:
        own = (self.promise.log_term, len(self.ledger.log))
        could = (message.log_term, message.length) >= own and not self._hears_leader(now) and self.slot != NO_SLOT
        if message.asking:
            granted = could and message.term > self.promise.term
        else:
            if not self._hears_leader(now):
                self._learn_term(message.term, now)
            granted = could and message.term == self.promise.term and self.promise.vote in (NO_SLOT, message.slot)
            if granted:
                self._save(vote=message.slot)
                self._put_off_election(now)
        term = message.term if granted else self.promise.term
        self.send(sender, m.Vote(term, self.slot, message.asking, granted, self.me.name))
        if self._hears_leader(now):
            self.send(sender, m.Hint(self.promise.term, self.leader_address or self.me.address))

    def _take_vote(self, message: m.Vote, now: float) -> None:
        if not message.granted:
            if message.term > self.promise.term:
                self._learn_term(message.term, now)
        elif self._votes and message.asking == self._asking and message.term == self.promise.term + self._asking:
            self._votes |= {r.slot for r in self._voters() if (r.slot, r.name) == (message.slot, message.name)}
            self._count_votes(now)

    def _after_change(self, now: float) -> None:
        """Notice what the log's growth or shrinking means for what this machine was doing."""
        ledger = self.ledger
        member = next((r for r in ledger.roster.members if r.slot == self.slot), None)
        if member is not None and member.name != self.me.name and not self.is_voter:
            self._save(slot=NO_SLOT)  # assigned by a leader that fell before it had a quorum
        if self._report is not None and self._report.rounds != ledger.snapshot_due:
            self._report, self._report_sent, self._rebuilt = None, False, False
        rounds = ledger.log.rounds
        if rounds == self._seen_rounds and (self._pending is None or self._pending.seat.base == ledger.base):
            return
        self.rounds_committed += max(0, rounds - self._seen_rounds)
        self._seen_rounds = rounds
        self._judge_lateness(now)
        if self._pending and self._pending.seat.base != ledger.base:
            self._pending = None

    def _judge_lateness(self, now: float) -> None:
        """Whether the round that this machine was working on has been decided without it."""
        seat, log = self._evaluating, self.ledger.log
        if seat is None or log.rounds != seat.turn.round + 1:
            return
        self._evaluating = None
        tip = next((r for r in (log[i] for i in reversed(range(len(log)))) if isinstance(r, Round)), None)
        if tip is None:
            return
        if any(c.slot == self.slot for c in tip.contributions):
            self._late = 0
            return
        self.rounds_missed += 1
        self._late += 1
        if self.settings.adapt_samples and self._late >= _LATE_IN_A_ROW and seat.turn.samples > 1:
            self._late = 0
            self.ask_samples(seat.turn.samples // 2, now)

    def take_changes(self) -> Sequence[Change]:
        """What the weights have to do now."""
        return self.ledger.take_changes()
