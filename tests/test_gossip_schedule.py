from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from thinwire.comm.gossip.budget import Budget, BudgetSettings
from thinwire.comm.gossip.graphs import build_graph
from thinwire.comm.gossip.graphs.random_graphs import MatchingSettings
from thinwire.comm.gossip.graphs.regular import RingSettings, StarSettings
from thinwire.comm.gossip.merge import merge_bytes
from thinwire.comm.gossip.schedule import (
    EverySettings,
    GossipScheduleSettings,
    RandomSettings,
    SingleMergeSettings,
    WindowSettings,
    build_schedule,
)
from thinwire.comm.gossip.spacing import Spread

RING = build_graph(RingSettings(), 6, 0)
MATCHING = build_graph(MatchingSettings(), 6, 0)


def turns(settings, steps, graph=RING, seed=1, cost_bytes=100):
    schedule = build_schedule(settings, graph, steps, seed, cost_bytes)
    return [schedule.turn(step) for step in range(steps)]


def talking(given):
    return [turn.step for turn in given if turn.mixing is not None]


def edges(turn):
    return {(i, j) for i in range(turn.mixing.size) for j in turn.mixing.sources(i)}


def test_every_so_many_steps_with_the_rounds_of_the_graph_in_order():
    plan = turns(EverySettings(steps=3, merge_at=6), 10, MATCHING)
    assert talking(plan) == [2, 5, 8]
    assert [plan[step].round for step in (2, 5, 8)] == [0, 1, 2]
    assert [plan[step].mixing for step in (2, 5, 8)] == [MATCHING.mixing(round) for round in range(3)]
    assert [turn.step for turn in plan if turn.merge] == [5]


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=4))
def test_a_spread_counts_its_exchanges_right(parts):
    first, round_counts = 0, []
    for length, count in parts:
        spread = Spread(first, first + length, min(count, length))
        has = [spread.has(round) for round in range(first + length + 5)]
        assert sum(has) == (min(count, length) if length else 0)
        assert not any(has[:first] + has[first + length :])
        assert [spread.before(round) for round in range(len(has))] == [sum(has[:round]) for round in range(len(has))]
        first += length
        round_counts.append(sum(has))


def test_random_edges_are_the_same_on_all_machines_and_as_many_as_asked_for():
    settings = RandomSettings(probability=0.2, every=2)
    plan, again = turns(settings, 8000, seed=3), turns(settings, 8000, seed=3)
    used = [edges(turn) for turn in plan if turn.mixing is not None]
    assert [edges(turn) for turn in again if turn.mixing is not None] == used
    assert all((j, i) in pairs for pairs in used for i, j in pairs)
    drawn = 4000 * 6
    assert sum(map(len, used)) / 2 == pytest.approx(0.2 * drawn, abs=4 * (drawn * 0.16) ** 0.5)


def test_a_single_merge_at_the_end_with_a_dense_window_before_it():
    settings = SingleMergeSettings(probability=0.0, every=5, window=WindowSettings(rounds=4))
    plan = turns(settings, 100)
    dense = [turn.step for turn in plan if turn.mixing is not None and edges(turn)]
    assert dense == [84, 89, 94]  # the merge replaces the fourth
    assert [turn.step for turn in plan if turn.merge] == [99]
    assert all(turn.mixing == RING.mixing(0) for turn in plan if turn.step in dense)


@pytest.mark.parametrize(("start", "expected"), [(0, [4, 9, 14]), (7, [39, 44, 49]), ("end", [89, 94])])
def test_a_window_lies_where_it_is_told(start, expected):
    window = WindowSettings(rounds=3, start=start, graph="complete")
    plan = turns(SingleMergeSettings(probability=0.0, every=5, window=window), 100)
    assert [turn.step for turn in plan if turn.mixing is not None and len(edges(turn)) == 30] == expected


def test_rounds_are_numbered_through_all_parts():
    window = WindowSettings(rounds=3, start=2)
    plan = turns(SingleMergeSettings(probability=0.5, every=2, window=window), 20, MATCHING)
    assert [turn.round for turn in plan if turn.mixing is not None] == list(range(9))
    assert [plan[2 * round + 1].mixing for round in (2, 3, 4)] == [MATCHING.mixing(round) for round in (2, 3, 4)]


@pytest.mark.parametrize("spend", ["late", "early", "even"])
def test_a_budget_is_kept_and_spent_where_it_is_told(spend):
    numel, vector = 960, 3840
    settings = BudgetSettings(total_bytes=24 * vector, spend=spend, reserve=0.5, every=2)
    plan = turns(settings, 100, cost_bytes=vector)
    steps = talking(plan)
    assert 2 * len(steps) * vector + merge_bytes(numel, 4, 0, 6) <= settings.total_bytes
    assert len(steps) == 11  # of two vectors each, and two for the merge
    assert [turn.step for turn in plan if turn.merge] == [99]
    thirds = [sum(low <= step < low + 34 for step in steps) for low in (0, 33, 66)]
    if spend == "late":
        assert steps[-6:] == [87, 89, 91, 93, 95, 97]  # the last round ends with the merge
        assert thirds[2] > 2 * thirds[0]
    elif spend == "early":
        assert steps[:6] == [1, 3, 5, 7, 9, 11]
        assert thirds[0] > 2 * thirds[2]
    else:
        assert max(thirds) - min(thirds) <= 1


def test_bytes_per_step_and_seconds_buy_the_same():
    for graph, degree in ((RING, 2), (MATCHING, 1), (build_graph(StarSettings(), 6, 0), 5)):
        per_step = Budget(BudgetSettings(bytes_per_step=60, merge_at=None), graph, 100, 100)
        assert per_step.exchanges == 60 // degree
        # 1000 bit/s carry a vector of 100 bytes in 0.8 s
        seconds = Budget(BudgetSettings(seconds=48, link_bps=1000, merge_at=None), graph, 100, 100)
        assert seconds.exchanges == 60 // degree
    slow = BudgetSettings(seconds=48, link_bps=1000, latency_s=0.8, merge_at=None)
    assert Budget(slow, MATCHING, 100, 100).exchanges == 30


@pytest.mark.parametrize(
    ("settings", "steps", "said"),
    [
        (EverySettings(merge_at=101), 100, "merge_at: 101 lies past the end"),
        (SingleMergeSettings(merge_at=700), 600, "merge_at: 700 lies past the end"),
        (BudgetSettings(total_bytes=1e6, merge_at=101), 100, "merge_at: 101 lies past the end"),
        (SingleMergeSettings(window=WindowSettings(rounds=8, start=93)), 100, "8 rounds from 93 do not fit"),
        (SingleMergeSettings(window=WindowSettings(rounds=101)), 100, "101 rounds from end do not fit"),
        (SingleMergeSettings(window=WindowSettings(rounds=8)), None, "give steps="),
        (
            BudgetSettings(bytes_per_step=1),
            100,
            "does not pay for one exchange: that takes 200 bytes and the merge 200",
        ),
        (BudgetSettings(seconds=0.1, link_bps=1000, merge_at=None), 100, "that takes 1.6 s; allow more"),
        (BudgetSettings(bytes_per_step=1), None, "say how many with steps="),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_reason(settings, steps, said):
    with pytest.raises(ValueError, match=said):
        build_schedule(settings, RING, steps, 0, 100)


def test_a_budget_needs_messages_of_one_length():
    with pytest.raises(ValueError, match="messages are all of one length"):
        build_schedule(BudgetSettings(bytes_per_step=1000), RING, 100, 0, None)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"kind": "single_merge", "probability": 0}, "there is no window"),
        ({"kind": "budget"}, "given are none"),
        ({"kind": "budget", "seconds": 5}, "seconds and link_bps"),
        ({"kind": "budget", "seconds": 5, "link_bps": 1e6, "total_bytes": 3}, "total_bytes and seconds"),
        ({"kind": "random", "probability": 1.5}, "less than or equal to 1"),
        ({"kind": "sometimes"}, "does not match any of the expected tags"),
        ({"kind": "every", "steps": 0}, "greater than 0"),
        ({"kind": "every", "merge_at": "middle"}, "merge_at"),
    ],
)
def test_settings_that_make_no_sense_are_refused(given, said):
    with pytest.raises(ValidationError, match=said):
        TypeAdapter(GossipScheduleSettings).validate_python(given)


def test_a_name_alone_means_its_defaults():
    adapter = TypeAdapter(GossipScheduleSettings)
    assert adapter.validate_python("single_merge") == SingleMergeSettings()
    assert adapter.validate_python("every") == EverySettings()


def test_a_run_of_unknown_length_goes_on_and_does_not_merge_by_itself():
    schedule = build_schedule(SingleMergeSettings(probability=1.0, every=10), RING, None, 0)
    far = [schedule.turn(step) for step in range(10**9, 10**9 + 20)]
    assert [turn.round for turn in far if turn.mixing is not None] == [10**8, 10**8 + 1]
    assert not any(turn.merge for turn in far)
