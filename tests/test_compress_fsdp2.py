"""The door of FSDP2, in four real processes: each function of fsdp2_program.py is one test here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import fsdp2_program
import pytest


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Of each rank: what each scenario raised."""
    folder = tmp_path_factory.mktemp("fsdp2")
    done = subprocess.run(
        [sys.executable, fsdp2_program.__file__, str(folder)], capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]


@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in fsdp2_program.SCENARIOS])
def test_fsdp2(outcomes: list[dict[str, str]], scenario: str) -> None:
    assert len(outcomes) == 4
    for rank, found in enumerate(outcomes):
        assert not found[scenario], f"rank {rank}: {found[scenario]}"
