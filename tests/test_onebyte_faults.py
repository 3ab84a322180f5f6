"""In the lab, machines are killed, stopped and cut off, come back and are new: all end with equal weights and logs."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

from thinwire.launch.lab import Lab, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = ROOT / "benchmarks" / "onebyte_faults.py"
    monkeypatch.syspath_prepend(str(path.parent))
    specification = importlib.util.spec_from_file_location("onebyte_faults_benchmark", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, specification.name, module)
    specification.loader.exec_module(module)
    return module


def machine(folder: Path, settings: str) -> Sequence[str]:
    return [sys.executable, str(ROOT / "tests" / "onebyte_machine.py"), str(folder), settings]


def test_kill_stop_cut_rejoin_and_newcomer_in_one_run(benchmark: ModuleType, tmp_path: Path) -> None:
    settings = {"heartbeat_s": 0.2, "suspicion_s": 0.6, "deadline_s": 20.0, "samples": 3, "sync": False}
    with Lab(hosts=5, rate_bps=10e6, delay_s=0.05) as lab:
        story = benchmark.play(lab, tmp_path, machine, settings, calm=3)
    assert len(story.rows) == 7
    rows = benchmark.verdicts(story)
    assert {row["equal weights"] for row in rows} == {"yes"}
    assert {row["log without gap or repetition"] for row in rows} == {"yes"}
    assert {row["log as the others'"] for row in rows} == {"yes"}
    assert {row["rounds"] for row in rows} == {rows[0]["rounds"]}
    assert sorted(row["slot"] for row in rows) == [0, 1, 2, 3, 4]
    for host in story.hosts:
        assert host.end[2]["contribution_bytes"] == (24 + 3) * host.end[2]["contributions_sent"]
