"""What happens to disks and processes: kills, damage, full and read-only disks. A sound generation is always left."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from thinwire.dist.checkpoint import Checkpointer, CheckpointError, CheckpointSettings, Loaded

# A process that has imported torch already forks a child for each script: milliseconds instead of seconds.
# Both write to one pipe: by whole lines, also where PYTHONUNBUFFERED would have print() write word by word.
FORK_SERVER = """
import json, os, sys
import torch, thinwire.dist.checkpoint
sys.stdout = open(1, "w", closefd=False)
for line in sys.stdin:
    script, arguments = json.loads(line)
    child = os.fork()
    if child == 0:
        sys.argv[1:] = arguments
        exec(script, {"__name__": "__main__"})
        sys.stdout.flush()
        os._exit(0)
    print("pid", child, flush=True)
    os.waitpid(child, 0)
    print("ended", flush=True)
"""


class Child:
    """A script that runs in a child of the fork server; its lines, and its end."""

    def __init__(self, server: subprocess.Popen[str], script: str, *arguments: object) -> None:
        assert server.stdin is not None
        assert server.stdout is not None
        self._stdout = server.stdout
        server.stdin.write(json.dumps([script, [str(a) for a in arguments]]) + "\n")
        server.stdin.flush()
        self.pid = 0
        self.lines: list[str] = []
        self.has_ended = False
        while not self.pid:
            self._read()

    def read_until(self, count: int) -> None:
        while len(self.lines) < count:
            assert not self.has_ended, self.lines
            self._read()

    def wait(self) -> list[str]:
        while not self.has_ended:
            self._read()
        return self.lines

    def _read(self) -> None:
        line = self._stdout.readline()
        assert line, "the fork server died"
        if line.startswith("pid "):
            self.pid = int(line.split()[1])
        elif line == "ended\n":
            self.has_ended = True
        else:
            self.lines.append(line.rstrip("\n"))


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", FORK_SERVER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def alone(folder: Path) -> Checkpointer:
    return Checkpointer(folder, CheckpointSettings(), group=None, rank=0, world_size=1)


def assert_sound(loaded: Loaded | None) -> int:
    assert loaded is not None
    assert loaded.refused == ()
    assert loaded.per_rank is not None
    assert loaded.shared["step"] == loaded.step
    assert all(w.equal(torch.full((4099,), float(loaded.step))) for w in loaded.shared["weights"])
    assert loaded.per_rank["rng"].equal(torch.full((5,), loaded.step))
    return loaded.step


# Saves generation after generation; each tensor holds its step, so that what is loaded can be checked by value.
# "same" writes the same step over and over. The last argument, if not 0, is which file operation (open, mkdir, rename,
# remove, ...) of the first save to die before.
WRITER = """
import itertools, os, signal, sys
from pathlib import Path
import torch
from thinwire.dist.checkpoint import Checkpointer, CheckpointSettings

folder, mode, die_at = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
checkpoints = Checkpointer(folder, CheckpointSettings(), group=None, rank=0, world_size=1)
loaded = checkpoints.load_latest()
start = loaded.step if loaded else 0
print(start, flush=True)
operations = 0

def audit(event, arguments):
    global operations
    if event.startswith(("open", "os.", "shutil.")) and event != "os.kill":
        operations += 1
        if operations == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

if die_at:
    sys.addaudithook(audit)
for count in itertools.count(1):
    step = 7 if mode == "same" else start + count
    shared = {"weights": [torch.full((4099,), float(step)) for _ in range(4)], "step": step}
    checkpoints.save(step, shared, {"rng": torch.full((5,), step)})
    print(step, flush=True)
    if die_at:
        break
"""


@pytest.mark.parametrize("mode", ["next", "same"])
def test_kill_9_at_random_moments_leaves_a_sound_generation(
    tmp_path: Path, server: subprocess.Popen[str], mode: str
) -> None:
    chance = random.Random(20)
    for _ in range(30):
        child = Child(server, WRITER, tmp_path, mode, 0)
        child.read_until(1 + chance.randint(1, 3))  # one line for the start and one for each save
        for _ in range(chance.randint(0, 50_000)):  # a random moment within the next save
            pass
        os.kill(child.pid, signal.SIGKILL)
        saved = [int(line) for line in child.wait()]
        assert assert_sound(alone(tmp_path).load_latest()) >= saved[-1]
        assert len(list(tmp_path.iterdir())) <= 5


@pytest.mark.parametrize("mode", ["next", "same"])
def test_kill_9_before_each_file_operation_leaves_a_sound_generation(
    tmp_path: Path, server: subprocess.Popen[str], mode: str
) -> None:
    child = Child(server, WRITER, tmp_path, mode, 0)
    child.read_until(4)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    for die_at in range(1, 1000):
        saved = [int(line) for line in Child(server, WRITER, tmp_path, mode, die_at).wait()]
        assert assert_sound(alone(tmp_path).load_latest()) >= saved[-1]
        assert len(list(tmp_path.iterdir())) <= 5
        if len(saved) == 2:  # it saved, and had no operation left to die before
            break
    assert die_at > 20


@pytest.fixture(scope="module")
def two_generations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "run"
    checkpoints = alone(folder)
    for step in (1, 2):
        shared = {"weights": [torch.full((4099,), float(step))], "step": step, "empty": torch.empty(0)}
        checkpoints.save(step, shared, {"rng": torch.full((5,), step)}, {"config": "abc"})
    return folder


def assert_falls_back(folder: Path, told: str) -> None:
    loaded = alone(folder).load_latest()
    assert assert_sound_step_one(loaded)
    assert loaded is not None
    assert len(loaded.refused) == 1
    assert loaded.refused[0].startswith("step-00000002: ")
    assert told in loaded.refused[0]


def assert_sound_step_one(loaded: Loaded | None) -> bool:
    return (
        loaded is not None
        and loaded.step == loaded.shared["step"] == 1
        and loaded.shared["weights"][0].equal(torch.ones(4099))
        and loaded.per_rank is not None
        and loaded.per_rank["rng"].equal(torch.ones(5, dtype=torch.int64))
    )


FILES = ["manifest.json", "metadata.json", "rank-00000.bin", "rank-00000.json", "shared-00000.bin"]


def test_the_files_are_those_that_the_damage_tests_damage(two_generations: Path) -> None:
    assert sorted(p.name for p in (two_generations / "step-00000002").iterdir()) == FILES
    assert alone(two_generations).load_latest().step == 2  # type: ignore[union-attr]


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_byte_is_found(two_generations: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(two_generations, folder)
    damaged = folder / "step-00000002" / name
    sound = damaged.read_bytes()
    chance = random.Random(name)
    places = {0, len(sound) - 1, *(chance.randrange(len(sound)) for _ in range(40))}
    for place in sorted(places):
        flipped = bytearray(sound)
        flipped[place] ^= chance.randint(1, 255)
        damaged.write_bytes(flipped)
        assert_falls_back(folder, name)


@pytest.mark.parametrize("name", FILES)
def test_every_cut_grown_or_missing_file_is_found(two_generations: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(two_generations, folder)
    damaged = folder / "step-00000002" / name
    sound = damaged.read_bytes()
    for content in (b"", sound[:1], sound[: len(sound) // 2], sound[:-1], sound + b"\n", bytes(len(sound))):
        damaged.write_bytes(content)
        assert_falls_back(folder, name)
    damaged.unlink()
    assert_falls_back(folder, name)
    damaged.mkdir()
    assert_falls_back(folder, name)


def test_a_generation_without_files_is_refused(two_generations: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(two_generations, folder)
    for path in (folder / "step-00000002").iterdir():
        path.unlink()
    assert_falls_back(folder, "manifest.json cannot be read")


def test_a_file_swapped_with_the_older_generation_is_found(two_generations: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(two_generations, folder)
    for name in FILES[1:]:
        shutil.copy(folder / "step-00000001" / name, folder / "step-00000002" / name)
        assert_falls_back(folder, "")


# A limit on file size stands for a full disk: the kernel fails write() half-way through a file, with EFBIG.
FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
from thinwire.dist.checkpoint import Checkpointer, CheckpointError, CheckpointSettings

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
checkpoints = Checkpointer(Path(sys.argv[1]), CheckpointSettings(), group=None, rank=0, world_size=1)
checkpoints.save(1, {"x": torch.ones(100)}, {})
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
for size in (20_000, 200_000):
    try:
        checkpoints.save(2, {"x": torch.ones(size)}, {})
    except CheckpointError as error:
        print(error)
checkpoints.save(3, {"x": torch.ones(100)}, {})
"""


def test_a_disk_that_fills_up_is_named_and_the_older_generation_stays(
    tmp_path: Path, server: subprocess.Popen[str]
) -> None:
    lines = Child(server, FULL_DISK, tmp_path).wait()
    assert len(lines) == 2
    for line in lines:
        assert "save of step 2 failed" in line
        assert "File too large" in line
        assert "shared-00000.bin" in line
        assert f"older checkpoints in {tmp_path} are intact" in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]
    assert alone(tmp_path).load_latest().step == 3  # type: ignore[union-attr]


def test_a_folder_that_cannot_be_written_is_told_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"creation of the checkpoint folder failed.*Not a directory"):
        alone(tmp_path / "file" / "run")
    if os.geteuid() == 0:
        # Permissions do not stop root; /proc does.
        with pytest.raises(CheckpointError, match="creation of the checkpoint folder failed"):
            alone(Path("/proc/sys/thinwire"))
        return
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(CheckpointError, match="Permission denied"):
            alone(tmp_path / "run")
    finally:
        tmp_path.chmod(0o700)


def test_old_files_that_cannot_be_removed_do_not_fail_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def stuck(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("thinwire.dist.checkpoint_generation.remove", stuck)
    checkpoints = alone(tmp_path)
    for step in (1, 2, 3):
        checkpoints.save(step, {}, {})
    assert "could not remove old files" in caplog.text
    assert alone(tmp_path).load_latest().step == 3  # type: ignore[union-attr]
