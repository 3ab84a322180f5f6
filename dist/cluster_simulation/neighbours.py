"""Whose messages each machine of a gossip run awaits at a step, in place of those of a whole level."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from thinwire.comm.gossip.build import make_plan
from thinwire.comm.gossip.mixing import Mixing
from thinwire.comm.gossip.settings import GossipSettings
from thinwire.dist.plan.program import Operation, Program, Send, Wait

if TYPE_CHECKING:
    from thinwire.dist.config import RunConfig

ROUND = "gossip"  # the exchange with the neighbours of a round, as comm/gossip/forecast.py names it
_WITH_ALL = "gossip/merge"

Sources = Callable[[int], "NDArray[np.int64] | None"]
"""For a step a row for each rank: those whose messages it awaits, filled up with itself; None: no exchange."""


def sources_of(config: RunConfig, size: int, numel: int) -> Sources | None:
    """Those of a run; None where nobody awaits neighbours. See sources_of_settings()."""
    if not isinstance(config.method, GossipSettings):
        return None
    return sources_of_settings(config.method, size, numel, steps=config.train.steps)


def sources_of_settings(settings: GossipSettings, size: int, numel: int, *, steps: int) -> Sources | None:
    """Those of a graph and a schedule; None where machines keep their own pace, and await nobody.

    Args:
        size: machines. numel: elements of a machine's weights. steps: of the run.
    Raises:
        ValueError: graph, algorithm and schedule do not fit together, or not so many machines.
    """
    if not (settings.algorithm.in_rounds and settings.algorithm.uses_graph):
        return None
    plan = make_plan(settings, size, steps=steps, numel=numel)
    period = plan.graph.period
    known: dict[int, NDArray[np.int64]] = {}

    def sources(step: int) -> NDArray[np.int64] | None:
        turn = plan.schedule.turn(step % steps)
        if turn.mixing is None:
            return None
        key = turn.round % period if period else turn.round
        if key not in known:
            if not period:
                known.clear()
            known[key] = _rows(turn.mixing)
        return known[key]

    return sources


def with_neighbours(program: Program) -> Program:
    """A gossip run's program: one exchange for a round, whatever the round's edges are, and nobody awaits the others.

    The forecast has an exchange for each kind of round that one rank meets, with its share of the steps; here the
    schedule says at which steps there is one, and the mean of these is what it costs. Swaps at one's own pace, probes
    and samples hold nobody up; for a merge all must come.
    """
    sends = [operation for operation in program.operations if isinstance(operation, Send)]
    rounds = [send for send in sends if send.operation == ROUND]
    share = sum(send.per_step for send in rounds)
    mean_s = sum(send.per_step * send.seconds for send in rounds) / share if share else 0.0
    dropped = {send.slot for send in rounds[1:]}
    operations: list[Operation] = []
    for operation in program.operations:
        match operation:
            case Send(slot=slot) | Wait(slot) if slot in dropped:
                continue
            case Send(operation=name) if name == ROUND:
                operations.append(replace(operation, seconds=mean_s, per_step=1.0))
            case Send(operation=name) if name != _WITH_ALL:
                operations.append(replace(operation, level=None))
            case _:
                operations.append(operation)
    return replace(program, operations=tuple(operations))


def _rows(mixing: Mixing) -> NDArray[np.int64]:
    sources = [mixing.sources(rank) for rank in range(mixing.size)]
    most = max(map(len, sources))
    return np.array([[*those, *[rank] * (most + 1 - len(those))] for rank, those in enumerate(sources)])
