"""When to talk: which steps end with an exchange, over which edges, and when all merge.

Steps are counted from 1 in the settings: `merge_at: 600` merges after the 600th step. A round is `every` steps and the
exchange after them, if there is one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, model_validator

from thinwire.comm.gossip.budget import Budget, BudgetSettings
from thinwire.comm.gossip.graphs.sequence import Repeating
from thinwire.comm.gossip.graphs.thin import thinned
from thinwire.comm.gossip.graphs.weights import complete_mixing
from thinwire.comm.gossip.mixing import Graph
from thinwire.comm.gossip.spacing import Spread
from thinwire.comm.gossip.turn import Schedule, Turn
from thinwire.comm.settings import Settings

MergeAt: TypeAlias = Literal["end"] | Annotated[int, Field(gt=0)]


class EverySettings(Settings):
    """`schedule: {kind: every, steps: 10}`: all edges of the graph's round, after every so many steps.

    merge_at: null; the step after which all take the global average, or end.
    """

    kind: Literal["every"] = "every"
    steps: int = Field(1, gt=0)
    merge_at: MergeAt | None = None


class RandomSettings(Settings):
    """`schedule: {kind: random, probability: 0.2}`: after every so many steps, each edge with this probability.

    every: steps of a round. merge_at: null; the step after which all take the global average, or end.
    """

    kind: Literal["random"] = "random"
    probability: float = Field(0.2, gt=0, le=1)
    every: int = Field(1, gt=0)
    merge_at: MergeAt | None = None


class WindowSettings(Settings):
    """`window: {rounds: 8}`: rounds in which all edges take part.

    start: the round with which it begins, 0 being the first; end: it ends with the rounds.
    graph: same, or complete: everybody with everybody.
    """

    rounds: int = Field(gt=0)
    start: Literal["end"] | Annotated[int, Field(ge=0)] = "end"
    graph: Literal["same", "complete"] = "same"


class SingleMergeSettings(Settings):
    """`schedule: {kind: single_merge, probability: 0.2}`: little contact, and one global average.

    2507.06542 (Zhu et al., "On the Surprising Effectiveness of a Single Global Merging in Decentralized Learning").
    There each machine pulls from a random one with this probability; here each edge of the graph's round takes part
    with it, for both ends alike, so the mean is preserved. Some contact is needed all along: the weights of machines
    that never meet can hardly be merged.

    probability: of each edge, in each round. every: steps of a round.
    merge_at: the step after which all take the global average, or end.
    window: rounds in which all edges take part, or null.
    """

    kind: Literal["single_merge"] = "single_merge"
    probability: float = Field(0.2, ge=0, le=1)
    every: int = Field(1, gt=0)
    merge_at: MergeAt = "end"
    window: WindowSettings | None = None

    @model_validator(mode="after")
    def _talks(self) -> SingleMergeSettings:
        if self.probability == 0 and self.window is None:
            raise ValueError(
                "method.schedule.probability is 0 and there is no window, so machines would meet only when they merge; "
                "their weights can then hardly be averaged: set a probability such as 0.05, or a window"
            )
        return self


EachSchedule: TypeAlias = EverySettings | RandomSettings | SingleMergeSettings | BudgetSettings


def from_name(given: Any) -> Any:
    """Settings of a kind with its defaults, where only its name is given."""
    return {"kind": given} if isinstance(given, str) else given


GossipScheduleSettings: TypeAlias = Annotated[EachSchedule, Field(discriminator="kind"), BeforeValidator(from_name)]
"""Settings of any schedule, by `kind`; a string is the kind with its defaults."""


@dataclass(frozen=True)
class Segment:
    """Some rounds in a row, of which some have an exchange.

    spread: which rounds. graph: its mixing of the n-th exchange is that of the n-th exchange of the run.
    """

    spread: Spread
    graph: Graph


class Rounds:
    """Schedule of rounds of equal length.

    Args:
        every: steps of a round.
        segments: one after another, from round 0 on; after the last one nothing happens.
        merge_step: how many steps are taken before the merge; None: never. A round that ends there has no exchange,
            unless merge_too says so: the merge does what it would do.
    """

    def __init__(self, every: int, segments: list[Segment], merge_step: int | None, *, merge_too: bool = False) -> None:
        self.every = every
        self.segments = segments
        self.merge_step = merge_step
        self._merge_too = merge_too

    def turn(self, step: int) -> Turn:
        """As Schedule says."""
        done = step // self.every  # rounds that have ended
        number = sum(segment.spread.before(done) for segment in self.segments)
        merge = step + 1 == self.merge_step
        if (step + 1) % self.every == 0 and (self._merge_too or not merge):
            for segment in self.segments:
                if segment.spread.has(done):
                    return Turn(step, number, segment.graph.mixing(number), merge)
        return Turn(step, number, None, merge)


def build_schedule(
    settings: EachSchedule, graph: Graph, steps: int | None, seed: int, cost_bytes: int | None = None
) -> Schedule:
    """The schedule of a run; the same on every machine.

    Args:
        graph: its rounds.
        steps: optimizer steps of the run; None: unknown, for schedules whose exchanges do not depend on it. A merge at
            the end is then not scheduled.
        seed: of what is drawn, 0..2^64-1.
        cost_bytes: payload bytes of one machine's vector for one neighbour; None: unknown, for schedules other than
            `budget`.
    Raises:
        ValueError: a merge or a window lies past the end, or a budget buys nothing.
    """
    if isinstance(settings, BudgetSettings):
        if steps is None:
            raise ValueError(
                "method.schedule.kind: budget divides a run's bytes among its steps: say how many with steps="
            )
        if cost_bytes is None:
            raise ValueError(
                "method.schedule.kind: budget needs an algorithm whose messages are all of one length; choose another "
                "schedule, such as {kind: random, probability: 0.2}"
            )
        budget = Budget(settings, graph, steps, cost_bytes)
        return Rounds(settings.every, [Segment(spread, graph) for spread in budget.spreads()], budget.merge_step)
    merge_step = _merge_step(settings.merge_at, steps)
    if isinstance(settings, EverySettings):
        return Rounds(settings.steps, [Segment(Spread(0, None), graph)], merge_step, merge_too=True)
    sparse = thinned(graph, settings.probability, seed)
    window = settings.window if isinstance(settings, SingleMergeSettings) else None
    if window is None:
        return Rounds(settings.every, [Segment(Spread(0, None), sparse)], merge_step)
    start, end = _window(window, settings.every, steps)
    dense = graph if window.graph == "same" else Repeating("complete", [complete_mixing(graph.size)])
    segments = [
        Segment(Spread(0, start), sparse),
        Segment(Spread(start, end), dense),
        Segment(Spread(end, None), sparse),
    ]
    return Rounds(settings.every, segments, merge_step)


def _merge_step(merge_at: Literal["end"] | int | None, steps: int | None) -> int | None:
    if merge_at == "end":
        return steps
    if merge_at is not None and steps is not None and merge_at > steps:
        raise ValueError(
            f"method.schedule.merge_at: {merge_at} lies past the end of the run, which has {steps} steps; allowed is 1 "
            f"to {steps}, or end"
        )
    return merge_at


def _window(window: WindowSettings, every: int, steps: int | None) -> tuple[int, int]:
    """Its first round, and the one after its last."""
    if steps is None:
        if window.start == "end":
            raise ValueError(
                "method.schedule.window.start: end, but nobody has said where the run ends: give steps=, or the "
                "number of a round"
            )
        return window.start, window.start + window.rounds
    rounds = steps // every
    start = rounds - window.rounds if window.start == "end" else window.start
    if start < 0 or start + window.rounds > rounds:
        raise ValueError(
            f"method.schedule.window: {window.rounds} rounds from {window.start} do not fit into the run, which has "
            f"{rounds} rounds of {every} steps"
        )
    return start, start + window.rounds
