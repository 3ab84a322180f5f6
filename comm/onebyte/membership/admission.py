"""Who may take part: the leader's answers to those who come, move, ask for less, stay away or leave."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from thinwire.comm.onebyte.membership import messages as m
from thinwire.comm.onebyte.membership.messages import NO_SLOT
from thinwire.comm.onebyte.membership.peer import Peer
from thinwire.comm.onebyte.rounds import Member, Roster

if TYPE_CHECKING:
    from thinwire.comm.onebyte.membership.core import Core

_RECENT_SNAPSHOTS = 8  # a newcomer proves itself at the newest that it has seen, while the others go on


class Admission:
    """What should change in the roster.

    Attributes: leaving: slots of those who asked to. wanted: samples per round that members asked for, by slot.
    """

    def __init__(self, core: Core, peers: dict[str, Peer]) -> None:
        self.leaving: set[int] = set()
        self.wanted: dict[int, int] = {}
        self._core, self._peers = core, peers
        self._ledger, self._settings = core.ledger, core.settings
        self._missed: Counter[int] = Counter()
        self._assigned: dict[str, int] = {}

    def take_join(self, sender: str, join: m.Join, now: float) -> bool:
        """A machine wants to take part, or to go on. Returns whether it may."""
        core, ledger = self._core, self._ledger
        same_name = next((r for r in ledger.roster.members if r.name == join.name), None)
        if same_name and (same_name.slot != join.slot or same_name.address != sender):
            holder = self._peers.get(same_name.address)
            if same_name.address == core.place.me.address or (
                same_name.address != sender and holder and now - holder.heard < self._settings.suspicion_s
            ):
                core.send(sender, m.Refuse(f"another machine is called {join.name!r}: give it another `name`"))
                return False
        slot = self._slot_for(sender, join)
        if slot is None:
            core.send(sender, m.Refuse("the run has had 65535 machines, and there is no slot left"))
            return False
        peer = self._peers.setdefault(sender, Peer(sender, join.slot, len(ledger.log), now))
        peer.heard = now
        peer.claim(join.slot)
        at_home = any((r.slot, r.name, r.address) == (slot, join.name, sender) for r in ledger.roster.members)
        peer.join, peer.assigned = (None, NO_SLOT) if at_home else (join, slot)
        if join.slot != slot:
            core.send(sender, m.Assign(slot))
        return True

    def count_round(self, slot: int, *, missed: bool) -> None:
        """A round was closed, with or without this member."""
        self._missed[slot] = self._missed[slot] + 1 if missed else 0

    def settle(self, roster: Roster) -> None:
        """A roster was proposed: those who are in it as they wished have nothing more to wish for."""
        self.wanted = {}
        members = {r.slot: r for r in roster.members}
        for peer in self._peers.values():
            member = members.get(peer.assigned)
            if peer.join and member and (member.name, member.address) == (peer.join.name, peer.address):
                peer.join, peer.assigned = None, NO_SLOT

    def changed_roster(self, now: float) -> Roster | None:
        """The roster to propose; None where the present one is as it should be."""
        ledger = self._ledger
        old = {r.slot: r for r in ledger.roster.members}
        new = dict(old)
        for address, peer in self._peers.items():
            join = peer.join
            if join is None or join.slot != peer.assigned or now - peer.heard > self._settings.suspicion_s:
                continue
            mine = peer.assigned
            if mine in old:  # it has moved
                new[mine] = replace(old[mine], address=address)
            elif self._is_proven(join) and peer.match >= ledger.committed - 1:
                for slot, member in old.items():  # whoever listened there, or had that name, is no more
                    if address == member.address or join.name == member.name:
                        new.pop(slot, None)
                new[mine] = Member(mine, join.name, address, join.samples)
            self._missed[mine] = 0
        for slot, samples in self.wanted.items():
            if slot in new:
                new[slot] = replace(new[slot], samples=samples)
        for slot in old:
            gone = self._missed[slot] >= self._settings.remove_after and slot != self._core.place.slot
            if slot in self.leaving or gone:
                new.pop(slot, None)
        self.leaving &= old.keys()
        if new == old or not new:
            self._core.left |= not new
            return None
        return Roster(ledger.roster.epoch + 1, tuple(new[slot] for slot in sorted(new)))

    def _is_proven(self, join: m.Join) -> bool:
        snapshots = self._ledger.newest_snapshots(_RECENT_SNAPSHOTS)
        if not snapshots:
            return (join.proof_rounds, join.proof) == (0, self._core.place.me.base_hash)
        return any((join.proof_rounds, join.proof) == (s.rounds, s.model_hash) for s in snapshots)

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
