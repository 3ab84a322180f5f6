"""A Slurm of two nodes on this machine: the running one where srun answers, else one that ends with the test."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

_DAEMONS = ("munged", "slurmctld", "slurmd")
_START_S = 60.0

# Node names are numbers, so that they resolve everywhere; both daemons run on this host (config_overrides lets each
# claim more CPUs than there are).
_CONFIG = """\
ClusterName=thinwire
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
NodeName=127.0.0.1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first_port} CPUs=4 State=UNKNOWN
NodeName=127.0.0.2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second_port} CPUs=4 State=UNKNOWN
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,sched_min_interval=0
PriorityType=priority/basic
EpilogMsgTime=0
PartitionName=all Nodes=ALL Default=YES State=UP
"""


class NoSlurmError(RuntimeError):
    """Neither a running Slurm nor one that could be started; the text says why."""


@contextmanager
def slurm() -> Iterator[dict[str, str]]:
    """The environment in which srun reaches a Slurm.

    Raises:
        NoSlurmError: srun does not answer, and this machine cannot run a Slurm of its own.
    """
    if shutil.which("srun") is None:
        raise NoSlurmError("srun is not installed")
    if _answers(dict(os.environ), nodes=1):
        yield dict(os.environ)
        return
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
    programs = {name: shutil.which(name, path=path) for name in _DAEMONS}
    missing = [name for name, program in programs.items() if program is None]
    if missing:
        raise NoSlurmError(f"srun answers not, and {', '.join(missing)} cannot be started: not installed")
    if os.geteuid() != 0:
        raise NoSlurmError("srun answers not, and only root can start a Slurm")
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        folder.chmod(0o755)  # munge refuses a socket that others cannot reach
        environment = os.environ | {"SLURM_CONF": str(_configure(folder))}
        for command in (
            [programs["munged"], "--foreground", *_munge_options(folder)],
            [programs["slurmctld"], "-D", "-i"],
            [programs["slurmd"], "-D", "-N", "127.0.0.1"],
            [programs["slurmd"], "-D", "-N", "127.0.0.2"],
        ):
            log = stack.enter_context((folder / f"{Path(str(command[0])).name}.out").open("ab"))
            daemon = subprocess.Popen([str(c) for c in command], env=environment, stdout=log, stderr=log)
            stack.callback(_end, daemon)
            if Path(str(command[0])).name == "munged":
                _wait_until((folder / "munge.socket").exists, folder)
        _wait_until(lambda: _answers(environment, nodes=2), folder)
        yield environment


def _configure(folder: Path) -> Path:
    for name in ("state", "spool.127.0.0.1", "spool.127.0.0.2"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(secrets.token_bytes(1024))
    (folder / "munge.key").chmod(0o600)
    with socket.socket() as a, socket.socket() as b, socket.socket() as c:
        for each in (a, b, c):
            each.bind(("127.0.0.1", 0))
        controller, first, second = (each.getsockname()[1] for each in (a, b, c))
    config = folder / "slurm.conf"
    host = socket.gethostname().split(".")[0]
    config.write_text(
        _CONFIG.format(folder=folder, host=host, controller_port=controller, first_port=first, second_port=second)
    )
    return config


def _munge_options(folder: Path) -> list[str]:
    names = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "seed-file": "munged.seed"}
    return [f"--{option}={folder / name}" for option, name in names.items()]


def _answers(environment: dict[str, str], nodes: int) -> bool:
    command = ["srun", "--immediate=5", "--nodes", str(nodes), "true"]
    try:
        done = subprocess.run(command, env=environment, check=False, capture_output=True, timeout=15)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def _wait_until(condition: object, folder: Path) -> None:
    assert callable(condition)
    deadline = time.monotonic() + _START_S
    while not condition():
        if time.monotonic() > deadline:
            logs = "\n".join(
                f"{p.name}: {p.read_text()[-2000:]}" for p in [*folder.glob("*.log"), *folder.glob("*.out")]
            )
            raise RuntimeError(f"the private Slurm did not start within {_START_S:g} s\n{logs}")
        time.sleep(0.05)


def _end(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    try:
        daemon.wait(10.0)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()
