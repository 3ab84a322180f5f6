"""Little contact and one merge: what 2507.06542 found, on a task of a second; benchmarks/gossip_single_merge.py."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = Path(__file__).resolve().parent.parent / "benchmarks" / "gossip_single_merge.py"
    monkeypatch.syspath_prepend(str(path.parent))
    specification = importlib.util.spec_from_file_location("single_merge_benchmark", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, specification.name, module)
    specification.loader.exec_module(module)
    return module


def test_a_quarter_of_the_messages_and_one_merge_give_most_of_what_averaging_gives(benchmark):
    class Short(benchmark.Mixture):
        rounds = 40

    def train(way):
        return benchmark.train(lambda seed: Short(16, seed), way, 0)

    none, late = train(benchmark.NONE), train(benchmark.LATE)
    assert none["messages"] == pytest.approx(2 * 15 / 16, abs=0.02)  # the merge alone
    assert none["messages"] < late["messages"] <= 0.25 * Short.rounds
    assert late["merged"] - late["local"] >= 0.1
    assert late["merged"] - none["merged"] >= 0.1
    assert late["curve"][-1] == (40, late["local"], late["merged"])
