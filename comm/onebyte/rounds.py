"""What a run is made of: the records of its log."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

SHARED_SLOT = 65535
"""The slot of directions that all machines share."""


@dataclass(frozen=True)
class Contribution:
    """What one machine measured in a round: code number i is the slope along the direction of its sample i."""

    slot: int
    codes: bytes


@dataclass(frozen=True)
class Round:
    """A committed set of contributions, by ascending slot. rate: the learning rate, an fp32 number."""

    number: int
    rate: float
    contributions: tuple[Contribution, ...]


@dataclass(frozen=True)
class Member:
    """A machine that takes part: its slot, its name, where it listens ("" in a fixed job), directions per round."""

    slot: int
    name: str
    address: str
    samples: int


@dataclass(frozen=True)
class Roster:
    """Who takes part from here on, by ascending slot. Every roster of a run has an epoch of its own, counted up."""

    epoch: int
    members: tuple[Member, ...]


@dataclass(frozen=True)
class Snapshot:
    """The SHA-256 of the weights after `rounds` rounds and what is done at a snapshot."""

    rounds: int
    model_hash: bytes


Record: TypeAlias = Round | Roster | Snapshot
