"""The start of a run among machines that no launcher has started: begin together, or enter what is under way."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from thinwire.comm.gossip.message import Kind, Message
from thinwire.comm.gossip.port import Port, Script, Wait
from thinwire.comm.rank_names import name_ranks
from thinwire.comm.wire import PayloadError

_STREAM = 1  # of JOIN_ASK, "here I am, and this is what I have", and of JOIN_ANSWER, "we are under way"


def begin(port: Port, step: int, facts: Mapping[str, bytes], *, deadline_s: float) -> Script[bool]:
    """Find out whether this machine begins with the others, or is to enter the run with a share of theirs.

    All tell one another how many steps they have taken, by their checkpoints. Those that have taken the most begin,
    the others enter; so does everyone if one answers that the run is under way.

    Args:
        step: optimizer steps that this machine has taken.
        facts: digests of 8 bytes of what must be equal, by name; the same names everywhere.
        deadline_s: how long an answer may take; a machine under way gives it at the end of a step.
    Returns: whether it begins; False: it has to enter.
    Raises:
        ValueError: this machine and others have different facts; names them.
    """
    others = [rank for rank in range(port.size) if rank != port.rank and rank not in port.lost()]
    payload = torch.frombuffer(bytearray(b"".join(facts.values())), dtype=torch.uint8)
    for rank in others:
        port.send(rank, Message(Kind.JOIN_ASK, step, stream=_STREAM, payload=payload))
    yield Wait(lambda: all(_has_spoken(port, rank) for rank in others), port.now() + deadline_s)
    odd: dict[str, list[int]] = {}
    steps = [step]
    under_way = bool(port.waiting(Kind.JOIN_ANSWER, _STREAM))
    for rank in port.waiting(Kind.JOIN_ANSWER, _STREAM):
        port.take(rank, Kind.JOIN_ANSWER, _STREAM)
    for rank in others:
        if port.peek(rank, Kind.JOIN_ASK, _STREAM) is None:
            continue
        theirs = port.take(rank, Kind.JOIN_ASK, _STREAM)
        if len(theirs.payload) != len(payload):
            raise PayloadError(f"a greeting of {len(theirs.payload)} bytes where {len(payload)} were expected")
        steps.append(theirs.round)
        told = theirs.payload.numpy().tobytes()
        for place, (name, digest) in enumerate(facts.items()):
            if told[8 * place : 8 * place + 8] != digest and (name != "weights" or not (step or theirs.round)):
                odd.setdefault(name, []).append(rank)
    if odd:
        listed = "; ".join(f"{name} of {name_ranks(ranks).replace('rank', 'machine')}" for name, ranks in odd.items())
        raise ValueError(
            f"method.machines: {listed} differ from those of this machine, {port.rank}; give the same configuration, "
            "data and weights to all, but for method.machines.rank and listen"
        )
    return not under_way and step == max(steps)


def tell_newcomers(port: Port, step: int) -> None:
    """Answer machines that have come since the run began, at the end of a step."""
    for rank in port.waiting(Kind.JOIN_ASK, _STREAM):
        while port.peek(rank, Kind.JOIN_ASK, _STREAM) is not None:
            port.take(rank, Kind.JOIN_ASK, _STREAM)
            port.send(rank, Message(Kind.JOIN_ANSWER, step, stream=_STREAM))


def _has_spoken(port: Port, rank: int) -> bool:
    greeted = port.peek(rank, Kind.JOIN_ASK, _STREAM) is not None
    return greeted or rank in port.lost() or port.peek(rank, Kind.JOIN_ANSWER, _STREAM) is not None
