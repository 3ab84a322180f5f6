"""Collectives of growing size, on the groups of each level, and the link that explains their times."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from thinwire.comm.channel import Channel
from thinwire.comm.two_shot import TwoShotMean, is_worth_rounds, split_evenly
from thinwire.dist.probe.clock import Lockstep, percentile
from thinwire.dist.probe.records import CollectiveTime, Operation

_FIRST_BYTES, _LAST_BYTES, _GROWTH = 1 << 12, 1 << 26, 4
_FEWEST_SIZES = 2  # to tell latency from rate
_FEWEST, _MOST = 3, 9  # repetitions of one size
_LONG_S = 0.3
_SHARE_OF_ALL_REDUCE = 0.6  # of a level's time: it is what the link's figures come from
_OTHERS: tuple[Operation, ...] = ("all_gather", "reduce_scatter", "all_to_all")


@dataclass(frozen=True)
class Alphabeta:
    """seconds = shots * latency_s + 8 * sent_bytes / bps (Hockney 1994), where all ranks send at once."""

    latency_s: float
    bps: float


def sweep(lockstep: Lockstep, level: str, group: Sequence[int], seconds: float) -> list[CollectiveTime]:
    """Time every collective on the groups of a level, all groups at once. Collective over all ranks.

    Args:
        level: its name. group: ranks of the queue in this rank's group of it, ascending; all groups have as many.
        seconds: for all of it. Sizes grow until the time of a collective is used up.
    """
    rest = seconds * (1 - _SHARE_OF_ALL_REDUCE) / len(_OTHERS)
    times = _sizes(lockstep, "all_reduce", level, group, seconds * _SHARE_OF_ALL_REDUCE)
    for operation in _OTHERS:
        times += _sizes(lockstep, operation, level, group, rest)
    return times


def fit(times: Sequence[CollectiveTime], sent_bytes: Callable[[int], int]) -> Alphabeta:
    """The latency and the rate that explain the all-reduces of a level best: least squares of the relative errors.

    Args:
        sent_bytes: that a rank sends on links of the level in an all-reduce of a tensor of so many bytes.
    Raises:
        ValueError: fewer than two sizes.
    """
    found = [(sent_bytes(t.size_bytes), t.median_s) for t in times if t.operation == "all_reduce"]
    if len(found) < _FEWEST_SIZES:
        raise ValueError(f"times: {len(found)} sizes of all_reduce; two or more are needed to tell latency from rate")
    # Minimise sum_i (1 - (a + b x_i) / t_i)^2.
    u = [1 / t for _, t in found]
    v = [x / t for x, t in found]
    uu, uv, vv = (math.fsum(p * q for p, q in zip(*pair, strict=True)) for pair in ((u, u), (u, v), (v, v)))
    su, sv = math.fsum(u), math.fsum(v)
    determinant = uu * vv - uv * uv
    shots_s, per_byte_s = (su * vv - sv * uv) / determinant, (sv * uu - su * uv) / determinant
    largest, longest_s = max(found)
    if per_byte_s <= 0:  # noise, where links are faster than they can be measured
        per_byte_s = longest_s / largest
    if shots_s <= 0:
        shots_s, per_byte_s = 0.0, sv / vv
    return Alphabeta(shots_s / 2, 8 / per_byte_s)


def _sizes(
    lockstep: Lockstep, operation: Operation, level: str, group: Sequence[int], seconds: float
) -> list[CollectiveTime]:
    """Sizes from small to large, while there is time left for the next one; all ranks decide alike.

    An all-reduce goes on in any case while it is short, and until its slices are exchanged in rounds: small messages
    tell little of how fast large ones are.
    """
    began, size_bytes, expected_s, fastest_s = time.monotonic(), _FIRST_BYTES, 0.0, 0.0
    times: list[CollectiveTime] = []
    while size_bytes <= _LAST_BYTES:
        left_s = seconds - lockstep.slowest(time.monotonic() - began)
        was_in_rounds = is_worth_rounds(size_bytes // _GROWTH // len(group))
        goes_on = operation == "all_reduce" and (expected_s < _LONG_S or not was_in_rounds)
        if times and not goes_on and left_s < _FEWEST * expected_s:
            break
        work = _exchange(operation, size_bytes, group, lockstep.device)
        name = f"probe/{operation}"
        if expected_s < _LONG_S:  # what is long does not notice that connections are opened, and memory is touched
            expected_s = lockstep.time_exchange(name, work, 1)[0]
        repeats = int(left_s / 4 / max(expected_s, 1e-6))
        fewest = _FEWEST if expected_s < _LONG_S else 1
        taken = lockstep.time_exchange(name, work, max(fewest, min(_MOST, repeats)))
        median_s = statistics.median(taken)
        times.append(
            CollectiveTime(
                operation=operation,
                level=level,
                ranks=len(group),
                size_bytes=size_bytes,
                median_s=median_s,
                p90_s=percentile(taken, 0.9),
            )
        )
        # Of the fastest: a moment in which the machine was busy elsewhere does not end it. Latency does not grow.
        grown_s, fastest_s = max(0.0, min(taken) - fastest_s), min(taken)
        expected_s = min(_GROWTH * fastest_s, fastest_s + _GROWTH * grown_s)
        size_bytes *= _GROWTH
    return times


def _exchange(
    operation: Operation, size_bytes: int, group: Sequence[int], device: torch.device
) -> Callable[[Channel], object]:
    """The collective as the methods do it, on a tensor of so many bytes of fp32."""
    numel, size = size_bytes // 4, len(group)
    tensor = torch.zeros(numel, device=device)
    mean = TwoShotMean(torch.float32)
    splits = split_evenly(numel, size)
    in_rounds = is_worth_rounds(size_bytes // size)

    def all_to_all(channel: Channel) -> None:
        output = torch.empty(size * (numel // size), device=device)
        even = [numel // size] * size
        channel.all_to_all(output, tensor[: len(output)], even, even, in_rounds=in_rounds)

    def all_gather(channel: Channel) -> None:
        output = torch.empty(numel, device=device)
        channel.all_gather(output, tensor[: splits[channel.rank]], splits, in_rounds=in_rounds)

    works: dict[Operation, Callable[[Channel], object]] = {
        "all_reduce": lambda channel: mean(channel, tensor),
        "reduce_scatter": lambda channel: mean.reduce(channel, tensor),
        "all_gather": all_gather,
        "all_to_all": all_to_all,
    }
    work = works[operation]
    return lambda channel: work(channel.among(group))
