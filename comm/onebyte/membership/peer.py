"""What a leader knows of another machine."""

from __future__ import annotations

from dataclasses import dataclass

from thinwire.comm.onebyte.membership import messages as m
from thinwire.comm.onebyte.membership.messages import NO_SLOT

SILENT = float("-inf")
"""A moment before all others."""


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
    sent: float = SILENT
    probing: bool = True
    late: bool = False
    join: m.Join | None = None
    assigned: int = NO_SLOT

    def claim(self, slot: int) -> None:
        """The machine at this address says that it has this slot. What another one there held says nothing of it."""
        if slot != self.slot:
            self.slot, self.match = slot, 0
