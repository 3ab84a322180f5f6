"""Which machines together may decide."""

from __future__ import annotations

from collections.abc import Collection

from thinwire.comm.onebyte.rounds import Roster


def is_quorum(slots: Collection[int], roster: Roster) -> bool:
    """Whether `slots` hold a strict majority of the roster, or exactly half of it with its lowest slot, the senior.

    Any two quorums of one roster share a member. Two machines survive the death of the junior, not of the senior.
    """
    have = sum(member.slot in slots for member in roster.members)
    if 2 * have == len(roster.members) and have:
        return roster.members[0].slot in slots
    return 2 * have > len(roster.members)
