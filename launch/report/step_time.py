"""Where the time of a run went: computing, communication that nothing hid, waiting for others, outside the steps."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from thinwire.launch.report.run import ReportError, Run


@dataclass(frozen=True)
class StepTimes:
    """Of every step, in ms, as the rank that wrote the records saw it; their sum is the step.

    compute: neither blocked by communication nor by others. exposed: of what it was blocked, that part for which every
    rank was: communication proper. waiting: the rest, for which the rank that waited least was not blocked: it was
    still computing. Without the other ranks' times (a rank alone, an older run, machines of gossip) all is exposed.
    """

    compute: tuple[float, ...]
    exposed: tuple[float, ...]
    waiting: tuple[float, ...]

    @property
    def total(self) -> list[float]:
        """Of each step."""
        return [sum(parts) for parts in zip(self.compute, self.exposed, self.waiting, strict=True)]


@dataclass(frozen=True)
class RankTimes:
    """Of one rank, the mean over all steps but the first, in ms.

    last: share of the steps in which it was the one that the others waited for, since it waited least itself.
    others_waited: what another rank waited in those steps, the mean over the others, spread over all steps.
    """

    rank: int
    compute: float
    exposed: float
    last: float
    others_waited: float


def step_times(run: Run) -> StepTimes:
    """Of all steps.

    Raises:
        ReportError: the records lack a time.
    """
    waiting = []
    blocked = run.numbers("exposed_comm_ms")
    for record, mine in zip(run.records, blocked, strict=True):
        by_rank = _by_rank(run, record.get("exposed_comm_ms_by_rank"), record["step"])
        waiting.append(max(0.0, mine - min(by_rank)) if by_rank else 0.0)
    exposed = [all_of_it - part for all_of_it, part in zip(blocked, waiting, strict=True)]
    return StepTimes(tuple(run.numbers("compute_ms")), tuple(exposed), tuple(waiting))


def rank_times(run: Run) -> list[RankTimes]:
    """Of all ranks that told their times; empty if none did."""
    steady = run.records[1:] or run.records
    rows = [
        (compute, exposed)
        for record in steady
        if (exposed := _by_rank(run, record.get("exposed_comm_ms_by_rank"), record["step"]))
        and (compute := _by_rank(run, record.get("compute_ms_by_rank"), record["step"]))
        and len(compute) == len(exposed)
    ]
    sizes = {len(exposed) for _, exposed in rows}
    if len(sizes) != 1 or sizes == {1}:  # none, or a run that went on among another number of ranks
        return []
    size = sizes.pop()
    found = []
    for rank in range(size):
        as_last = [exposed for _, exposed in rows if min(range(size), key=exposed.__getitem__) == rank]
        waited = sum(sum(exposed) - size * exposed[rank] for exposed in as_last)
        found.append(
            RankTimes(
                rank,
                statistics.mean(compute[rank] for compute, _ in rows),
                statistics.mean(exposed[rank] for _, exposed in rows),
                len(as_last) / len(rows),
                waited / len(rows) / (size - 1),
            )
        )
    return found


def waited_for(run: Run) -> dict[int, float]:
    """Seconds that a machine of gossip has waited for each other one, since the start of the run's process."""
    told = run.records[-1].get("method", {})
    prefix = "waited_for_s/"
    return {int(key.removeprefix(prefix)): float(s) for key, s in told.items() if key.startswith(prefix)}


def outside_steps_s(run: Run) -> float:
    """Seconds of the run that belong to no step: start, evaluations, checkpoints."""
    inside = sum(step_times(run).total) / 1e3
    return max(0.0, float(run.records[-1]["seconds"]) - inside)


def _by_rank(run: Run, told: object, step: int) -> list[float]:
    if told is None:
        return []
    if not isinstance(told, list) or not all(isinstance(ms, (int, float)) for ms in told):
        raise ReportError(f"{run.folder}/metrics.jsonl: step {step}: the times of the ranks are no list of numbers")
    return [float(ms) for ms in told]
