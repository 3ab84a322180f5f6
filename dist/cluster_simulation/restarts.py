"""A run whose ranks all end when one device fails: lost steps, checkpoints, restarts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_HOPELESS = 20.0  # failures to expect between two checkpoints: e^20 attempts


@dataclass(frozen=True)
class Recovery:
    """How a job gets over a failure.

    every_steps: steps between checkpoints; 0 = none. checkpoint_s: for which training waits for one. restart_s: from a
        failure until the first step after it, reading the checkpoint included.
    """

    every_steps: int = 0
    checkpoint_s: float = 0.0
    restart_s: float = 60.0

    def __post_init__(self) -> None:
        for option, value in (("--checkpoint-s", self.checkpoint_s), ("--restart-s", self.restart_s)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{option}: {value:g}; give seconds, 0 or more")


@dataclass(frozen=True)
class Completion:
    """A whole run. seconds = steps_s + checkpoints_s + lost_s; lost: steps done again, and restarts."""

    seconds: float
    steps_s: float
    checkpoints_s: float
    lost_s: float
    failures: int


def complete(
    step_s: Sequence[float], steps: int, recovery: Recovery, *, failures_per_s: float, seed: int
) -> Completion:
    """Run until so many steps are done.

    A failure, which comes at exponential times, throws the job back to its last checkpoint; one that comes during a
    restart begins the restart anew. Daly 2006, "A higher order estimate of the optimum checkpoint interval": expected
    seconds from one checkpoint to the next, tau of work and C of writing, restarts of R, M between failures, are
    M e^(R/M) (e^((tau + C)/M) - 1).

    Args:
        step_s: seconds of steps, taken one after another and again from the first.
        failures_per_s: of the whole job.
    Raises:
        ValueError: it would never get to its next checkpoint.
    """
    mean_s = float(np.mean(step_s))
    between = min(recovery.every_steps or steps, steps) * mean_s + recovery.checkpoint_s
    if failures_per_s * (between + recovery.restart_s) > _HOPELESS:
        raise ValueError(
            f"checkpoint.every_steps: {recovery.every_steps}, so a checkpoint and a restart take "
            f"{between + recovery.restart_s:.0f} s, but a device of this cluster fails every "
            f"{1 / failures_per_s:.0f} s: the run would never end; checkpoint more often, or take fewer devices"
        )
    random = np.random.default_rng((seed, 2))
    now = checkpoints_s = 0.0
    fails_s = _next_failure(random, now, failures_per_s)
    done = saved = failures = 0
    while done < steps:
        is_due = recovery.every_steps > 0 and (done + 1) % recovery.every_steps == 0 and done + 1 < steps
        end = now + step_s[done % len(step_s)] + (recovery.checkpoint_s if is_due else 0.0)
        if fails_s >= end:
            now, done = end, done + 1
            if is_due:
                saved = done
                checkpoints_s += recovery.checkpoint_s
            continue
        while fails_s < end:
            failures += 1
            end = fails_s + recovery.restart_s
            fails_s = _next_failure(random, fails_s, failures_per_s)
        now, done = end, saved
    steps_s = float(sum(step_s[i % len(step_s)] for i in range(steps)))
    return Completion(now, steps_s, checkpoints_s, now - steps_s - checkpoints_s, failures)


def _next_failure(random: np.random.Generator, now: float, failures_per_s: float) -> float:
    return now + float(random.exponential()) / failures_per_s if failures_per_s else math.inf
