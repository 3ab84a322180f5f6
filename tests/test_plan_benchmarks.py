"""benchmarks/plan_*.py: what they make of foretold and measured seconds."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from thinwire.dist.config import load_config
from thinwire.dist.plan.candidates import candidates_for
from thinwire.dist.plan.cluster import load_cluster


def test_the_summary_names_the_furthest(benchmarks: Path) -> None:
    from plan_accuracy import summary

    rows = [
        {"method": method, "link": "10mbit", "ranks per host": 1, "ratio": ratio}
        for method, ratio in (("a", 1.0), ("b", 0.8), ("c", 1.15))
    ]
    said = summary(rows)
    assert said.startswith("2 of 3 within 15%; median error 15.0%")
    assert "furthest: b, 10mbit, 1 a host: 0.800" in said


def test_the_recommendation_is_the_plans_and_its_regret_the_measured_one(
    benchmarks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import plan_recommendation
    from time_to_loss import Result
    from time_to_loss_ways import OURS

    by_label = {way.label: way for way in plan_recommendation.WAYS}

    def measured(label: str, steps: float, *step_s: float) -> Any:
        first = Result(by_label[label], steps, 120, 2.0, {1e8: step_s[0]}, 0.0)
        return plan_recommendation.Measured(first, {1e8: step_s})

    found = [
        measured("thinwire all-reduce, fp32", 90, 2.0),
        measured("thinwire low rank 16", 100, 0.9, 1.1),
        measured("thinwire int4", 100, 1.1, 1.3),
    ]
    chosen = load_config(plan_recommendation.CONFIGS / "demo.yaml", by_label["thinwire int4"].overrides)
    best = SimpleNamespace(candidate=SimpleNamespace(config=chosen), seconds=lambda steps: 1.2 * steps)
    monkeypatch.setattr(plan_recommendation, "compare", lambda config, cluster: SimpleNamespace(best=best))
    row = plan_recommendation.row_of(found, 1e8, 1, None)
    assert (row["pass"], row["recommended"], row["best"]) == (2, "thinwire int4", "thinwire low rank 16")
    assert row["foretold s"] == pytest.approx(1.2 * 90)
    assert row["regret"] == pytest.approx(120 / 100 - 1)
    assert row["apart"] == pytest.approx(1.3 / 1.1)
    assert by_label.keys() >= {way.label for way in OURS}


def test_only_what_is_near_the_best_is_timed_again(benchmarks: Path) -> None:
    import plan_recommendation
    from time_to_loss import Result

    asked: list[tuple[str, list[float]]] = []

    class Runs:
        def get(self, way: Any, machine: Any, steps: int, rates: list[float]) -> Any:
            asked.append((way.label, rates))
            return SimpleNamespace(timings={rate: SimpleNamespace(seconds=3.0) for rate in rates}, error="")

    def measured(way: Any, fast: float, slow: float) -> Any:
        result = Result(way, 100, 120, 2.0, {1e9: fast, 1e7: slow}, 0.0)
        return plan_recommendation.Measured(result, {1e9: [fast], 1e7: [slow]})

    dense, other = plan_recommendation.WAYS[:2]
    again = plan_recommendation.another_pass(Runs(), [measured(dense, 1.0, 9.0), measured(other, 1.1, 1.0)], [1e9, 1e7])
    assert asked == [(dense.label, [1e9]), (other.label, [1e9, 1e7])]
    assert [one.step_s for one in again] == [{1e9: [1.0, 3.0], 1e7: [9.0]}, {1e9: [1.1, 3.0], 1e7: [1.0, 3.0]}]


def test_what_a_plan_offers_is_what_is_measured(benchmarks: Path) -> None:
    import plan_recommendation

    config = load_config(plan_recommendation.CONFIGS / "demo.yaml", plan_recommendation.SETTINGS)
    cluster = load_cluster(plan_recommendation.CONFIGS / "clusters" / "four_boxes_1gbit.yaml")
    found = {
        candidate.label: plan_recommendation.way_of(candidate.config, list(plan_recommendation.WAYS))
        for candidate in candidates_for(config, cluster)
        if candidate.label != "ZeRO-3"
    }
    assert sorted(found.values()) == sorted(way.label for way in plan_recommendation.WAYS)
    with pytest.raises(SystemExit, match="has not been measured"):
        plan_recommendation.way_of(config, list(plan_recommendation.WAYS[1:]))


def test_ways_are_run_between_two_probes(
    benchmarks: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of which the mean counts; the numbers of the probes do not depend on which ways are asked for."""
    import plan_accuracy

    done: list[str] = []

    def probed(folder: Path, machine: Any, rate_bps: float, number: int) -> float:
        done.append(f"probe {number}")
        return 1.0 + number

    def run(way: Any, machine: Any, rates: Any, runs: Any) -> Any:
        done.append(way.label)
        return {rate: SimpleNamespace(step_s=(4.0,), seconds=4.0, sent_bytes={"world": 1e6}) for rate in rates}

    monkeypatch.setattr(plan_accuracy, "probed", probed)
    monkeypatch.setattr(plan_accuracy, "run", run)
    monkeypatch.setattr(plan_accuracy, "foretell", lambda way, s: plan_accuracy.Foretold(s, 0.5))
    arguments = ["--rates", "1gbit", "--ranks-per-host", "1", "--json", str(tmp_path / "rows.json")]
    monkeypatch.setattr("sys.argv", ["plan_accuracy.py", *arguments, "--only", "int4", "top-k", "one byte"])
    plan_accuracy.main()
    assert done == [
        *("probe 0", "thinwire int4", "probe 1"),
        *("probe 1", "thinwire top-k 1 %, int8", "probe 2"),
        *("probe 3", "thinwire one byte", "probe 4"),
    ]
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["foretold s"] for row in rows] == [1.5, 2.5, 4.5]
    assert [row["ratio"] for row in rows] == [pytest.approx(s / 4) for s in (1.5, 2.5, 4.5)]
    assert rows[0]["last probe / first"] == 2
    assert "furthest: thinwire int4" in capsys.readouterr().out
