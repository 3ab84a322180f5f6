"""Methods side by side on one cluster: what each costs, which to take and why, and at which link rate that ends."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, TypeAlias

from thinwire.dist.plan.candidates import Candidate, candidates_for
from thinwire.dist.plan.cluster import Cluster
from thinwire.dist.plan.prediction import Prediction, check_levels, predict, subject_of
from thinwire.dist.plan.steps_factor import StepsFactor, steps_factor

if TYPE_CHECKING:
    from thinwire.dist.config import RunConfig

_SLOWEST_BPS, _FASTEST_BPS = 1e6, 1e12
_PER_DECADE = 4
_RATES = [
    _SLOWEST_BPS * 10 ** (n / _PER_DECADE)
    for n in range(round(_PER_DECADE * math.log10(_FASTEST_BPS / _SLOWEST_BPS)) + 1)
]
_HALVINGS = 24
_SAME = 1e-3  # relative: no shorter, no longer

Times: TypeAlias = Callable[[float], float]
"""Seconds by the rate of the slowest level's links, in bits per second."""


@dataclass(frozen=True)
class Option:
    """A candidate with its cost. factor: of steps to the same loss, against all-reduce in fp32."""

    candidate: Candidate
    prediction: Prediction
    factor: StepsFactor

    @property
    def label(self) -> str:
        """For people."""
        return self.candidate.label

    def seconds(self, steps: float) -> float:
        """Until the loss that all-reduce has after so many steps; inf where that is not known, or never."""
        return math.inf if self.factor.steps is None else steps * self.factor.steps * self.prediction.time.step_s


@dataclass(frozen=True)
class Change:
    """Below link_bps of the slowest level one method is sooner, above it another."""

    link_bps: float
    below: str
    above: str


@dataclass(frozen=True)
class Comparison:
    """options: that can run here, the user's own first. left_out: (label, reason). best: what is recommended, and why.

    changes: where, along the rate of the slowest level's links, another of the recommendable methods is the soonest.
    break_even: by method, the rate of those links from which on its step is no shorter than an all-reduce's.
    """

    cluster: Cluster
    options: tuple[Option, ...]
    left_out: tuple[tuple[str, str], ...]
    best: Option | None
    reason: str
    changes: tuple[Change, ...]
    break_even: tuple[tuple[str, float], ...]


def compare(config: RunConfig, cluster: Cluster, kinds: Sequence[str] = ()) -> Comparison:
    """Predict the run by each method, and choose.

    The one is recommended that reaches the same loss soonest, among those that fit into memory and whose steps to the
    same loss have been measured; among those that the user names, also without such a figure.

    Args:
        kinds: the only methods to look at; empty: all that train by gradients.
    Raises:
        ValueError: the run itself does not fit this cluster.
    """
    check_levels(config, cluster)
    subject = subject_of(config, cluster.size)
    options: list[Option] = []
    left_out: list[tuple[str, str]] = []
    for candidate in candidates_for(config, cluster, tuple(kinds)):
        try:
            if candidate.why_not is not None:
                raise ValueError(candidate.why_not)
            prediction = predict(candidate.config, cluster, replace(subject, config=candidate.config))
        except ValueError as error:
            left_out.append((candidate.label, str(error)))
            continue
        factor = steps_factor(candidate.config)
        if kinds and not factor.was_measured:
            factor = StepsFactor(1.0, False)
        options.append(Option(candidate, prediction, factor))
    able = [option for option in options if option.prediction.fits and option.factor.steps is not None]
    best = min(able, key=lambda option: option.seconds(1), default=None)
    if cluster.size == 1 and options and options[0].prediction.fits:
        best = options[0]
    times = {option.label: _by_rate(option, cluster) for option in options}
    return Comparison(
        cluster,
        tuple(options),
        tuple(left_out),
        best,
        _reason(options, best),
        tuple(_changes(able, times)) if cluster.size > 1 else (),
        tuple(_break_even(options, times)) if cluster.size > 1 else (),
    )


def crossing(first: Times, second: Times, low: float, high: float) -> float:
    """The rate between two at which two times are equal, by bisection on a logarithmic scale.

    Args:
        first, second: seconds at a rate; the first are fewer at `low`, the second at `high`.
    """
    for _ in range(_HALVINGS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if first(middle) <= second(middle) else (low, middle)
    return math.sqrt(low * high)


def _by_rate(option: Option, cluster: Cluster) -> Times:
    """Seconds of a step by the rate of the slowest level's links, all else as it is."""
    return cache(lambda link_bps: option.prediction.on(_with_rate(cluster, link_bps)).time.step_s)


def _changes(options: Sequence[Option], times: Mapping[str, Times]) -> list[Change]:
    """Where another method becomes the soonest to the same loss."""

    def total(option: Option) -> Times:
        return lambda link_bps: (option.factor.steps or math.inf) * times[option.label](link_bps)

    def soonest(link_bps: float) -> Option:
        return min(options, key=lambda option: total(option)(link_bps))

    if not options:
        return []
    winners = [(rate, soonest(rate)) for rate in _RATES]
    return [
        Change(crossing(total(below), total(above), low, high), below.label, above.label)
        for (low, below), (high, above) in itertools.pairwise(winners)
        if below is not above
    ]


def _break_even(options: Sequence[Option], times: Mapping[str, Times]) -> list[tuple[str, float]]:
    """Where a step of another method is as long as an all-reduce's, by the highest such rate."""
    dense = _dense(options)
    found = []
    for option in options if dense else ():
        if option is dense or option.candidate.config.method.kind == "allreduce":
            continue
        assert dense is not None
        mine, other = times[option.label], times[dense.label]
        # Where neither waits for the links they differ by nothing, or by rounding.
        sooner = [mine(rate) < (1 - _SAME) * other(rate) for rate in _RATES]
        for low, high, before, after in zip(_RATES, _RATES[1:], sooner, sooner[1:], strict=False):
            if before and not after and mine(high) > (1 + _SAME) * other(high):
                found.append((option.label, crossing(mine, other, low, high)))
    return found


def _with_rate(cluster: Cluster, link_bps: float) -> Cluster:
    *inner, slowest = cluster.levels
    return cluster.model_copy(update={"levels": (*inner, slowest.with_rate(link_bps))})


def _reason(options: Sequence[Option], best: Option | None) -> str:
    """One or two sentences."""
    if best is None:
        if not any(option.prediction.fits for option in options):
            return "nothing fits into the memory of a device: take a smaller train.micro_batch, or more ranks"
        return "no method that fits has been measured to reach all-reduce's loss; name some with --methods"
    if best.prediction.cluster.size == 1:
        return "one rank has nobody to send to: all methods compute the same"
    dense = _dense(options)
    took = best.prediction.time
    if dense is None or dense is best:
        others = [o for o in options if o is not best and o.prediction.fits and o.factor.steps is not None]
        text = f"{best.label} of this model takes {_seconds(took.step_s)} per step on these links"
        if not others:
            return f"{text}; nothing else that is offered can be compared with it"
        second = min(others, key=lambda option: option.seconds(1))
        return f"{text}; the next best, {second.label}, takes {_seconds(second.prediction.time.step_s)}{_steps(second)}"
    slow = dense.prediction.time
    text = (
        f"{dense.label} of this model takes {_seconds(slow.step_s)} per step on these links, "
        f"{_seconds(slow.exposed_s)} of it waiting; {best.label} takes {_seconds(took.step_s)}{_steps(best)}"
    )
    if not dense.prediction.fits:
        return f"{text}; and {dense.label} does not fit into a device's memory"
    if dense.factor.steps is None:
        return text
    times = dense.seconds(1) / best.seconds(1)
    return f"{text}: the same loss {times:.3g} times sooner" if times > 1.005 else text


def _dense(options: Sequence[Option]) -> Option | None:
    """The all-reduce that others are measured against: the user's own, or that in fp32."""
    return next((option for option in options if option.candidate.config.method.kind == "allreduce"), None)


def _steps(option: Option) -> str:
    if not option.factor.was_measured:
        return ", its steps to the same loss not being measured"
    assert option.factor.steps is not None
    return "" if option.factor.steps == 1 else f", and {option.factor.steps:.3g} times the steps to the same loss"


def _seconds(seconds: float) -> str:
    if seconds >= 0.0995:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{1e3 * seconds:.2g} ms"
