"""A rank of a real run dies, stops or is cut off: every survivor says which, in time, and the job ends."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import pytest

from thinwire.launch.lab import Lab, Run, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

VICTIM = 2
SURVIVORS = [0, 1, 3]
DEADLINE_S = 6.0
# What a busy machine may need to let four processes notice, print and end. The product's promise is DEADLINE_S + 2.
SLACK_S = 25.0

FAULTS: dict[str, Callable[[Lab, Run], None]] = {
    "killed": lambda lab, run: run.signal(VICTIM, signal.SIGKILL),
    "stopped": lambda lab, run: run.signal(VICTIM, signal.SIGSTOP),
    "cut off": lambda lab, run: lab.cut(VICTIM),
}


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(hosts=4) as lab:
        yield lab


@pytest.mark.parametrize("fault", FAULTS)
def test_every_survivor_names_the_lost_rank_and_the_job_fails(fault: str, lab: Lab, tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(f"all work and no play makes jack {i} a dull boy\n" * 20)
    config = tmp_path / "tiny.yaml"
    config.write_text(
        "model: {kind: gpt, layers: 1, heads: 1, width: 16, context: 16}\n"
        f"data: {{corpus: files, files: ['{tmp_path}/*.txt'], validation_fraction: 0.2}}\n"
        "optimizer: {kind: sgd, lr: 0.01}\n"
        "train: {steps: 1000000, global_batch: 4, eval_windows: 0}\n"
        "method: {kind: allreduce}\n"
        f"world: {{timeout_s: {DEADLINE_S}, threads: 1}}\n"
        f"output: {{folder: '{tmp_path / 'runs'}'}}\n"
    )
    command = [sys.executable, "-m", "thinwire", "train", str(config)]
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    errors = tmp_path / "rank0.err"
    reader, writer = pipe_of_lines()
    with errors.open("w") as stderr, lab.start(command, output=outputs, stdout=writer, stderr=stderr) as run:
        writer.close()
        for line in reader:
            if line.startswith("step "):
                break
        else:
            pytest.fail(f"the run ended before its first step: {errors.read_text()}")
        FAULTS[fault](lab, run)
        began = time.monotonic()
        for _ in reader:
            pass  # until rank 0 has ended
        run.signal(VICTIM, signal.SIGKILL)  # one that is stopped cannot end by itself
        code = run.wait(timeout_s=120, grace_s=SLACK_S)
        took_s = time.monotonic() - began
        lab.restore(VICTIM)
        assert code != 0
        for rank in SURVIVORS:
            said = errors.read_text() if rank == 0 else "".join(p.read_text() for p in outputs.glob(f"*{rank}*"))
            assert "PeerLostError" in said, f"rank {rank} said: {said}"
            assert f"No answer from rank {VICTIM}: dead, stopped or cut off." in said
            assert run.returncodes[rank] not in (0, None)
            assert run.returncodes[rank] > 0, "ended by itself, not by a signal"
    reader.close()
    assert took_s < DEADLINE_S + 2 + SLACK_S


def pipe_of_lines() -> tuple[TextIO, TextIO]:
    read, write = os.pipe()
    return os.fdopen(read), os.fdopen(write, "w")
