"""A machine enters a run under way: another gives it its weights and half of its mass.

What is preserved, sum_i m_i z_i, and the sum of the masses stay exactly as they were: a donor that holds (m, z) has
(m/2, z) afterwards, and the machine that enters has (m/2, z). The mean of the weights that counts everybody by mass is
thus the one that would have been without it, and gossip evens out masses and weights from then on.

A donor answers at the end of a step, when nothing of its own is under way. A machine that is not answered in time asks
the next one; should both answer, it takes both: what it is given later is added to what it has.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thinwire.comm.errors import PeerLostError
from thinwire.comm.gossip.algorithm import Algorithm, SharesMass
from thinwire.comm.gossip.message import Kind, Message
from thinwire.comm.gossip.port import Port, Script, Wait
from thinwire.comm.gossip.replica import Replica
from thinwire.comm.wire import PayloadError

REFUSED = 1
"""Flag of JOIN_ANSWER: there is no share; the payload says why."""

_FACTS = struct.Struct("<Q")  # the last meeting; a multiple of 8 bytes, since the weights come after it
_REASON_BYTES = 1000
_REQUEST = struct.Struct("<QI")  # elements of the vector, bytes of each


@dataclass(frozen=True)
class Entry:
    """Where a machine enters.

    donor: who has given it its share. step: optimizer steps that the donor had taken. meeting: steps after which the
    last merge or cut before was due. mass: the share.
    """

    donor: int
    step: int
    meeting: int
    mass: float


def answer_joins(
    port: Port, replica: Replica, algorithm: Algorithm, *, step: int, meeting: int, joinable: bool = True
) -> Script[int]:
    """At the end of a step: give a share to each machine that asks, and take what was given to this one too late.

    Args:
        step, meeting: as Entry has them.
        joinable: whether the algorithm can do with machines that enter; if not, those who ask are told so.
    Returns: how many machines were given a share.
    Raises:
        PayloadError: what another machine sent is not what it should be.
    """
    if not port.waiting(Kind.JOIN_ASK) and not port.waiting(Kind.JOIN_ANSWER):
        return 0
    yield from algorithm.drain()
    for source in port.waiting(Kind.JOIN_ANSWER):
        while port.peek(source, Kind.JOIN_ANSWER) is not None:
            _add(replica, algorithm, port.take(source, Kind.JOIN_ANSWER))
    given = 0
    for source in port.waiting(Kind.JOIN_ASK):
        while port.peek(source, Kind.JOIN_ASK) is not None:
            ask = port.take(source, Kind.JOIN_ASK)
            if reason := _objection(ask, replica, algorithm, joinable):
                port.send(source, Message(Kind.JOIN_ANSWER, step, flags=REFUSED, payload=_text(reason)))
                continue
            assert isinstance(algorithm, SharesMass)
            weights = replica.weights().cpu()
            share = algorithm.mass / 2
            algorithm.hold(share)
            facts = torch.frombuffer(bytearray(_FACTS.pack(meeting)), dtype=torch.uint8)
            port.send(
                source, Message(Kind.JOIN_ANSWER, step, share, payload=torch.cat([facts, weights.view(torch.uint8)]))
            )
            given += 1
    return given


def enter(
    port: Port, replica: Replica, algorithm: Algorithm, *, deadline_s: float, donors: Sequence[int] | None = None
) -> Script[Entry]:
    """Ask for a share, and begin with it: afterwards this machine has weights and a mass.

    Args:
        algorithm: freshly made.
        deadline_s: how long one donor may take; it answers at the end of a step.
        donors: whom to ask, in this order; default: all, from the next rank on.
    Raises:
        PeerLostError: nobody has answered.
        ValueError: the run's algorithm cannot do with machines that enter, or its model is another one.
    """
    assert isinstance(algorithm, SharesMass)
    if donors is None:
        donors = [(port.rank + k) % port.size for k in range(1, port.size)]
    request = torch.frombuffer(bytearray(_REQUEST.pack(replica.numel, replica.dtype.itemsize)), dtype=torch.uint8)
    for donor in donors:
        if donor in port.lost():
            continue
        port.send(donor, Message(Kind.JOIN_ASK, 0, payload=request))
        until = port.now() + deadline_s
        yield Wait(_answered(port, donor), until)
        for source in port.waiting(Kind.JOIN_ANSWER):
            answer = port.take(source, Kind.JOIN_ANSWER)
            if answer.flags & REFUSED:
                reason = answer.payload[:_REASON_BYTES].numpy().tobytes().decode(errors="replace")
                raise ValueError(f"machine {source} does not let this one enter: {reason}")
            meeting, weights = _share(answer, replica)
            replica.set_weights(weights.to(replica.device))
            algorithm.hold(answer.mass)
            return Entry(source, answer.round, meeting, answer.mass)
    raise PeerLostError(
        f"gossip: no machine has given this one its weights within {deadline_s:g} s each; is the run under way?",
        operation="control/join",
        missing_ranks=list(donors),
    )


def _answered(port: Port, donor: int) -> Callable[[], bool]:
    return lambda: bool(port.waiting(Kind.JOIN_ANSWER)) or donor in port.lost()


def _objection(ask: Message, replica: Replica, algorithm: Algorithm, joinable: bool) -> str:
    if len(ask.payload) != _REQUEST.size:
        raise PayloadError(f"a request to enter of {len(ask.payload)} bytes; it has {_REQUEST.size}")
    numel, itemsize = _REQUEST.unpack(ask.payload.numpy().tobytes())
    if not joinable or not isinstance(algorithm, SharesMass):
        return (
            "method.algorithm keeps sums besides the weights that would no longer be right; use one such as dpsgd, or "
            "begin the run anew from a checkpoint with all machines"
        )
    if (numel, itemsize) != (replica.numel, replica.dtype.itemsize):
        return (
            f"its model has {numel} elements of {itemsize} bytes, the run's has {replica.numel} of "
            f"{replica.dtype.itemsize}: build the same model on all machines"
        )
    return ""


def _share(answer: Message, replica: Replica) -> tuple[int, Tensor]:
    expected = _FACTS.size + replica.numel * replica.dtype.itemsize
    if len(answer.payload) != expected:
        raise PayloadError(f"a share of {len(answer.payload)} bytes where {expected} were expected")
    if not 0.0 < answer.mass <= 1 << 20:
        raise PayloadError(f"a share with mass {answer.mass}")
    (meeting,) = _FACTS.unpack(answer.payload[: _FACTS.size].numpy().tobytes())
    return meeting, answer.payload[_FACTS.size :].view(replica.dtype)


def _add(replica: Replica, algorithm: Algorithm, answer: Message) -> None:
    """A second share: (m z + m' z') / (m + m')."""
    if answer.flags & REFUSED:
        return
    assert isinstance(algorithm, SharesMass)
    _, weights = _share(answer, replica)
    mass = algorithm.mass + answer.mass
    mine = replica.weights()
    replica.set_weights(mine.mul_(algorithm.mass / mass).add_(weights.to(mine.device), alpha=answer.mass / mass))
    algorithm.hold(mass)


def _text(reason: str) -> Tensor:
    return torch.frombuffer(bytearray(reason.encode()[:_REASON_BYTES]), dtype=torch.uint8)
