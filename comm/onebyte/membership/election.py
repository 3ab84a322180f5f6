"""Who leads: noticing a leader's silence, standing for election, and voting."""

from __future__ import annotations

import random
from collections.abc import Callable

from thinwire.comm.onebyte.membership import messages as m
from thinwire.comm.onebyte.membership.ledger import Ledger
from thinwire.comm.onebyte.membership.messages import NO_SLOT
from thinwire.comm.onebyte.membership.place import Place
from thinwire.comm.onebyte.membership.settings import MembershipSettings
from thinwire.comm.onebyte.rounds import Member


class Election:
    """A machine's part in elections.

    Before it stands, a machine asks whether it would be elected: one that was cut off does not disturb a leader whom
    the others hear. Whoever hears a leader votes for nobody.

    Attributes:
        leader: the address of the leader that this machine follows, if it knows one.
        leads: this machine was elected.
        won: how often it was.
    """

    def __init__(
        self,
        place: Place,
        ledger: Ledger,
        settings: MembershipSettings,
        send: Callable[[str, m.Control], None],
        chance: random.Random,
        now: float,
    ) -> None:
        self.leader: str | None = None
        self.leads = False
        self.won = 0
        self._place, self._ledger, self._settings = place, ledger, settings
        self._send, self._chance = send, chance
        self._heard = now
        self._lost = False
        self._votes: set[int] = set()
        self._asking = False
        self._stand_at = now
        self.put_off(now)

    def hears_leader(self, now: float) -> bool:
        """Whether somebody leads, as far as this machine can tell."""
        if self.leads:
            return True
        return self.leader is not None and not self._lost and now - self._heard < self._settings.suspicion_s

    def heard_leader(self, address: str, now: float) -> None:
        """A sign of life of the leader of the newest term."""
        self.leader, self._heard, self._lost = address, now, False
        self._votes = set()
        self.put_off(now)

    def lost_leader(self, now: float) -> None:
        """The leader's connection broke, or it has resigned."""
        self._lost = True
        self._stand_at = min(self._stand_at, now + self._chance.uniform(0.1, 1.0) * self._settings.heartbeat_s)

    def put_off(self, now: float, patience_s: float = 0.0) -> None:
        """Do not stand before a while has passed, which differs from machine to machine."""
        self._stand_at = now + patience_s + self._chance.uniform(1.0, 2.0) * self._settings.suspicion_s

    def tick(self, now: float) -> None:
        """Stand where it is time to."""
        if not self.leads and self._place.is_voter and now >= self._stand_at:
            self._stand(now, asking=True)

    def win(self) -> None:
        """Lead in the newest term. This machine's log is the leader's."""
        self._votes = set()
        self._place.promise_anew(log_term=self._place.term)
        self.leads, self.leader, self.won = True, None, self.won + 1

    def step_down(self, now: float, patience_s: float = 0.0) -> None:
        """Lead no longer."""
        self.leads, self.leader, self._lost = False, None, True
        self.put_off(now, patience_s)

    def learn_term(self, term: int, now: float) -> None:
        """There is a newer term."""
        if term > self._place.term:
            self._place.promise_anew(term=term, vote=NO_SLOT)
            self._votes = set()
            self.leader = None
            if self.leads:
                self.step_down(now)

    def answer(self, sender: str, request: m.VoteRequest, now: float) -> None:
        """Vote, or say who leads."""
        place, hears = self._place, self.hears_leader(now)
        own = (place.promise.log_term, len(self._ledger.log))
        could = (request.log_term, request.length) >= own and not hears and place.slot != NO_SLOT
        if request.asking:
            granted = could and request.term > place.term
            if granted and not self._votes:
                self._stand_at = max(self._stand_at, now + self._moment())  # rather than to split the vote
        else:
            if not hears:
                self.learn_term(request.term, now)
            granted = could and request.term == place.term and place.promise.vote in (NO_SLOT, request.slot)
            if granted:
                place.promise_anew(vote=request.slot)
                self.put_off(now)
        term = request.term if granted else place.term
        self._send(sender, m.Vote(term, place.slot, request.asking, granted, place.me.name))
        if hears:
            self._send(sender, m.Hint(place.term, self.leader or place.me.address))

    def take_vote(self, vote: m.Vote, now: float) -> None:
        """Count a vote. It may make this machine the leader."""
        if not vote.granted:
            self.learn_term(vote.term, now)
        elif self._votes and vote.asking == self._asking and vote.term == self._place.term + self._asking:
            self._votes |= {r.slot for r in self._others() if (r.slot, r.name) == (vote.slot, vote.name)}
            self._count(now)

    def _stand(self, now: float, *, asking: bool) -> None:
        place = self._place
        self._stand_at = now + self._moment()
        self.leader = None
        self._asking = asking
        self._votes = {place.slot}
        if not asking:
            place.promise_anew(term=place.term + 1, vote=place.slot)
        request = m.VoteRequest(place.term + asking, place.slot, asking, place.promise.log_term, len(self._ledger.log))
        for address in dict.fromkeys(r.address for r in self._others()):
            self._send(address, request)
        self._count(now)

    def _moment(self) -> float:
        """Seconds until the next attempt to elect somebody: more than a round trip, and not the same everywhere."""
        return self._chance.uniform(0.5, 2.0) * self._settings.heartbeat_s

    def _count(self, now: float) -> None:
        if self._place.is_voter and self._ledger.has_quorum(self._votes):
            if self._asking:
                self._stand(now, asking=False)
            else:
                self.win()

    def _others(self) -> list[Member]:
        rosters = self._ledger.rosters_in_force
        return [r for roster in rosters for r in roster.members if r.slot != self._place.slot]
