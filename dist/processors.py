"""The processors that this process may use: those it may run on, cut by the quotas of its control groups.

Imports no torch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_PROC = Path("/proc/self")


@dataclass(frozen=True)
class CpuGroup:
    """The control group that shares out processors to this process.

    mount: folder of the hierarchy. folder: of the group, in it. version: 1 or 2, of the kernel's interface.
    """

    mount: Path
    folder: Path
    version: int


def cpu_group(proc: Path = _PROC) -> CpuGroup | None:
    """This process's; None without Linux's control groups, or where they do not share out processors."""
    try:
        mounts = [line.split(" - ") for line in (proc / "mountinfo").read_text().splitlines()]
        lines = [line.split(":", 2) for line in (proc / "cgroup").read_text().splitlines()]
    except OSError:
        return None
    found: CpuGroup | None = None
    for left, right in mounts:
        _, _, _, root, point, *_ = left.split()
        kind, _, options = right.split(maxsplit=2)
        version = {"cgroup": 1, "cgroup2": 2}.get(kind)
        if version is None or (version == 1 and "cpu" not in options.split(",")):
            continue
        for _, controllers, path in lines:
            if "cpu" in controllers.split(",") if version == 1 else not controllers:
                inside = PurePosixPath(path)
                if not inside.is_relative_to(root):  # a container that sees its own groups only, under other names
                    inside = PurePosixPath(root)
                group = CpuGroup(Path(point), Path(point) / inside.relative_to(root), version)
                # A machine may mount both: the processors are where version 1 has them, else with version 2.
                if version == 1:
                    return group
                found = group
    return found


def usable_processors() -> int:
    """Those that this process may run on, quotas aside."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor_quota(proc: Path = _PROC) -> float:
    """How many processors this one's control group may keep busy at a time; infinite without a limit."""
    group = cpu_group(proc)
    if group is None:
        return math.inf
    return min((_quota(folder, group.version) for folder in _upwards(group)), default=math.inf)


def _upwards(group: CpuGroup) -> Iterator[Path]:
    """The group and all that hold it."""
    folder = group.folder
    while folder != group.mount and folder.is_relative_to(group.mount):
        yield folder
        folder = folder.parent
    yield group.mount


def _quota(folder: Path, version: int) -> float:
    try:
        if version == 2:
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
    except (OSError, ValueError):
        return math.inf  # the root of version 2 has no such file
    return math.inf if quota in ("max", "-1") else int(quota) / int(period)
