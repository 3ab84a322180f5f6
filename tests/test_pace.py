"""comm/pace.py: it hides the latency of links with as few streams as can be, and follows links that change."""

from __future__ import annotations

import math
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ranks import Rank, run_ranks

from thinwire.comm import liveness
from thinwire.comm.liveness import PeerMonitor
from thinwire.comm.pace import Pace

FOUR = (0, 1, 2, 3)


def exchanges(pace: Pace, slice_bytes: int, rate: float, latency_s: float, members: tuple[int, ...] = FOUR) -> int:
    """What it chooses after 20 exchanges that take slices * t + waves * L. rate: bytes per second."""
    slices = len(members) - 1
    for _ in range(20):
        under_way = pace.choose(members, slice_bytes)
        seconds = slices * slice_bytes / rate + math.ceil(slices / under_way) * latency_s
        pace.tell(members, slices * slice_bytes, under_way, seconds)
    return pace.choose(members, slice_bytes)


@pytest.mark.parametrize(("ranks", "first"), [(2, 1), (3, 2), (4, 2), (9, 2)])
def test_two_are_under_way_while_the_rate_is_unknown(ranks: int, first: int) -> None:
    assert Pace(lambda _: 0.01).choose(range(ranks), 1 << 20) == first


def test_all_are_where_the_latency_is_unknown() -> None:
    pace = Pace(lambda _: math.inf)
    pace.tell(FOUR, 3 << 20, 3, 1.0)
    assert pace.choose(FOUR, 1 << 20) == 3


@pytest.mark.parametrize(
    ("slice_s", "chosen"), [(1.0, 1), (0.6, 1), (0.4, 2), (0.05, 2), (0.046, 2), (0.04, 3), (0.01, 3), (0.001, 3)]
)
def test_a_latency_of_50_ms_is_hidden_behind_as_many_slices(slice_s: float, chosen: int) -> None:
    assert exchanges(Pace(lambda _: 0.05), 1 << 16, (1 << 16) / slice_s, 0.05) == chosen


@given(st.integers(2, 40), st.integers(1 << 14, 1 << 26), st.floats(1e5, 1e10), st.floats(1e-5, 0.5))
def test_the_choice_is_in_range_and_right_where_the_link_dominates(
    ranks: int, slice_bytes: int, rate: float, latency_s: float
) -> None:
    chosen = exchanges(Pace(lambda _: latency_s), slice_bytes, rate, latency_s, tuple(range(ranks)))
    assert 1 <= chosen <= ranks - 1
    ratio = latency_s * rate / slice_bytes
    if ratio < 0.09:
        assert chosen == 1
    elif ratio > 4 * ranks:
        assert chosen >= min(2, ranks - 1)


def test_a_link_that_changes_is_followed() -> None:
    pace = Pace(lambda _: 0.05)
    assert exchanges(pace, 1 << 16, 1e5, 0.05) == 1
    assert exchanges(pace, 1 << 16, 1e8, 0.05) == 3
    assert exchanges(pace, 1 << 16, 1e5, 0.05) == 1


def test_groups_are_apart() -> None:
    pace = Pace(lambda members: 0.05 if 3 in members else 1e-4)
    assert exchanges(pace, 1 << 16, 1e7, 0.05) == 3
    assert exchanges(pace, 1 << 16, 1e7, 1e-4, (0, 1, 2)) == 1


def test_monitors_know_round_trips_once_they_have_met() -> None:
    def work(rank: Rank) -> None:
        monitor = rank.queue().monitor
        others = [r for r in range(rank.size) if r != rank.rank]
        assert all(0 < monitor.latency_s([r]) < 1 for r in others)
        assert monitor.latency_s(range(rank.size)) == max(monitor.latency_s([r]) for r in others)
        assert monitor.latency_s([rank.rank]) == math.inf  # nobody asks itself

    run_ranks(4, work)


def test_of_many_ranks_some_are_asked() -> None:
    def work(rank: Rank) -> int:
        monitor = rank.queue().monitor
        return sum(monitor.latency_s([r]) < math.inf for r in range(rank.size))

    assert run_ranks(20, work) == [16] * 20


def test_a_network_without_datagrams_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "_PING_S", 0.01)
    mine, deaf = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
    for sock in (mine, deaf):
        sock.bind(("127.0.0.1", 0))
    monitor = PeerMonitor(0, [mine.getsockname(), deaf.getsockname()], b"key", mine)
    asked: list[int] = []
    ask = monitor._ask
    monkeypatch.setattr(monitor, "_ask", lambda others, *rest: (asked.extend(others), ask(others, *rest))[1])
    monitor._ping()
    assert asked == [1]
    assert monitor.latency_s([0, 1]) == math.inf
    monitor.close()
    deaf.close()
