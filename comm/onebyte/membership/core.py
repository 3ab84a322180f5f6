"""The protocol of one machine, without sockets, threads or clocks: messages and moments in, messages out."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TypeAlias

from thinwire.comm.onebyte.membership import messages as m
from thinwire.comm.onebyte.membership.election import Election
from thinwire.comm.onebyte.membership.errors import HistoryError, MessageError, ModelMismatchError, RefusedError
from thinwire.comm.onebyte.membership.frame import Frame
from thinwire.comm.onebyte.membership.leader import Leader
from thinwire.comm.onebyte.membership.ledger import Ledger
from thinwire.comm.onebyte.membership.messages import NO_SLOT, NOT_PROVEN
from thinwire.comm.onebyte.membership.place import Me, Place
from thinwire.comm.onebyte.membership.promise import PromiseStore
from thinwire.comm.onebyte.membership.settings import MembershipSettings
from thinwire.comm.onebyte.membership.work import Seat, Work
from thinwire.comm.onebyte.rounds import Member, Roster

Outgoing: TypeAlias = m.Control | bytes
"""A control message, or the frame of a contribution."""


class Core:
    """Elects, follows, leads, joins and leaves. The safety argument is in the package's docstring.

    Every method that takes `now`, in seconds of this machine's steady clock, may put messages for addresses into
    `outbox`; the caller takes them from there. Any message may be lost, delayed, repeated or overtaken.

    Attributes:
        outbox: (address, message) pairs to send.
        failure: what ended this machine's part, if anything did.
        left: this machine was asked to leave, and the run goes on without it.
        work: what this machine hands in. election: who leads.
        unreachable: addresses to which the connection broke, and from which nothing has been heard since.
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
        self.ledger = ledger
        self.settings = settings
        self.secret = settings.secret.get_secret_value().encode()
        self.outbox: list[tuple[str, Outgoing]] = []
        self.failure: Exception | None = None
        self.left = False
        self.place = Place(me, ledger, promises)
        self.work = Work(self.place, ledger, self.secret, adapt_samples=settings.adapt_samples)
        self.election = Election(self.place, ledger, settings, self.send, chance, now)
        self.unreachable: set[str] = set()
        self._leader: Leader | None = None
        self._leaving = False
        self._proof = (NOT_PROVEN, bytes(32))
        self._ask_at = now
        self._targets: list[str] = []
        self._hint: str | None = None
        self._refused_at: float | None = None
        if not settings.contacts and not len(ledger.log):
            self._guarded(self._found, now)

    @property
    def leads(self) -> bool:
        """Whether this machine believes that it leads."""
        return self.election.leads

    @property
    def leader_address(self) -> str | None:
        """Where the leader listens, if known."""
        return self.place.me.address if self.leads else self.election.leader

    # For the optimizer's thread.

    def seat(self) -> Seat | None:
        """What this machine should evaluate now."""
        return None if self.left or self.failure else self.work.seat()

    def contribute(self, seat: Seat, codes: bytes, rate: float, now: float) -> None:
        """Hand in what seat() asked for."""
        self.work.contribute(seat, codes, rate)
        self._guarded(self._offer, now)

    def report_hash(self, rounds: int, model_hash: bytes, now: float) -> None:
        """Say what work.hash_due asked for."""
        self.work.report_hash(rounds, model_hash)
        self._guarded(self._offer, now)

    def prove(self, rounds: int, model_hash: bytes) -> None:
        """The weights had this hash, the right one, after `rounds` rounds."""
        self._proof = (rounds, model_hash)
        if not self.place.is_voter:
            self._ask_at = float("-inf")  # before the next snapshot makes it old

    def ask_samples(self, samples: int, now: float) -> None:
        """Ask for another number of samples per round."""
        self.work.wanted_samples = samples
        self._ask_at = now
        self.tick(now)

    def leave(self, now: float) -> None:
        """Leave: `left` becomes true when the others go on without this machine."""
        self._leaving = True
        self._ask_at = now
        self.tick(now)

    # For the network and the clock.

    def tick(self, now: float) -> None:
        """To be called a few times per heartbeat_s."""
        self._guarded(self._tick, now)

    def lost(self, address: str, now: float) -> None:
        """The connection to an address broke. A hint: nothing follows from it but less waiting."""
        self._guarded(lambda now: self._lose(address, now), now)

    def receive(self, sender: str, message: m.Control | Frame, now: float) -> None:
        """Take a message from the machine that listens at `sender`. Raises MessageError for what makes no sense."""
        self._guarded(lambda now: self._receive(sender, message, now), now)

    def fail(self, error: Exception) -> None:
        """Take part no longer."""
        self.failure = self.failure or error
        self.election.leads = False
        self._leader = None

    # For the leader.

    def send(self, address: str, message: Outgoing) -> None:
        """Put a message into the outbox."""
        self.outbox.append((address, message))

    def step_down(self, now: float, *, patience_s: float = 0.0) -> None:
        """Lead no longer. patience_s: do not stand for election so long."""
        self.election.step_down(now, patience_s)

    # The rest is the core's own.

    def _guarded(self, work: Callable[[float], None], now: float) -> None:
        """Do something, and all that follows from it, unless this machine's part has ended."""
        if self.failure or self.left:
            return
        try:
            work(now)
            self._settle(now)
        except (HistoryError, ModelMismatchError) as error:
            self.fail(error)

    def _settle(self, now: float) -> None:
        """Begin or cease to lead, as the election says; lead on; and see what the log's changes mean for the work."""
        if self.leads and self._leader is None:
            self._leader = Leader(self, now)
            self._offer(now)
        if not self.leads:
            self._leader = None
        self._notice_slot()
        self.work.notice()
        if self._leader:
            self._leader.advance(now)
            self.work.notice()
            if not self.leads:
                self._leader = None

    def _found(self, now: float) -> None:
        me = self.place.me
        self.place.promise_anew(term=self.place.term + 1, slot=0, vote=0)
        self.ledger.append(Roster(0, (Member(0, me.name, me.address, self.settings.samples),)))
        self.election.win()

    def _notice_slot(self) -> None:
        """Forget a slot that was assigned by a leader that fell before it had a quorum, and is now another's."""
        mine = next((r for r in self.ledger.roster.members if r.slot == self.place.slot), None)
        if mine is not None and mine.name != self.place.me.name and not self.place.is_voter:
            self.place.promise_anew(slot=NO_SLOT)

    def _offer(self, now: float, again_after_s: float | None = None) -> None:
        """Give the leader what it may not have yet."""
        if self._leader:
            self._leader.take_own()
        elif self.election.leader is not None:
            for parcel in self.work.take_parcels(now, again_after_s=again_after_s):
                self.send(self.election.leader, parcel)

    def _tick(self, now: float) -> None:
        if self._leader:
            self._leader.tick(now)
        self.election.tick(now)
        if self._leaving and not self.place.is_voter:
            self.left = True
        elif now >= self._ask_at:
            self._ask_at = now + self.settings.heartbeat_s
            self._ask(now)

    def _ask(self, now: float) -> None:
        """Repeat what this machine wants of the leader until it has it."""
        wanted, member = self.work.wanted_samples, self.place.member
        if self._leader:
            if self._leaving:
                self._leader.admission.leaving.add(self.place.slot)
            if wanted is not None and member and member.samples != wanted:
                self._leader.admission.wanted[self.place.slot] = wanted
        elif self._leaving:
            if self.election.leader:
                self.send(self.election.leader, m.Leave(self.place.slot))
        elif not self.place.is_at_home or not self.election.hears_leader(now):
            self._ask_to_join(now)
        elif wanted is not None and member and member.samples != wanted and self.election.leader:
            self.send(self.election.leader, m.Samples(self.place.slot, wanted))

    def _ask_to_join(self, now: float) -> None:
        rounds, proof = self._proof
        wanted = self.work.wanted_samples
        samples = self.settings.samples if wanted is None else wanted
        target = self.election.leader if self.election.hears_leader(now) else self._next_target()
        if target is not None:
            self.send(target, m.Join(self.place.slot, samples, rounds, proof, self.place.me.name))

    def _next_target(self) -> str | None:
        """Whom to ask where no leader is known: whoever was named as such, then all machines in turn."""
        hint, self._hint = self._hint, None
        if hint:
            return hint
        if not self._targets:
            known = [*self.settings.contacts, *(member.address for member in self.ledger.roster.members)]
            self._targets = [address for address in dict.fromkeys(known) if address != self.place.me.address]
        return self._targets.pop(0) if self._targets else None

    def _lose(self, address: str, now: float) -> None:
        self.unreachable.add(address)
        if self._leader:
            self._leader.lost(address)
        elif address == self.election.leader:
            self.election.lost_leader(now)
            self.work.send_again()

    def _receive(self, sender: str, message: m.Control | Frame, now: float) -> None:
        election = self.election
        self.unreachable.discard(sender)
        if isinstance(message, m.Propose):
            self._follow(sender, message, now)
        elif isinstance(message, m.Ack):
            election.learn_term(message.term, now)
            if self.leads and self._leader and message.term == self.place.term:
                self._leader.take_ack(sender, message, now)
        elif isinstance(message, m.VoteRequest):
            election.answer(sender, message, now)
        elif isinstance(message, m.Vote):
            election.take_vote(message, now)
        elif isinstance(message, m.Assign):
            self._refused_at = None
            if not self.place.is_voter and message.slot != NO_SLOT:
                self.place.promise_anew(slot=message.slot)
        elif isinstance(message, m.Hint):
            if message.term >= self.place.term and message.address != self.place.me.address:
                self._hint = message.address
                self._ask_at = min(self._ask_at, now + self.settings.heartbeat_s / 4)
        elif isinstance(message, m.Refuse):
            self._take_refusal(sender, message, now)
        elif isinstance(message, m.Rebuild):
            if sender == election.leader:
                self.work.rebuild(message.rounds)
        elif isinstance(message, m.Resign):
            if message.term >= self.place.term and sender == election.leader:
                election.lost_leader(now)
                self.work.send_again()
        elif self._leader:
            self._leader.take(sender, message, now)
        elif isinstance(message, m.Join) and election.hears_leader(now) and election.leader not in (None, sender):
            assert election.leader is not None
            self.send(sender, m.Hint(self.place.term, election.leader))

    def _take_refusal(self, sender: str, message: m.Refuse, now: float) -> None:
        """Final where it lasts: this machine may have died and come back before the others have noticed."""
        if self._refused_at is None or self.place.is_voter:
            self._refused_at = now
        elif now - self._refused_at > 2 * self.settings.suspicion_s:
            self.fail(RefusedError(f"{sender} does not take this machine: {message.reason}", operation="join"))

    def _follow(self, sender: str, message: m.Propose, now: float) -> None:
        ledger, length = self.ledger, len(self.ledger.log)
        if message.term < self.place.term:
            self._acknowledge(sender, False, length)
            return
        self.election.learn_term(message.term, now)
        if self.leads:
            raise MessageError(f"{sender} claims to lead in term {message.term}, in which this machine leads")
        self._leader = None
        self.election.heard_leader(sender, now)
        if message.index > length or ledger.check(message.index) != message.check:
            if message.index <= ledger.committed:
                ledger.refuse_history(message.index)
            self._acknowledge(sender, False, length)
            return
        end = ledger.adopt(message.index, message.count, message.records)
        if end >= message.start and self.place.promise.log_term != message.term:
            ledger.truncate(end)
            self.place.promise_anew(log_term=message.term)
        ledger.commit_to(min(message.committed, end))
        if message.confirm:
            self._acknowledge(sender, True, end)
        lacks_ours = not message.count and not message.have
        self.work.notice()
        self._offer(now, self.settings.suspicion_s / 2 if lacks_ours else None)

    def _acknowledge(self, leader: str, ok: bool, length: int) -> None:
        ledger = self.ledger
        ack = m.Ack(self.place.term, self.place.slot, ok, length, ledger.check(length), ledger.committed)
        self.send(leader, ack)
