"""The choice of compressors: fits the budget where it can, with no more error than needed."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire.comm.compress.choice import Option, choose

DENSE, INT8, TOPK = (Option("dense", 400, 4.0, 0.0), Option("int8", 100, 1.0, 0.01), Option("topk", 10, 0.1, 0.9))


def test_takes_what_the_budget_allows() -> None:
    options = {"a": [DENSE, INT8, TOPK], "b": [DENSE, INT8, TOPK]}

    def labels(budget_s: float) -> list[str]:
        return [choice.option.label for choice in choose(options, budget_s).values()]

    assert labels(8.0) == ["dense", "dense"]
    assert labels(7.9) == ["int8", "dense"]
    assert labels(2.0) == ["int8", "int8"]
    assert labels(1.5) == ["topk", "int8"]
    assert labels(0.0) == ["topk", "topk"]


def test_says_why() -> None:
    fits = choose({"a": [DENSE, INT8]}, 5.0)["a"]
    smaller = choose({"a": [DENSE, INT8]}, 2.0)["a"]
    late = choose({"a": [DENSE, INT8]}, 0.5)["a"]
    free = choose({"a": [DENSE, Option("none", 300, 3.0, 0.0)]}, 9.0)["a"]
    assert fits.reason == "dense fits"
    assert smaller.reason == "4000.0 ms as dense, 1000.0 ms so"
    assert late.reason == "4000.0 ms as dense, 1000.0 ms so: the fastest, and still over the budget"
    assert free.reason == "faster than dense without more error"


def test_never_takes_what_another_beats_in_both() -> None:
    bad = Option("bad", 50, 2.0, 0.5)
    for budget_s in (5.0, 3.0, 1.0, 0.0):
        assert choose({"a": [DENSE, bad, INT8, TOPK]}, budget_s)["a"].option is not bad


option = st.builds(
    Option,
    st.just("x"),
    st.just(1),
    st.integers(0, 20).map(float),
    st.integers(0, 20).map(float),
)


@given(tensors=st.lists(st.lists(option, min_size=1, max_size=4), min_size=1, max_size=4), budget_s=st.integers(0, 60))
@settings(max_examples=300, deadline=None)
def test_fits_whenever_anything_fits_and_errs_by_one_step_at_most(tensors: list[list[Option]], budget_s: int) -> None:
    chosen = [choice.option for choice in choose({str(i): of for i, of in enumerate(tensors)}, budget_s).values()]
    fitting = [
        sum(o.error for o in combination)
        for combination in itertools.product(*tensors)
        if sum(o.seconds for o in combination) <= budget_s
    ]
    assert (sum(o.seconds for o in chosen) <= budget_s) == bool(fitting)
    if fitting:
        # Greedy is at most one step of one tensor away from the relaxed optimum, which bounds the true one.
        largest_step = max(max(o.error for o in of) - min(o.error for o in of) for of in tensors)
        assert sum(o.error for o in chosen) <= min(fitting) + largest_step
