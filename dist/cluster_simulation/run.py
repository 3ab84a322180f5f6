"""A whole run in virtual time: steps among disturbed ranks, and what failures cost it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from thinwire.comm.forecast import Exchange
from thinwire.comm.gossip.settings import GossipSettings
from thinwire.dist.cluster_simulation.disturbances import Disturbances
from thinwire.dist.cluster_simulation.neighbours import sources_of, with_neighbours
from thinwire.dist.cluster_simulation.ranks import distinct_ranks, every_rank
from thinwire.dist.cluster_simulation.restarts import Completion, Recovery, complete
from thinwire.dist.cluster_simulation.steps import Steps
from thinwire.dist.onebyte_run import OneByteRunSettings
from thinwire.dist.plan.prediction import Prediction

if TYPE_CHECKING:
    from thinwire.dist.config import RunConfig

_LONGEST_PERIOD = 1000  # steps
_WARM_UP = 2  # steps: what runs beside a step holds up the one after the next


@dataclass(frozen=True)
class SimulatedRun:
    """What a run does. Seconds are those of a step, in the steady state.

    simulated_ranks: those that stand for all.
    step_s: of each step that was carried out, until the last rank has ended it; where machines keep their own pace,
      and end with the first of them, until the first has.
    computed_s, others_s, wire_s: in the mean over ranks: computing, waiting for other ranks, waiting for what is on the
      wire.
    waited_for: the rank that waits least for others, and how much less than the mean.
    foretold_s: without any disturbance, by the timeline.
    completion: of the whole run. lost_ranks: that failed during the steps carried out, where survivors go on.
    sequences: of the whole run.
    """

    ranks: int
    simulated_ranks: int
    step_s: tuple[float, ...]
    computed_s: float
    others_s: float
    wire_s: float
    waited_for: tuple[int, float]
    foretold_s: float
    completion: Completion
    lost_ranks: int
    sequences: int

    @property
    def mean_step_s(self) -> float:
        """Of the steps that were carried out."""
        return sum(self.step_s) / len(self.step_s)

    @property
    def sequences_per_s(self) -> float:
        """Of the whole run, with what failures cost."""
        return self.sequences / self.completion.seconds

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "ranks": self.ranks,
            "simulated_ranks": self.simulated_ranks,
            "simulated_steps": len(self.step_s),
            "step_s": self.mean_step_s,
            "step_s_median": float(np.median(self.step_s)),
            "step_s_p90": float(np.quantile(self.step_s, 0.9)),
            "foretold_step_s": self.foretold_s,
            "computed_s": self.computed_s,
            "waited_for_others_s": self.others_s,
            "waited_for_wire_s": self.wire_s,
            "waited_for_rank": self.waited_for[0],
            "run_s": self.completion.seconds,
            "failures": self.completion.failures,
            "lost_s": self.completion.lost_s,
            "checkpoints_s": self.completion.checkpoints_s,
            "lost_ranks": self.lost_ranks,
            "sequences_per_s": self.sequences_per_s,
        }


def simulate_run(
    prediction: Prediction, disturbances: Disturbances, recovery: Recovery, *, numel: int, simulated: int
) -> SimulatedRun:
    """Simulate a run of the configuration and on the cluster that a prediction is of.

    Where ranks differ in nothing but a constant factor, only as many are simulated as do different things.

    Args:
        numel: elements of the model.
        simulated: steps that are carried out, made up to whole periods of exchanges that do not come every step; the
            run's other steps are taken to be like them.
    Raises:
        ValueError: a rank that there is not, or a run that failures never let end.
    """
    cluster, config = prediction.cluster, prediction.config
    disturbances.check(cluster)
    survivors_wait_s = lost_after_s(config) if disturbances.failures_per_device_hour else None
    sources = sources_of(config, cluster.size, numel)
    alike = not disturbances.jitter and sources is None and survivors_wait_s is None
    ranks = distinct_ranks(cluster, disturbances.slow) if alike else every_rank(cluster)
    program = prediction.time.program
    steps = Steps(
        with_neighbours(program) if isinstance(config.method, GossipSettings) else program,
        ranks,
        disturbances,
        sources=sources,
        lost_after_s=survivors_wait_s,
    )
    period = period_of(prediction.forecast.exchanges)
    for _ in range(math.ceil(_WARM_UP / period) * period):
        before = steps.next()
    own_pace = isinstance(config.method, GossipSettings) and not config.method.algorithm.in_rounds
    until = np.min if own_pace else np.max
    ended = [float(until(before.ended_s[steps.alive]))]
    waited = np.zeros((3, len(ranks)))
    carried_out = math.ceil(simulated / period) * period
    for _ in range(carried_out):
        outcome = steps.next()
        if not steps.alive.any():
            raise ValueError("--failures: all ranks have failed within the steps that are simulated; give fewer")
        ended.append(float(until(outcome.ended_s[steps.alive])))
        waited += (outcome.computed_s, outcome.others_s, outcome.wire_s)
    waited /= carried_out
    step_s = tuple(float(seconds) for seconds in np.diff(ended))
    failures_per_s = disturbances.failures_per_device_hour * cluster.size / 3600
    completion = complete(
        step_s,
        config.train.steps,
        recovery,
        failures_per_s=failures_per_s if survivors_wait_s is None else 0.0,
        seed=disturbances.seed,
    )
    means = np.average(waited, axis=1, weights=ranks.stands_for * steps.alive)
    paces = ended[-1] / outcome.ended_s if own_pace else np.ones(len(ranks))
    share = float(np.average(paces * steps.alive, weights=ranks.stands_for))  # of the steps that all would take
    least = int(np.argmin(np.where(steps.alive, waited[1], math.inf)))
    return SimulatedRun(
        ranks=cluster.size,
        simulated_ranks=len(ranks),
        step_s=step_s,
        computed_s=float(means[0]),
        others_s=float(means[1]),
        wire_s=float(means[2]),
        waited_for=(int(ranks.numbers[least]), float(means[1] - waited[1][least])),
        foretold_s=prediction.time.step_s,
        completion=completion,
        lost_ranks=int((~steps.alive).sum()),
        sequences=round(config.train.global_batch * config.train.steps * share),
    )


def lost_after_s(config: RunConfig) -> float | None:
    """For how long the others wait for a rank that has failed, where they go on without it; None: the job ends."""
    method = config.method
    if isinstance(method, GossipSettings):
        return method.deadline_s
    if isinstance(method, OneByteRunSettings) and method.membership is not None:
        return method.membership.suspicion_s
    return None


def period_of(exchanges: Sequence[Exchange]) -> int:
    """Steps after which what is exchanged repeats, as far as it does."""
    periods = [round(1 / exchange.per_step) for exchange in exchanges if 0 < exchange.per_step < 1]
    period = math.lcm(*periods)
    return period if period <= _LONGEST_PERIOD else max((p for p in periods if p <= _LONGEST_PERIOD), default=1)
