"""Steps in virtual time: the program of a step, carried out on all ranks at once.

Each rank does the operations of its program in their order, and an exchange begins when the last of its ranks has come
and its queue is free there. So the time of every event follows from those of earlier operations by + and max alone, and
taking the operations one by one, for all ranks together, meets the events in an order that respects every cause: no
heap of events is needed, and tens of thousands of ranks are one array. (Baccelli et al. 1992, Synchronization and
Linearity: a timed event graph is linear in max and +.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from thinwire.dist.cluster_simulation.disturbances import Disturbances
from thinwire.dist.cluster_simulation.neighbours import ROUND, Sources
from thinwire.dist.cluster_simulation.ranks import Ranks, Times
from thinwire.dist.plan.program import Meet, Program, Send, Wait, Work
from thinwire.dist.plan.timeline import computed


@dataclass(frozen=True)
class StepOutcome:
    """One step, for each simulated rank in seconds.

    ended_s: since the run began. computed_s: of computing. others_s: waited because others had not come yet; wire_s:
    waited for what was on the wire.
    """

    ended_s: Times
    computed_s: Times
    others_s: Times
    wire_s: Times


@dataclass(frozen=True)
class _Begun:
    """An exchange. late_s: that it waited for others after it could have begun here; end_s: when it ends."""

    late_s: Times
    end_s: Times


class Steps:
    """The steps of a run, one after another.

    Args:
        program: of a step, the same on every rank.
        ranks: that are simulated.
        disturbances: what makes them differ.
        sources: whose messages each rank awaits in the exchanges of a step; None: all in the group of the level.
        lost_after_s: for how long others wait for a rank that has failed, before they go on without it; None: ranks do
            not fail here.
    """

    def __init__(
        self,
        program: Program,
        ranks: Ranks,
        disturbances: Disturbances,
        *,
        sources: Sources | None = None,
        lost_after_s: float | None = None,
    ) -> None:
        self._program = program
        self._ranks = ranks
        self._disturbances = disturbances
        self._sources = sources
        self._lost_after_s = lost_after_s
        never = np.full(len(ranks), math.inf)
        self._failing_s = never if lost_after_s is None else disturbances.failing_s(ranks)
        self._step = 0
        self._now: Times = np.zeros(len(ranks))
        self._free: dict[str, Times] = {}
        self._begun: dict[int, _Begun] = {}  # by slot
        self._busy: list[tuple[Times, Times, float]] = []  # begin, end, share of the processor
        self.alive: NDArray[np.bool_] = np.ones(len(ranks), dtype=bool)

    def next(self) -> StepOutcome:
        """Carry out one more."""
        count = len(self._ranks)
        factors = self._disturbances.factors(self._ranks, self._step)
        began = np.where(self.alive, self._now, 0.0)
        others, wire = np.zeros(count), np.zeros(count)
        self._busy, met = [], False
        self.alive &= self._now < self._failing_s
        for operation in self._program.operations:
            match operation:
                case Work(seconds):
                    self._compute(seconds * factors)
                case Send() if operation.comes(self._step):
                    met |= self._send(operation) and not operation.beside
                case Wait(slot) if slot in self._begun:
                    begun = self._begun.pop(slot)
                    waited = np.maximum(begun.end_s - self._now, 0.0)
                    for_others = np.minimum(waited, begun.late_s)
                    others += for_others
                    wire += waited - for_others
                    self._now = np.maximum(self._now, begun.end_s)
                case Meet(seconds) if met:
                    others += seconds
                    self._now = self._now + seconds
        self._step += 1
        return StepOutcome(self._now, self._now - began - others - wire, others, wire)

    def _compute(self, seconds: Times) -> None:
        if not self._busy:
            self._now = self._now + seconds
            return
        ends = []
        for rank, (now, took) in enumerate(zip(self._now, seconds, strict=True)):
            busy = [(float(begin[rank]), float(end[rank]), share) for begin, end, share in self._busy]
            ends.append(computed(float(now), float(took), busy))
        self._now = np.array(ends)

    def _send(self, send: Send) -> bool:
        """Whether there is such an exchange in this step."""
        ready = self._now
        late: Times = np.zeros(len(ready))
        for times in (self._free.get(send.queue), *(self._begun[s].end_s for s in send.after if s in self._begun)):
            ready = ready if times is None else np.maximum(ready, times)
        for slot in send.after:
            late = late + (self._begun[slot].late_s if slot in self._begun else 0.0)
        if self._sources is not None and send.operation == ROUND:
            sources = self._sources(self._step)
            if sources is not None:
                self._send_to_neighbours(send, ready, sources)
            return sources is not None
        begin = ready if send.level is None else np.maximum(ready, self._ranks.latest(self._come(ready), send.level))
        end = begin + send.seconds
        self._free[send.queue] = end
        self._begun[send.slot] = _Begun(late + begin - ready, end)
        self._occupy(send, begin, end)
        return True

    def _send_to_neighbours(self, send: Send, ready: Times, sources: NDArray[np.int64]) -> None:
        """Each rank goes on when its neighbours' messages are there; its own take until then, or longer."""
        own = np.arange(len(ready))[:, None]
        sent = ready + send.seconds * (sources != own).any(axis=1)
        self._free[send.queue] = sent
        # Rows are filled up with the rank itself, for which nobody waits.
        end = np.where(sources == own, self._now[:, None], self._come(sent)[sources]).max(axis=1)
        end = np.maximum(self._now, end)
        begin = np.where(sources == own, self._now[:, None], self._come(ready)[sources]).max(axis=1)
        self._begun[send.slot] = _Begun(np.maximum(0.0, begin - self._now), end)
        self._occupy(send, ready, sent)

    def _occupy(self, send: Send, begin: Times, end: Times) -> None:
        """Computing meanwhile has only what is left of the processor."""
        if send.taken_s and send.seconds:
            self._busy.append((begin, end, min(1.0, send.taken_s / send.seconds)))

    def _come(self, times: Times) -> Times:
        """For those who have failed, when the others give up waiting."""
        if self._lost_after_s is None:
            return times
        return np.where(self.alive, times, self._failing_s + self._lost_after_s)
