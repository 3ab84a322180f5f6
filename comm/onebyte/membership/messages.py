"""What machines say to each other, beside contributions. `slot`: the sender's, NO_SLOT while it has none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

NO_SLOT = 65535
NOT_PROVEN = 0xFFFFFFFF


@dataclass(frozen=True)
class Propose:
    """The leader's records from `index` on, in the log's own bytes; without records, a sign of life.

    check: first bytes of the chain hash of the records before. start: length of the leader's log when it was elected.
    committed: how many records are. confirm: acknowledge at once, not with the next contribution. have: the leader has
    this member's contribution to the open round.
    """

    term: int
    index: int
    check: bytes
    start: int
    committed: int
    confirm: bool
    have: bool
    count: int
    records: bytes


@dataclass(frozen=True)
class Ack:
    """The sender holds the first `length` records as the leader does; or (not ok) has this log and cannot follow."""

    term: int
    slot: int
    ok: bool
    length: int
    check: bytes
    committed: int


@dataclass(frozen=True)
class VoteRequest:
    """Elect me in `term`? asking: would you, if I stood? log_term, length: how much history the sender holds."""

    term: int
    slot: int
    asking: bool
    log_term: int
    length: int


@dataclass(frozen=True)
class Vote:
    """The answer. It counts for the machine with this slot and this name."""

    term: int
    slot: int
    asking: bool
    granted: bool
    name: str


@dataclass(frozen=True)
class Join:
    """Let me take part, or go on. The weights after `proof_rounds` rounds have the SHA-256 `proof`."""

    slot: int
    samples: int
    proof_rounds: int
    proof: bytes
    name: str


@dataclass(frozen=True)
class Assign:
    """Your slot, once a roster has it."""

    slot: int


@dataclass(frozen=True)
class Hint:
    """Who leads in `term`."""

    term: int
    address: str


@dataclass(frozen=True)
class Refuse:
    """You cannot take part, for this reason."""

    reason: str


@dataclass(frozen=True)
class Leave:
    """Go on without me."""

    slot: int


@dataclass(frozen=True)
class Samples:
    """Give me so many samples per round from here on."""

    slot: int
    samples: int


@dataclass(frozen=True)
class HashReport:
    """My weights after `rounds` rounds."""

    slot: int
    rounds: int
    model_hash: bytes


@dataclass(frozen=True)
class Rebuild:
    """No quorum agrees on the weights after `rounds` rounds: make yours anew from base and log, and report again."""

    rounds: int


@dataclass(frozen=True)
class Resign:
    """The sender leads no longer in `term`."""

    term: int


Control: TypeAlias = (
    Propose | Ack | VoteRequest | Vote | Join | Assign | Hint | Refuse | Leave | Samples | HashReport | Rebuild | Resign
)
