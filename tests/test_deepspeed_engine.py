"""Engine deepspeed, in four real processes: each function of deepspeed_program.py is one test here."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import deepspeed_program
import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install thinwire[deepspeed]"
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Of each rank: what each scenario raised."""
    folder = tmp_path_factory.mktemp("deepspeed")
    done = subprocess.run(
        [sys.executable, deepspeed_program.__file__, str(folder)],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]


@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in deepspeed_program.SCENARIOS])
def test_deepspeed(outcomes: list[dict[str, str]], scenario: str) -> None:
    assert len(outcomes) == deepspeed_program.RANKS
    for rank, found in enumerate(outcomes):
        assert not found[scenario], f"rank {rank}: {found[scenario]}"
