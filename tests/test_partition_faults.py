"""A rank of a partitioned run dies in backward: every survivor says which, in time, and from wherever it was."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import partition_fault_program as program

SLACK_S = 25.0  # what a busy machine may need to let four processes notice


def test_every_survivor_names_the_dead_rank_within_the_deadline(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, program.__file__, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    told = {int(path.stem): json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert sorted(told) == [rank for rank in range(program.RANKS) if rank != program.VICTIM]
    for one in told.values():
        assert one["error"] == "PeerLostError"
        assert one["ranks"] == [program.VICTIM]
        assert one["operation"].startswith(("partition/", "control/"))
        assert one["seconds"] < program.DEADLINE_S + SLACK_S
