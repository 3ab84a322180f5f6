"""What machines send to one another, apart from how it is carried."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

import torch
from torch import Tensor


class Kind(IntEnum):
    """What a message is part of. Messages of one kind and stream between two machines keep their order."""

    VALUE = 1  # a vector of a round, or word that there is none: mixer.py
    PUSH = 2  # push-sum
    SWAP_ASK = 3  # asynchronous pairs
    SWAP_ANSWER = 4
    MERGE = 5  # the global average
    PROBE = 6  # consensus distance
    END = 7  # the sender has taken its last step
    JOIN_ASK = 8  # a machine enters a run that is under way
    JOIN_ANSWER = 9
    SAMPLE = 10  # MoDeST
    BARRIER = 11


SKIPPED = 1
"""Flag: the sender takes no part in this round on this edge; a payload, if any, only keeps a codec's memory in step."""

NON_FINITE = 2
"""Flag beside SKIPPED: the sender's vector has a NaN or an infinity, so nothing of it was sent, nor encoded."""

LACKS = 4
"""Flag beside SKIPPED: the sender lacks what the receiver's payloads are differences to."""

MEETING_STREAM = 63
"""Stream of BARRIER: "we meet now", where machines keep no common step."""


def no_payload() -> Tensor:
    return torch.empty(0, dtype=torch.uint8)


@dataclass(frozen=True, slots=True)
class Message:
    """One message.

    Args:
        round: a number that both ends agree on, 0..2^64-1.
        mass: push-sum weight that belongs to the payload; its meaning is the kind's.
        stream: tells several vectors of one kind apart, 0..65535.
        flags: 0, SKIPPED alone or with NON_FINITE or LACKS, or bits of the kind's own.
        payload: uint8, one-dimensional, on the CPU; never changed after it was handed over.
    """

    kind: Kind
    round: int
    mass: float = 0.0
    stream: int = 0
    flags: int = 0
    payload: Tensor = field(default_factory=no_payload)
