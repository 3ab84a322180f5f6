"""`thinwire train` as a process: signals, exit codes, what it prints and what it leaves in the run folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from worlds import small_config_file

from thinwire.dist.config import load_config
from thinwire.dist.metrics import read_records

TRAIN = ["-m", "thinwire", "train"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "thinwire", "train"]
DEADLINE_S = 120


@contextmanager
def process(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    child = subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        yield child
    finally:
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        child.communicate()


def wait_for_line(child: subprocess.Popen[str], start: str) -> str:
    """What was printed up to the line that begins so."""
    assert child.stdout is not None
    seen = ""
    for line in child.stdout:
        seen += line
        if line.startswith(start):
            return seen
    raise AssertionError(f"no line began with {start!r}: {seen}{child.stderr.read() if child.stderr else ''}")


@pytest.mark.parametrize(
    ("launcher", "number", "settings"),
    [
        (TRAIN, signal.SIGUSR1, []),
        (TORCHRUN, signal.SIGTERM, ["method={kind: partition, preset: zero3}"]),  # FSDP2 is what may abort at the end
    ],
    ids=["alone", "fsdp2"],
)
def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(
    tmp_path: Path, launcher: list[str], number: signal.Signals, settings: list[str]
) -> None:
    config = small_config_file(tmp_path)
    with process(*launcher, config, "train.steps=100000", "output.every_s=0", *settings) as child:
        out = wait_for_line(child, "step 3/")
        ranks = [p for p in psutil.Process(child.pid).children(recursive=True) if "train" in p.cmdline()]
        os.kill(ranks[-1].pid if ranks else child.pid, number)
        rest, errors = child.communicate(timeout=DEADLINE_S)
    assert child.returncode == 0, errors
    assert "\r" not in out + rest
    assert "stopped after step" in rest
    step = int(rest.rsplit("stopped after step", 1)[1].split(":")[0])
    folder = tmp_path / "runs" / "small"
    assert (folder / "checkpoints" / f"step-{step:08d}").is_dir()
    assert [record["step"] for record in read_records(folder / "metrics.jsonl")] == list(range(1, step + 1))
    shown = load_config(folder / "config.yaml")
    assert shown == load_config(config, ["train.steps=100000", "output.every_s=0", *settings])
    if launcher is TORCHRUN:
        return  # that several ranks continue bit for bit is shown with threads, in a fraction of the time

    with process(*launcher, config, f"train.steps={step + 2}") as child:
        rest, errors = child.communicate(timeout=DEADLINE_S)
    assert child.returncode == 0, errors
    assert f"after {step} steps" in rest
    records = read_records(folder / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, step + 3))
    assert [record["seconds"] for record in records] == sorted(record["seconds"] for record in records)


def test_a_second_signal_kills() -> None:
    script = (
        "import os, signal\n"
        "from thinwire.dist.stop import StopRequest\n"
        "stop = StopRequest()\n"
        "stop.listen()\n"
        "os.kill(os.getpid(), signal.SIGUSR1)\n"
        "print(stop.reason, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "print('still here', flush=True)\n"
    )
    with process("-c", script) as child:
        out, _ = child.communicate(timeout=DEADLINE_S)
    assert out == "SIGUSR1\n"
    assert child.returncode == -signal.SIGTERM


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.files=[nowhere/*.txt]", "data.files: 'nowhere/*.txt' matches no file"),
        ("train.micro_batch=5", "train.micro_batch: 5 does not divide"),
    ],
)
def test_a_users_mistake_is_one_message_and_exit_code_2(tmp_path: Path, override: str, says: str) -> None:
    with process(*TRAIN, small_config_file(tmp_path), override) as child:
        _, errors = child.communicate(timeout=DEADLINE_S)
    assert child.returncode == 2
    assert says in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "runs" / "small" / "checkpoints").exists()
