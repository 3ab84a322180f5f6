"""Ask other packages about themselves from a process of their own, which they may crash."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import Any

_TORCH = """
import torch
import torch.distributed as dist
facts = {
    "version": torch.__version__,
    "cuda": torch.version.cuda,
    "hip": torch.version.hip,
    "distributed": dist.is_available(),
    "gloo": dist.is_available() and dist.is_gloo_available(),
    "nccl": dist.is_available() and dist.is_nccl_available(),
    "mpi": dist.is_available() and dist.is_mpi_available(),
    "nccl_version": None,
    "gpus": [],
    "gpu_error": "",
}
torch.from_numpy(__import__("numpy").zeros(1))
if facts["nccl"]:
    facts["nccl_version"] = ".".join(map(str, torch.cuda.nccl.version()))
try:
    if facts["cuda"] or facts["hip"]:
        torch.cuda.init()
        facts["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
except Exception as error:
    facts["gpu_error"] = (str(error).splitlines() or [type(error).__name__])[0]
"""

_MPI4PY = """
import mpi4py
mpi4py.rc.initialize = mpi4py.rc.finalize = False
from mpi4py import MPI
facts = {"version": mpi4py.__version__, "library": MPI.Get_library_version()}
"""


class ProbeError(RuntimeError):
    """The package cannot be imported, or ends the process that tries; the message is its last word."""


def probe_torch() -> dict[str, Any]:
    """Version, backends and GPUs of torch, as torch itself tells them. Raises ProbeError."""
    return _probe("torch", _TORCH)


def probe_mpi4py() -> dict[str, Any]:
    """Version of mpi4py and of the MPI library that it loads. Raises ProbeError."""
    return _probe("mpi4py", _MPI4PY)


def _probe(package: str, script: str, timeout_s: float = 120.0) -> dict[str, Any]:
    # The same search path as here, and nothing of what a package prints on import mistaken for the answer.
    code = f"import sys, json\nsys.path[:] = {sys.path!r}\n{script}\nprint('\\nprobe ' + json.dumps(facts))"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ProbeError(f"importing {package} did not end within {timeout_s:g} s") from None
    if done.returncode < 0:
        raise ProbeError(f"importing {package} ends the process by {signal.Signals(-done.returncode).name}")
    answer = [line for line in done.stdout.splitlines() if line.startswith("probe ")]
    if done.returncode or not answer:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise ProbeError(said[-1].strip() if said else f"importing {package} ends with exit code {done.returncode}")
    facts: dict[str, Any] = json.loads(answer[-1].removeprefix("probe "))
    return facts
