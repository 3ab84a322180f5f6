"""What this machine hands in: its contribution to the open round, and the hash of its weights at a snapshot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from thinwire.comm.onebyte.errors import ModelMismatchError
from thinwire.comm.onebyte.exchange import Turn
from thinwire.comm.onebyte.membership import messages as m
from thinwire.comm.onebyte.membership.frame import pack_frame
from thinwire.comm.onebyte.membership.ledger import Ledger
from thinwire.comm.onebyte.membership.messages import NO_SLOT
from thinwire.comm.onebyte.membership.place import Place
from thinwire.comm.onebyte.rounds import Round

_LATE_IN_A_ROW = 2
_NEVER = -1


class Seat(NamedTuple):
    """A turn, and the history that it is based on."""

    turn: Turn
    base: bytes


@dataclass
class _Contribution:
    """sent_term: the term whose leader was sent it."""

    seat: Seat
    codes: bytes
    rate: float
    sent_term: int = _NEVER
    sent_at: float = 0.0


class Work:
    """What this machine has done and the leader has still to hear of.

    Attributes:
        wanted_samples: asked for, if other than the roster's.
        committed, missed: rounds that were committed since the start, and those of them that came too early for it.
    """

    def __init__(self, place: Place, ledger: Ledger, secret: bytes, *, adapt_samples: bool) -> None:
        self.wanted_samples: int | None = None
        self.committed = self.missed = 0
        self._place, self._ledger, self._secret = place, ledger, secret
        self._adapt_samples = adapt_samples
        self._evaluating: Seat | None = None
        self._pending: _Contribution | None = None
        self._report: m.HashReport | None = None
        self._report_sent = self._rebuilt = False
        self._rounds = ledger.log.rounds
        self._late = 0

    def seat(self) -> Seat | None:
        """What to evaluate now; None while this machine takes no part, or has to do something else first."""
        member, ledger = self._place.member, self._ledger
        if member is None or not ledger.all_taken or ledger.snapshot_due:
            return None
        self._evaluating = Seat(Turn(ledger.log.rounds, member.slot, member.samples), ledger.base)
        return self._evaluating

    def contribute(self, seat: Seat, codes: bytes, rate: float) -> None:
        """Hand in what seat() asked for. Dropped if the history has moved on."""
        if seat.base == self._ledger.base:
            self._pending = _Contribution(seat, codes, rate)

    def is_open(self, seat: Seat) -> bool:
        """Whether the contribution for this seat is still waiting for its round to be decided."""
        return self._pending is not None and self._pending.seat == seat

    @property
    def contribution(self) -> tuple[bytes, float] | None:
        """Codes for the open round, and the rate."""
        pending = self._pending
        return (pending.codes, pending.rate) if pending and pending.seat.base == self._ledger.base else None

    @property
    def report(self) -> m.HashReport | None:
        """The hash of the weights, where a snapshot is due."""
        return self._report if self._report and self._report.rounds == self._ledger.snapshot_due else None

    @property
    def hash_due(self) -> int:
        """The number of rounds after which the weights' hash is wanted now; 0 if none is."""
        due = self._ledger.snapshot_due
        return due if due and self._ledger.all_taken and self._place.slot != NO_SLOT and self.report is None else 0

    def report_hash(self, rounds: int, model_hash: bytes) -> None:
        """Say what hash_due asked for."""
        if self._ledger.snapshot_due == rounds:
            self._report = m.HashReport(self._place.slot, rounds, model_hash)
            self._report_sent = False

    def rebuild(self, rounds: int) -> None:
        """Have the weights made anew, because no quorum agrees on them. Raises ModelMismatchError the second time."""
        if self._report is None or self.report is None or self._report.rounds != rounds:
            return
        if self._rebuilt:
            raise ModelMismatchError(
                f"after {rounds} rounds no quorum of machines has the same weights, though each has made its own anew "
                "from base and log. Their base models, their thinwire or their hardware differ: compare `thinwire "
                "onebyte verify` on each"
            )
        self._rebuilt = True
        self._report = None
        self._ledger.must_rebuild = True

    def send_again(self) -> None:
        """What was sent may be lost."""
        self._report_sent = False
        if self._pending:
            self._pending.sent_term = _NEVER

    def take_parcels(self, now: float, *, again_after_s: float | None = None) -> list[m.Control | bytes]:
        """What the leader of the newest term has not been sent yet.

        again_after_s: the leader says that it has nothing of this machine; repeat what was sent so many seconds ago.
        """
        place, ledger = self._place, self._ledger
        parcels: list[m.Control | bytes] = []
        if place.member is None or place.promise.log_term != place.term:
            return []
        if self.report is not None and (again_after_s is not None or not self._report_sent):
            self._report_sent = True
            parcels.append(self.report)
        pending = self._pending
        if pending is None:
            return parcels
        overdue = again_after_s is not None and now - pending.sent_at >= again_after_s
        if pending.sent_term != place.term or overdue:
            pending.sent_term, pending.sent_at = place.term, now
            parcels.append(
                pack_frame(
                    place.me.run,
                    pending.seat.turn.round,
                    ledger.roster.epoch,
                    place.slot,
                    pending.codes,
                    secret=self._secret,
                    term=place.term,
                    chain=ledger.log.chain(len(ledger.log)),
                )
            )
        return parcels

    def notice(self) -> None:
        """The log has grown or shrunk: drop what is decided or superseded."""
        ledger = self._ledger
        if self._report is not None and self._report.rounds != ledger.snapshot_due:
            self._report, self._report_sent, self._rebuilt = None, False, False
        if ledger.log.rounds != self._rounds:
            self.committed += max(0, ledger.log.rounds - self._rounds)
            self._rounds = ledger.log.rounds
            self._judge_lateness()
        if self._pending and self._pending.seat.base != ledger.base:
            self._pending = None

    def _judge_lateness(self) -> None:
        """Whether the round that this machine was working on has been decided without it."""
        seat, newest = self._evaluating, self._ledger.newest_round
        if seat is None or newest is None or newest.number != seat.turn.round:
            return
        self._evaluating = None
        if _has(newest, self._place.slot):
            self._late = 0
            return
        self.missed += 1
        self._late += 1
        if self._adapt_samples and self._late >= _LATE_IN_A_ROW and seat.turn.samples > 1:
            self._late = 0
            self.wanted_samples = seat.turn.samples // 2


def _has(round_: Round, slot: int) -> bool:
    return any(contribution.slot == slot for contribution in round_.contributions)
