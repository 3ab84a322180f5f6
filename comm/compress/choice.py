"""Which compressor each tensor gets: the least error for which the communication fits into the time it may take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """One compressor for one tensor.

    Attributes: label, of the compressor; sent_bytes, by this rank in a step; seconds, of encoding, sending and
    decoding; error, E ||x - C(x)||^2 as a share of ||x||^2 over all tensors, so that options of different tensors
    compare.
    """

    label: str
    sent_bytes: int
    seconds: float
    error: float


@dataclass(frozen=True)
class Choice:
    """What a tensor gets, and why."""

    option: Option
    reason: str


def choose(options: Mapping[str, Sequence[Option]], budget_s: float) -> dict[str, Choice]:
    """One option per tensor, so that the seconds add up to at most budget_s with little error in all.

    Every tensor starts with the option of least error. While the total is too long, the tensor moves on whose step
    saves most seconds for the error that it adds: greedily along the lower convex hull of (seconds, error), which is
    the solution of the relaxed problem min sum error s.t. sum seconds <= budget. (Markov, Alimohammadi, Frantar and
    Alistarh 2022, L-GreCo, 2210.17357, solve the reverse problem, least bytes at a given error, by dynamic
    programming.) Equal input gives equal output, ties going to the tensor that comes first.

    Args:
        options: of each tensor, in any order; the first is what it is compared with in the reason (dense).
        budget_s: how long a step's communication may take; if nothing fits, the fastest of all is chosen.
    """
    hulls = {name: _hull(of) for name, of in options.items()}
    position = dict.fromkeys(hulls, 0)
    total_s = sum(hull[0].seconds for hull in hulls.values())
    while total_s > budget_s:
        name = _best_move(hulls, position)
        if name is None:
            break
        before, after = hulls[name][position[name] : position[name] + 2]
        total_s += after.seconds - before.seconds
        position[name] += 1
    return {
        name: Choice(hull[position[name]], _reason(options[name], hull, position[name], total_s, budget_s))
        for name, hull in hulls.items()
    }


def _hull(options: Sequence[Option]) -> list[Option]:
    """Those worth considering, from least error to least time; each step saves less per error than the one before."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.error, o.seconds)):
        if hull and option.seconds >= hull[-1].seconds:
            continue  # another is both nearer and faster
        while len(hull) > 1 and _gain(hull[-2], option) >= _gain(hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull


def _gain(before: Option, after: Option) -> float:
    """Seconds saved per error added."""
    added = after.error - before.error
    return (before.seconds - after.seconds) / added if added > 0 else float("inf")


def _best_move(hulls: Mapping[str, list[Option]], position: Mapping[str, int]) -> str | None:
    best, best_gain = None, 0.0
    for name, hull in hulls.items():
        at = position[name]
        if at + 1 < len(hull) and (gain := _gain(hull[at], hull[at + 1])) > best_gain:
            best, best_gain = name, gain
    return best


def _reason(options: Sequence[Option], hull: list[Option], at: int, total_s: float, budget_s: float) -> str:
    chosen, dense = hull[at], options[0]
    if chosen is dense:
        return "dense fits" if total_s <= budget_s else "nothing is faster"
    if at == 0:
        return f"faster than {dense.label} without more error"
    times = f"{1e3 * dense.seconds:.1f} ms as {dense.label}, {1e3 * chosen.seconds:.1f} ms so"
    return times if at + 1 < len(hull) or total_s <= budget_s else f"{times}: the fastest, and still over the budget"
