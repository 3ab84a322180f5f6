"""This machine's place in the run: who it is, what it has promised, and whether the roster has it."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from thinwire.comm.onebyte.membership.ledger import Ledger
from thinwire.comm.onebyte.membership.messages import NO_SLOT
from thinwire.comm.onebyte.membership.promise import PromiseStore
from thinwire.comm.onebyte.rounds import Member


class Me(NamedTuple):
    """This machine. run: first 8 bytes of the manifest's SHA-256. base_hash: of the base model's weights."""

    name: str
    address: str
    run: bytes
    base_hash: bytes


class Place:
    """What this machine is to the others, by its own log and promise."""

    def __init__(self, me: Me, ledger: Ledger, promises: PromiseStore) -> None:
        self.me = me
        self.promise = promises.load()
        self._ledger = ledger
        self._promises = promises
        if not len(ledger.log) and self.slot != NO_SLOT:
            # What it had acknowledged is gone, or it was assigned a slot and had no log yet: a new machine either way.
            self.promise_anew(slot=NO_SLOT, log_term=0)

    @property
    def slot(self) -> int:
        """This machine's slot, or NO_SLOT."""
        return self.promise.slot

    @property
    def term(self) -> int:
        """The newest that this machine knows of."""
        return self.promise.term

    @property
    def member(self) -> Member | None:
        """This machine's entry in the newest roster."""
        return next((r for r in self._ledger.roster.members if self._is_mine(r)), None)

    @property
    def is_voter(self) -> bool:
        """Whether this machine's vote may count."""
        return any(self._is_mine(r) for roster in self._ledger.rosters_in_force for r in roster.members)

    @property
    def is_at_home(self) -> bool:
        """Whether the newest roster has this machine, with the address at which it listens."""
        member = self.member
        return member is not None and member.address == self.me.address

    def promise_anew(self, **changes: int) -> None:
        """Change fields of the promise; safe on disk when this returns."""
        promise = replace(self.promise, **changes)
        if promise != self.promise:
            self._promises.save(promise)
            self.promise = promise

    def _is_mine(self, member: Member) -> bool:
        return member.slot == self.slot and member.name == self.me.name
