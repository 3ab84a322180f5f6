"""benchmarks/plan_*.py: what they make of foretold and measured seconds."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The folder's modules can be imported, and are forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in set(sys.modules) - before:
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_the_summary_names_the_furthest(benchmarks: None) -> None:
    from plan_accuracy import summary

    rows = [
        {"method": method, "link": "10mbit", "ranks per host": 1, "ratio": ratio}
        for method, ratio in (("a", 1.0), ("b", 0.8), ("c", 1.15))
    ]
    said = summary(rows)
    assert said.startswith("2 of 3 within 15%; median error 15.0%")
    assert "furthest: b, 10mbit, 1 a host: 0.800" in said


def test_the_recommendation_is_the_foretold_best_and_its_regret_the_measured_one(
    benchmarks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import plan_recommendation
    from plan_accuracy import Foretold
    from time_to_loss import Result
    from time_to_loss_ways import Contender

    def result(label: str, steps: float, step_s: float, dense_steps: int = 0) -> Any:
        return Result(Contender(label, dense_steps=dense_steps), steps, 120, 2.0, {1e8: step_s}, 0.0)

    # fp32: 90 steps of 2 s; fast: 100 of 1 s, foretold as 1.2 s; dense: 99 of 1.1 s and one of fp32's.
    found = [result("fp32", 90, 2.0), result("fast", 100, 1.0), result("dense", 100, 1.1, 1)]
    foretold = {"fp32": 2.0, "fast": 1.2, "dense": 1.0}
    monkeypatch.setattr(plan_recommendation, "foretell", lambda way, cluster: Foretold(foretold[way.label], 0.5))
    row = plan_recommendation.row_of(found, 1e8, None)
    assert (row["recommended"], row["best"]) == ("dense", "fast")
    assert row["foretold s"] == pytest.approx(99 * 1.0 + 2.0)
    assert row["measured s"] == pytest.approx(99 * 1.1 + 2.0)
    assert row["regret"] == pytest.approx((99 * 1.1 + 2.0) / 100 - 1)
    assert math.isclose(row["its s"], 100.0)
