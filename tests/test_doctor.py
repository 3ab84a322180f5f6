"""`thinwire doctor`: what it says about software, machine and ranks, also when torch is broken."""

from __future__ import annotations

import importlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_nvml import nvlink_pairs, pcie_only, switched

from thinwire.dist import topology
from thinwire.dist.place import Place
from thinwire.launch.doctor import command, machine, software
from thinwire.launch.doctor.finding import Finding
from thinwire.launch.doctor.import_probe import ProbeError, probe_torch
from thinwire.launch.doctor.report import print_findings

TORCH: dict[str, Any] = {
    "version": "2.13.0",
    "cuda": "12.8",
    "hip": None,
    "distributed": True,
    "gloo": True,
    "nccl": True,
    "mpi": False,
    "nccl_version": "2.27.5",
    "gpus": ["Fake H100"] * 8,
    "gpu_error": "",
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def start(*arguments: str, **environ: str) -> subprocess.Popen[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMI_", "SLURM_", "PYTHONPATH"))}
    root = str(Path(__file__).parent.parent)
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, [environ.get("PYTHONPATH"), root]))
    return subprocess.Popen(
        [sys.executable, "-m", "thinwire", "doctor", *arguments],
        env={**clean, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def fake_package(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def broken_torch(folder: Path, code: str) -> Path:
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text(code)
    return folder


# The whole command


def test_alone_it_finds_what_training_needs_and_exits_with_0():
    process = start("--json")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    answer = json.loads(out)
    found = {finding["topic"]: finding for finding in answer["findings"]}
    assert answer["ok"] is True
    assert {"machine", "python", "torch", "backends", "triton", "gpus", "network", "mpi", "slurm", "lab"} <= set(found)
    assert found["torch"]["state"] == found["packages"]["state"] == "ok"
    assert "gloo" in found["backends"]["found"]
    assert all(f["without"] for f in found.values() if f["state"] != "ok")


def test_it_runs_with_a_broken_torch_and_says_so(tmp_path):
    broken_torch(tmp_path, "import ctypes; ctypes.CDLL('libtorch_cpu_missing.so')")
    process = start(PYTHONPATH=str(tmp_path))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    lines = {line.split()[1]: line for line in out.splitlines()[:-1]}
    assert lines["torch"].startswith("!! torch")
    assert "libtorch_cpu_missing.so: cannot open shared object file" in lines["torch"]
    assert "remedy: pip install --force-reinstall" in lines["torch"]
    assert lines["python"].startswith("ok python")
    assert "\r" not in out
    assert "\x1b" not in out
    assert out.splitlines()[-1] == "thinwire cannot train here before this is mended: torch."


def test_ranks_are_compared_over_the_rendezvous_store(tmp_path):
    fake_package(tmp_path, "tokenizers", "0.0.1")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks = [
        start("--wait", "120", **job, RANK="0", LOCAL_RANK="0"),
        start("--wait", "120", **job, RANK="1", LOCAL_RANK="1", PYTHONPATH=str(tmp_path)),
    ]
    (out, err), (other, other_err) = (process.communicate(timeout=240) for process in ranks)
    assert (ranks[0].returncode, ranks[1].returncode) == (0, 0), err + other_err
    assert other == ""
    assert "ok launcher    torchrun, 2 ranks" in out
    assert "gloo talks through lo" in out
    assert [line.split() for line in out.splitlines() if line.startswith("tokenizers  ")][-1] == [
        "tokenizers",
        "0.0.1",
        "1",
        "differs",
    ]
    assert "tokenizers: the ranks differ. Training starts all the same." in out


# Software


def test_a_package_that_kills_its_importer_is_survived(tmp_path, monkeypatch):
    broken_torch(tmp_path, f"import os; os.kill(os.getpid(), {int(signal.SIGSEGV)})")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ProbeError, match="importing torch ends the process by SIGSEGV"):
        probe_torch()


def test_what_a_package_prints_is_not_taken_for_an_answer(tmp_path, monkeypatch):
    broken_torch(tmp_path, "print('probe {}'); raise ImportError('half installed')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ProbeError, match="ImportError: half installed"):
        probe_torch()


@pytest.mark.parametrize(
    ("change", "state", "text"),
    [
        ({}, "ok", "built for CUDA 12.8"),
        ({"version": "2.13.0+cpu", "cuda": None}, "ok", "built for CPU only"),
        ({"version": "2.8.1"}, "problem", "thinwire needs torch >=2.9"),
        ({"version": "2.9.0a0+145a3a7bda.nv25.09"}, "ok", "built for CUDA 12.8"),
        ({"version": "2.8.0a0+nv25.05"}, "problem", "thinwire needs torch >=2.9"),
    ],
)
def test_torch_must_be_new_enough(change, state, text):
    finding = software.check_torch(TORCH | change)
    assert finding.state == state
    assert text in finding.detail + finding.without


def test_torch_missing_and_broken_have_different_remedies(monkeypatch):
    broken = software.check_torch(ProbeError("OSError: no libc10"))
    assert (broken.state, broken.detail) == ("problem", "OSError: no libc10")
    assert "--force-reinstall" in broken.remedy
    monkeypatch.setattr(software, "_version", lambda package: None)
    missing = software.check_torch(ProbeError("ModuleNotFoundError: No module named 'torch'"))
    assert missing.remedy == 'pip install "torch>=2.9"'


def test_backends():
    assert software.check_backends(TORCH).found == "gloo, nccl 2.27.5"
    assert software.check_backends(TORCH | {"gloo": False}).state == "problem"
    assert software.check_backends(TORCH | {"nccl": False, "nccl_version": None}).state == "limited"
    cpu = software.check_backends(TORCH | {"nccl": False, "nccl_version": None, "cuda": None})
    assert (cpu.state, cpu.found) == ("ok", "gloo")


@pytest.mark.parametrize(
    ("torch_version", "needs", "triton", "state"),
    [
        ("2.13.0+cpu", [], "3.7.1", "ok"),
        ("2.13.0+cpu", [], "3.6.0", "limited"),
        ("2.12.0", ['triton==3.7.0; platform_system == "Linux"'], "3.7.1", "limited"),
        ("2.12.0", ['triton==3.7.0; platform_system == "Linux"'], "3.7.0", "ok"),
        ("2.12.0+cpu", [], "3.7.0", "ok"),
        ("2.13.0", [], None, "limited"),
    ],
)
def test_triton_must_be_the_one_that_torch_requires(monkeypatch, torch_version, needs, triton, state):
    monkeypatch.setattr(software, "_version", {"torch": torch_version, "triton": triton}.get)
    monkeypatch.setattr(software, "_requirements", lambda package: list(map(software.Requirement, needs)))
    finding = software.check_triton(TORCH)
    assert finding.state == state
    assert (finding.remedy == "") == (state == "ok")


def test_a_python_that_torch_was_not_made_for_is_a_problem(monkeypatch):
    monkeypatch.setattr(software, "_metadata_python", lambda package: software.SpecifierSet(">=3.99"))
    finding = software.check_python()
    assert finding.state == "problem"
    assert "torch needs >=3.99" in finding.without


def test_a_package_that_is_missing_or_too_old_is_a_problem(monkeypatch):
    wanted = ["numpy>=99", "absent", "torch>=2.9", 'wandb; extra == "wandb"']
    monkeypatch.setattr(software, "_requirements", lambda package: list(map(software.Requirement, wanted)))
    finding = software.check_packages()
    assert finding.state == "problem"
    assert finding.remedy == 'pip install "numpy>=99" "absent"'
    assert "torch" not in finding.found
    assert "wandb" not in finding.found


@pytest.mark.parametrize(
    ("says", "library", "state", "found"),
    [
        (
            "mpirun (Open MPI) 5.0.11",
            "Open MPI v5.0.11, package: root",
            "ok",
            "OpenMPI 5.0.11, mpi4py 4 with OpenMPI",
        ),
        ("HYDRA build details:\n Version: 5.0.2", "MPICH Version: 5.0.2", "ok", "MPICH 5.0.2, mpi4py 4 with MPICH 5"),
        ("mpirun (Open MPI) 5.0.11", "MPICH Version: 5.0.2", "limited", "OpenMPI 5.0.11, mpi4py 4 with MPICH 5.0.2"),
        ("Intel(R) MPI Library, Version 2021.16", "Intel(R) MPI Library 2021.16", "ok", "IntelMPI 2021.16, mpi4py 4"),
    ],
)
def test_mpirun_and_mpi4py_must_be_of_one_mpi(tmp_path, monkeypatch, says, library, state, found):
    script = tmp_path / "mpirun"
    script.write_text(f"#!/bin/sh\ncat <<'END'\n{says}\nEND\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(software, "probe_mpi4py", lambda: {"version": "4", "library": library})
    finding = software.check_mpi()
    assert finding.state == state
    assert finding.found.startswith(found)


def test_mpi_missing(monkeypatch):
    def no_mpi4py() -> dict[str, Any]:
        raise ProbeError("ModuleNotFoundError: No module named 'mpi4py'")

    monkeypatch.setattr(software.shutil, "which", lambda name, path=None: None)
    monkeypatch.setattr(software, "probe_mpi4py", no_mpi4py)
    monkeypatch.setattr(software, "_version", lambda package: None)
    finding = software.check_mpi()
    assert (finding.state, finding.found) == ("limited", "no mpirun, no mpi4py")
    assert finding.without.startswith("mpirun as a launcher")


# Machine


@pytest.mark.parametrize(
    ("nvml", "found", "detail"),
    [
        (switched(), "8 x Fake H100", "18 NVLinks each, through switches"),
        (nvlink_pairs(), "8 x Fake H100", "3 NVLinks each; joined in groups of 2 by NVLink"),
        (pcie_only(), "4 x Fake H100", "no NVLink"),
    ],
)
def test_gpus_and_their_links(monkeypatch, nvml, found, detail):
    monkeypatch.setattr(topology, "_numa_node_by_kernel", lambda pci: None)  # this machine's own cards
    finding = machine.check_gpus(TORCH, nvml)
    assert (finding.state, finding.found, finding.detail) == ("ok", found, detail)


def test_gpus_that_torch_cannot_use_are_said():
    cpu_build = machine.check_gpus(TORCH | {"gpus": [], "cuda": None}, switched())
    assert cpu_build.state == "limited"
    assert "torch is built for the CPU only" in cpu_build.without
    old_driver = machine.check_gpus(TORCH | {"gpus": [], "gpu_error": "driver too old"}, switched())
    assert "driver too old" in old_driver.without
    unknown = machine.check_gpus(ProbeError("broken"), switched())
    assert unknown.found == "8 x Fake H100"


def test_the_route_to_the_head_node():
    place = Place("torchrun", 1, 4, 0, 2, 1, "no-such-host.invalid", 29500)
    finding = machine.check_network(place)
    assert finding.state == "problem"
    assert "no-such-host.invalid" in finding.without
    here = machine.check_network(Place("torchrun", 0, 4, 0, 2, 0, "127.0.0.1", 29500))
    assert (here.state, here.found) == ("ok", "gloo talks through lo (127.0.0.1), head node 127.0.0.1:29500")


@pytest.mark.parametrize(
    ("srun", "sinfo", "state", "found"),
    [
        (False, None, "limited", "no srun"),
        (True, None, "limited", "srun, but no controller answers"),
        (True, "echo no controller >&2; exit 1", "limited", "srun, but no controller answers"),
        (True, "echo 'debug* 4'", "ok", "srun, and its controller answers"),
    ],
)
def test_slurm_is_there_when_its_controller_answers(tmp_path, monkeypatch, srun, sinfo, state, found):
    for name, body in {"srun": "exit 0" if srun else None, "sinfo": sinfo}.items():
        if body is not None:
            (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
            (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    finding = machine.check_slurm()
    assert (finding.state, finding.found) == (state, found)


@pytest.mark.parametrize(
    ("plain", "delayed", "state", "remedy"),
    [
        (None, None, "ok", ""),
        (None, "no TAP device", "limited", "no TAP device"),
        ("no user namespaces", "no user namespaces", "limited", "no user namespaces"),
    ],
)
def test_a_machine_without_a_lab_says_why(monkeypatch, plain, delayed, state, remedy):
    module = importlib.import_module("thinwire.launch.lab.why_not")  # the package has a function of that name
    monkeypatch.setattr(module, "why_not", lambda delay=False: delayed if delay else plain)
    finding = machine.check_lab()
    assert (finding.state, finding.remedy) == (state, remedy)


def test_a_launcher_that_contradicts_itself_is_a_problem_with_its_remedy(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    place, refusal = command._place()
    finding = machine.check_launcher(place, refusal)
    assert finding.state == "problem"
    assert "WORLD_SIZE is not set" in finding.remedy


def test_a_rank_without_torch_says_so_and_leaves_rank_0_the_time_to_report(monkeypatch, capsys):
    waited: list[float] = []
    monkeypatch.setattr(command, "_place", lambda: (Place("openmpi", 1, 2, 1, 2, None, "127.0.0.1", 1), ""))
    monkeypatch.setattr(command, "examine", lambda place, refusal: [Finding("torch", "problem", "broken")])
    monkeypatch.setattr(command.time, "sleep", waited.append)
    assert command.doctor(as_json=False, wait_s=7.0) == 1
    assert waited == [7.0]
    assert "rank 1 cannot meet the others without torch" in capsys.readouterr().err


def test_a_check_that_fails_itself_hides_no_other(monkeypatch):
    def fails() -> Finding:
        raise PermissionError("no /proc here")

    monkeypatch.setattr(machine, "check_machine", fails)
    monkeypatch.setattr(command, "probe_torch", lambda: TORCH)
    monkeypatch.setattr(machine, "check_lab", lambda: Finding("lab", "ok", "possible"))
    findings = {finding.topic: finding for finding in command.examine()}
    assert findings["machine"].detail == "PermissionError: no /proc here"
    assert findings["machine"].state == "limited"
    assert findings["torch"].state == "ok"


# What it looks like

FINDINGS = [
    Finding("torch", "ok", "2.13.0", detail="built for [CUDA] 12.8"),
    Finding("triton", "limited", "missing", without="kernels " * 12, remedy='pip install "triton==3.7.1"'),
    Finding("network", "problem", "no route", without="this job", remedy="plug it in"),
]


def test_a_terminal_of_80_columns_is_enough(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")
    out = Terminal()
    print_findings(FINDINGS, out)
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert max(map(len, lines)) <= 80
    assert lines[0].split(maxsplit=2) == ["ok", "torch", "2.13.0; built for [CUDA] 12.8"]
    assert lines[-1] == "thinwire cannot train here before this is mended: network."


def test_elsewhere_every_finding_is_one_plain_line():
    out = io.StringIO()
    print_findings(FINDINGS, out)
    lines = out.getvalue().splitlines()
    assert len(lines) == len(FINDINGS) + 1
    assert lines[2] == "!! network     no route; prevents: this job; remedy: plug it in"
    print_findings(FINDINGS[:2], out := io.StringIO())
    assert out.getvalue().splitlines()[-1] == "thinwire can train here. Not available: triton."
