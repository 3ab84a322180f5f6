"""launch/lab: ranks on emulated hosts, their end, and that nothing of a lab outlives it."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from thinwire.launch.lab import Lab, LabError, Links, running_labs, why_not
from thinwire.launch.lab.control import lab_folder
from thinwire.launch.lab.counters import parse_net_dev

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"no lab on this machine: {why_not()}")

CLI = [sys.executable, "-m", "thinwire", "lab"]


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(hosts=2, ranks_per_host=2) as lab:
        yield lab


def start_shell(lab: Lab, script: str, folder: Path) -> tuple[int, list[int | None], list[str]]:
    """Exit code, those of the ranks, and what each rank wrote."""
    with (folder / "rank0.log").open("w") as log:
        run = lab.start(["sh", "-c", script], output=folder, stdout=log, stderr=log)
        code = run.wait(60, grace_s=0.2)
    return code, run.returncodes, [(folder / f"rank{rank}.log").read_text() for rank in range(lab.spec.world_size)]


def test_ranks_know_their_place(lab: Lab, tmp_path: Path) -> None:
    names = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE MASTER_ADDR THINWIRE_LAB"
    script = "; ".join(f"echo ${name}" for name in names.split()) + "; hostname; pwd; getent hosts host1"
    code, _, texts = start_shell(lab, script, tmp_path)
    assert code == 0
    for rank, text in enumerate(texts):
        node, local = divmod(rank, 2)
        place = [rank, 4, local, 2, node, 2, "10.77.0.1", lab.id, f"host{node}", Path.cwd()]
        assert text.split() == [*map(str, place), "10.77.0.2", "host1"]


def test_exit_code_is_that_of_the_first_failure(lab: Lab, tmp_path: Path) -> None:
    code, codes, _ = start_shell(lab, "[ $RANK = 2 ] && exit 7; exec sleep 1000", tmp_path)
    assert code == 7
    assert codes == [-signal.SIGTERM, -signal.SIGTERM, 7, -signal.SIGTERM]
    code, codes, _ = start_shell(lab, "[ $RANK = 1 ] && kill -9 $$; exit 0", tmp_path)
    assert (code, codes) == (137, [0, -9, 0, 0])


def test_others_may_fail_by_themselves(lab: Lab, tmp_path: Path) -> None:
    go = tmp_path / "go"
    script = f"[ $RANK = 0 ] && exit 3; until [ -e {go} ]; do sleep 0.05; done; exit 5"
    run = lab.start(["sh", "-c", script], output="rank0")
    until(lambda: run.returncodes[0] == 3)
    with pytest.raises(TimeoutError, match="rank 1, rank 2, rank 3 still running"):
        run.wait(timeout_s=0)
    go.touch()
    assert run.wait(60) == 3
    assert run.returncodes == [3, 5, 5, 5]


def test_stop_ends_stopped_and_stubborn_ranks(lab: Lab, tmp_path: Path) -> None:
    ready = f"touch {tmp_path}/$RANK; while :; do sleep 0.05; done"
    run = lab.start(["sh", "-c", f"[ $RANK = 3 ] && trap '' TERM; {ready}"])
    until(lambda: len(list(tmp_path.iterdir())) == 4)
    run.signal(1, signal.SIGSTOP)
    until(lambda: psutil.Process(run.pids[1]).status() == psutil.STATUS_STOPPED)
    run.stop(grace_s=1)
    assert run.returncodes == [-signal.SIGTERM] * 3 + [-signal.SIGKILL]


def test_unknown_program_and_host(lab: Lab) -> None:
    with pytest.raises(LabError, match="no-such-program"):
        lab.start(["no-such-program"])
    with pytest.raises(LabError, match="host7 does not exist: this lab has host0 to host1"):
        lab.exec(7, ["true"])
    with pytest.raises(LabError, match="started without --delay"):
        lab.slow(0, delay_s=0.5)
    with pytest.raises(LabError, match="no lab called 'gone'"):
        Links("gone").counters()


def test_exec(lab: Lab) -> None:
    done = lab.exec(1, ["sh", "-c", "hostname; echo no >&2; exit 3"])
    assert (done.stdout, done.stderr, done.returncode) == ("host1\n", "no\n", 3)
    with pytest.raises(TimeoutError):
        lab.exec(1, ["sleep", "1000"], timeout_s=0.1)


def test_output_of_ranks(tmp_path: Path) -> None:
    script = "echo out $RANK; printf 'no newline' >&2; [ $RANK != 1 ]"
    for output, shown in (("all", True), ("rank0", False)):
        done = subprocess.run(
            [*CLI, "--hosts", "3", "--output", output, "--", "sh", "-c", script],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 1
        assert done.stdout == "out 0\n"
        assert "[rank 1] out 1\n" in done.stderr  # rank 1 failed: its last lines are shown either way
        assert ("[rank 2] out 2\n" in done.stderr) == shown
        assert "rank 1 ended with exit code 1" in done.stderr
        assert "host2: sent " in done.stderr


def test_rank_0_has_the_terminal() -> None:
    ours, theirs = pty.openpty()
    script = "if [ $RANK = 0 ]; then test -t 1; else test ! -t 1; fi"
    try:
        done = subprocess.run(
            [*CLI, "--hosts", "2", "--", "sh", "-c", script],
            stdout=theirs,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "thinwire lab --hosts 4 --rate 100mbit -- thinwire train CONFIG"),
        (["--rate", "100", "--", "true"], "--rate: '100' needs a unit"),
        (["--hosts", "0", "--", "true"], "hosts: 0 is outside 1 to 254"),
        (["--mpi", "--output", "rank0", "--", "true"], "mpirun owns the ranks' output"),
    ],
)
def test_wrong_command_lines(arguments: list[str], message: str) -> None:
    done = subprocess.run([*CLI, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert message in done.stderr


def _namespaces(processes: list[psutil.Process]) -> set[str]:
    found = set()
    for process in processes:
        try:
            found.add(os.readlink(f"/proc/{process.pid}/ns/net"))
        except OSError:
            pass
    return found


def _interfaces() -> set[str]:
    return set(parse_net_dev(Path("/proc/self/net/dev").read_text()))


def _hear_ctrl_c() -> None:
    """A shell starts what runs in the background, such as these tests, deaf to Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("victim", "number", "code"),
    [
        ("starter", signal.SIGKILL, -9),
        ("starter", signal.SIGINT, 130),
        ("starter", signal.SIGTERM, 143),
        ("guardian", signal.SIGKILL, 3),
    ],
)
def test_nothing_outlives_a_lab(tmp_path: Path, victim: str, number: int, code: int) -> None:
    interfaces = _interfaces()
    # One child in a session of its own and one that the rank has waited for; rank 1 is stopped.
    detached = "(setsid sleep 1000 &)" if victim == "starter" else ":"
    script = f"{detached}; touch {tmp_path}/$RANK; [ $RANK = 1 ] && kill -STOP $$; exec sleep 1000"
    arguments = (
        ["--hosts", "2", "--rate", "100mbit", "--delay", "1ms"] if why_not(delay=True) is None else ["--hosts", "2"]
    )
    starter = subprocess.Popen(
        [*CLI, *arguments, "--", "sh", "-c", script],
        stderr=subprocess.DEVNULL,
        preexec_fn=_hear_ctrl_c,  # noqa: PLW1509
    )
    try:
        until(lambda: len(list(tmp_path.iterdir())) == 2)
        family = psutil.Process(starter.pid).children(recursive=True)
        guardian = psutil.Process(starter.pid).children()[0]
        lab_id = guardian.cmdline()[-3]  # other labs may start and end on this machine meanwhile
        assert lab_id in running_labs()
        inside = _namespaces(family) - _namespaces([psutil.Process()])
        assert len(inside) == 2
        (psutil.Process(starter.pid) if victim == "starter" else guardian).send_signal(number)
        assert starter.wait(60) == code
    finally:
        starter.kill()
        starter.wait()
    until(lambda: not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in family))
    assert not inside & _namespaces(list(psutil.process_iter()))
    assert _interfaces() == interfaces
    assert lab_id not in running_labs()
    until(lambda: not lab_folder(lab_id).exists())


def test_without_root(tmp_path: Path) -> None:
    """A user without any capability (uid 12345, none in effect) has a lab with a rate, and keeps his uid in it."""
    person = ["unshare", "--user", "--map-user=12345", "--map-group=12345"]
    if subprocess.run([*person, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody be somebody else (unshare --user fails)")
    script = "id -u; hostname; cat /proc/self/net/dev | grep -c eth0"
    done = subprocess.run(
        [*person, *CLI, "--hosts", "2", "--rate", "100mbit", "--", "sh", "-c", script],
        capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["12345", "host0", "1"]
    assert "[rank 1] host1" in done.stderr


def test_why_not_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("thinwire.launch.lab.network._SEARCH_PATH", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    from thinwire.launch.lab.network import find_tool

    with pytest.raises(LabError, match="install iproute2"):
        find_tool("ip")
