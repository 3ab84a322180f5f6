"""A budget of bytes or seconds, divided among the rounds of a run and one merge."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from thinwire.comm.gossip.mixing import Graph
from thinwire.comm.gossip.spacing import Spread
from thinwire.comm.settings import Settings

_SAMPLED_ROUNDS = 64  # of a graph that never repeats


class BudgetSettings(Settings):
    """`schedule: {kind: budget, bytes_per_step: 1000, spend: late}`: the exchanges that so much buys, and one merge.

    Exactly one of:
      bytes_per_step: what a machine may send, averaged over the run. total_bytes: in the whole run.
      seconds: what its link may be busy with sending, in the whole run, at link_bps and latency_s per exchange.
    spend: even, spaced over the run; late, all rounds at the end; early, all at the beginning.
    reserve: late, early: the share that is spaced evenly over the rest of the run: machines that never meet drift so
      far apart that a merge gives little.
    every: steps of a round. merge_at: the step after which all take the global average, end, or null: never.
    The most that a machine sends in a round is what the round costs; a merge costs two vectors.
    """

    kind: Literal["budget"] = "budget"
    bytes_per_step: float | None = Field(None, gt=0)
    total_bytes: float | None = Field(None, gt=0)
    seconds: float | None = Field(None, gt=0)
    link_bps: float | None = Field(None, gt=0)
    latency_s: float = Field(0.0, ge=0)
    spend: Literal["early", "late", "even"] = "late"
    reserve: float = Field(0.75, ge=0, le=1)
    every: int = Field(1, gt=0)
    merge_at: Literal["end"] | Annotated[int, Field(gt=0)] | None = "end"

    @model_validator(mode="after")
    def _one_limit(self) -> BudgetSettings:
        limits = ("bytes_per_step", "total_bytes", "seconds")
        given = [name for name in limits if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"method.schedule: a budget is one of {', '.join(limits)}; given are {' and '.join(given) or 'none'}"
            )
        if (self.seconds is None) != (self.link_bps is None):
            raise ValueError(
                "method.schedule: seconds and link_bps, the bits per second that a machine's link carries, go together"
            )
        return self


class Budget:
    """What a budget buys.

    Args:
        cost_bytes: payload bytes of one machine's vector for one neighbour.
    Attributes:
        merge_step: how many steps are taken before the merge; None: never.
        exchanges: rounds with an exchange.
    Raises:
        ValueError: it buys nothing, or the merge lies past the end.
    """

    def __init__(self, settings: BudgetSettings, graph: Graph, steps: int, cost_bytes: int) -> None:
        self._settings = settings
        self.merge_step = steps if settings.merge_at == "end" else settings.merge_at
        if self.merge_step is not None and self.merge_step > steps:
            raise ValueError(
                f"method.schedule.merge_at: {self.merge_step} lies past the end of the run, which has {steps} steps; "
                f"allowed is 1 to {steps}, or end"
            )
        # A merge at the end does what the last round's exchange would do.
        replaced = self.merge_step == steps and steps % settings.every == 0
        self._rounds = steps // settings.every - replaced
        vectors = most_vectors(graph)
        if settings.seconds is not None:
            assert settings.link_bps is not None
            vector_s = 8 * cost_bytes / settings.link_bps
            total, round_cost = settings.seconds, vectors * vector_s + settings.latency_s
            merge_cost = 2 * vector_s + 2 * settings.latency_s
            unit = "s"
        else:
            assert settings.total_bytes or settings.bytes_per_step
            total = settings.total_bytes or (settings.bytes_per_step or 0.0) * steps
            round_cost, merge_cost, unit = vectors * cost_bytes, 2.0 * cost_bytes, "bytes"
        left = total - (merge_cost if self.merge_step is not None else 0.0)
        affordable = int(left / round_cost + 1e-9) if round_cost else self._rounds
        self.exchanges = min(self._rounds, affordable)
        if left < 0 or (self.exchanges < 1 and self._rounds):
            merge = f" and the merge {merge_cost:,.6g}" if self.merge_step is not None else ""
            raise ValueError(
                f"method.schedule: a budget of {total:,.6g} {unit} for the run does not pay for one exchange: that "
                f"takes {round_cost:,.6g} {unit}{merge}; allow more, or send less, with a compressed algorithm or "
                "merge_at: null"
            )

    def spreads(self) -> list[Spread]:
        """The rounds that have an exchange."""
        settings, rounds = self._settings, self._rounds
        spaced = self.exchanges if settings.spend == "even" else int(settings.reserve * self.exchanges)
        dense = self.exchanges - spaced
        if settings.spend == "early":
            return [Spread(0, dense), Spread(dense, rounds, spaced)]
        return [Spread(0, rounds - dense, spaced), Spread(rounds - dense, rounds)]


def most_vectors(graph: Graph) -> float:
    """How many neighbours the busiest machine sends to in a round, on average over a period."""
    count = graph.period or _SAMPLED_ROUNDS
    mixings = [graph.mixing(round) for round in range(count)]
    return sum(max(len(mixing.targets(rank)) for rank in range(graph.size)) for mixing in mixings) / count
