"""comm/pace.py: it tries every choice, takes the fastest, and notices when another has become so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from thinwire.comm.pace import Pace

SLICE = 100_000


def exchanges(pace: Pace, count: int, seconds_of: Callable[[int], float], ranks: int = 4) -> list[int]:
    chosen = []
    for _ in range(count):
        chosen.append(pace.choose(ranks, SLICE))
        pace.tell(ranks, SLICE, chosen[-1], seconds_of(chosen[-1]))
    return chosen


@pytest.mark.parametrize(("ranks", "choices"), [(2, [1]), (3, [1, 2]), (4, [1, 2, 3]), (9, [1, 2, 8])])
def test_one_two_and_all_are_tried_three_times_in_a_row(ranks: int, choices: list[int]) -> None:
    tried = exchanges(Pace(), 3 * len(choices), lambda _: 1.0, ranks)
    assert tried == [choice for choice in choices for _ in range(3)]


@pytest.mark.parametrize("best", [1, 2, 3])
def test_the_fastest_is_taken_and_others_now_and_then(best: int) -> None:
    taken = Counter(exchanges(Pace(), 300, lambda choice: 1.0 if choice == best else 1.2)[9:])
    assert taken[best] > 280
    assert len(taken) == 3


def test_another_link_is_noticed() -> None:
    pace = Pace()
    exchanges(pace, 100, float)
    later = exchanges(pace, 1000, lambda choice: 4.0 - choice)
    assert Counter(later[-100:])[3] > 90


def test_one_late_peer_does_not_decide() -> None:
    pace = Pace()
    exchanges(pace, 9, float)
    pace.tell(4, SLICE, 1, 60.0)
    assert pace.choose(4, SLICE) == 1


def test_sizes_and_groups_are_learnt_apart() -> None:
    pace = Pace()
    exchanges(pace, 50, float)
    assert [pace.choose(4, SLICE // 16), pace.choose(3, SLICE)] == [1, 1]
    for _ in range(3):
        pace.tell(4, SLICE // 16, 1, 1.0)
    assert pace.choose(4, SLICE // 16) == 2
    assert pace.choose(4, SLICE) == 1
