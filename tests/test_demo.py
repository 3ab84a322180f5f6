"""`thinwire demo` from end to end: in the lab, and where a machine forbids it."""

from __future__ import annotations

from pathlib import Path

import pytest

from thinwire.launch import demo
from thinwire.launch.lab import why_not


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_in_the_lab_the_interface_confirms_the_meter(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first, and those whose table has a note; the methods between them have runs of their own elsewhere.
    monkeypatch.setattr(demo, "VARIANTS", (demo.VARIANTS[0], *[v for v in demo.VARIANTS if v.note]))
    assert demo.demo(hosts=2, rate_bps=1e9, steps=2, folder=tmp_path) == 0
    said = capfd.readouterr().out
    assert "emulate" not in said
    (ratio,) = [line.split("│")[2] for line in said.splitlines() if "interface / metered" in line]
    assert 1.0 < float(ratio) < 1.15  # of the all-reduce
    assert (tmp_path / "loss.png").exists()


def test_without_namespaces_it_says_so_and_marks_the_times(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "why_not", lambda: "this kernel has no network namespaces")
    monkeypatch.setattr(demo, "VARIANTS", demo.VARIANTS[:1])
    assert demo.demo(hosts=2, rate_bps=1e9, steps=2, folder=tmp_path) == 0
    said = capfd.readouterr().out
    assert "This machine cannot emulate hosts: this kernel has no network namespaces" in said
    assert "seconds per step (link modelled)" in said
    assert "shared" in said
