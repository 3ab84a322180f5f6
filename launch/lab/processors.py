"""Processors of its own for each process on the hosts: control groups with a quota (version 1 or 2).

Without them, hosts that compute use the processors of those that wait, which machines of one's own cannot do.
"""

from __future__ import annotations

import os
from pathlib import Path

from thinwire.dist.processors import CpuGroup, cpu_group, processor_quota, usable_processors
from thinwire.launch.lab.spec import LabError

_PERIOD_US = 10_000  # long enough for the kernel's clock to stop a process in time, short against a training step
_LEAST_QUOTA_US = 1_000


class Shares:
    """A control group for each process that asks. Raises LabError where this machine forbids it.

    Args:
        lab: the lab's private folder. Its groups have its name; those of labs without a folder, which were killed, are
            removed on the way.
        cores_per_rank: processors, of `ranks` in all, which must be there.
    """

    def __init__(self, lab: Path, cores_per_rank: float, ranks: int) -> None:
        there = min(usable_processors(), processor_quota())
        if ranks * cores_per_rank > there + 1e-9:
            raise LabError(
                f"cores_per_rank: {ranks} ranks with {cores_per_rank:g} processors each need"
                f" {ranks * cores_per_rank:g}, and this machine has {there:g}: give each {there / ranks:.2g} at most"
            )
        group = cpu_group()
        if group is None:
            raise LabError(f"cores_per_rank: there are no control groups for processors here; {_REMEDY}")
        self._version = group.version
        self._cores = cores_per_rank
        self._made = 0
        self._all: Path | None = None
        try:
            base = _base(group)
            _remove_stale(base, lab)
            self._all = base / lab.name
            self._all.mkdir()
            if self._version == 2:
                (self._all / "cgroup.subtree_control").write_text("+cpu")
            self.remove(self.make(1))
        except OSError as error:
            self.close()
            raise LabError(f"cores_per_rank: no control group can be made here ({error}); {_REMEDY}") from error

    def make(self, ranks: int) -> Path:
        """A group for a process that stands for so many ranks. Raises OSError."""
        assert self._all is not None
        quota_us = max(_LEAST_QUOTA_US, round(ranks * self._cores * _PERIOD_US))
        folder = self._all / str(self._made)
        self._made += 1
        folder.mkdir()
        if self._version == 2:
            (folder / "cpu.max").write_text(f"{quota_us} {_PERIOD_US}")
        else:
            (folder / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
            (folder / "cpu.cfs_quota_us").write_text(str(quota_us))
        return folder

    def remove(self, folder: Path) -> None:
        """A group whose process has ended; one that another process still lives in stays until the lab ends."""
        try:
            folder.rmdir()
        except OSError:
            pass

    def close(self) -> None:
        """Remove all groups: call it when nothing runs on the hosts any more."""
        if self._all is not None:
            _remove(self._all)


def enter(folder: Path) -> None:
    """Move the calling process into a group. Raises OSError."""
    (folder / "cgroup.procs").write_text("0")


_REMEDY = "run the lab as root, with /sys/fs/cgroup mounted for writing, or leave --cores-per-rank out"


def _base(group: CpuGroup) -> Path:
    """Where groups can be made: with version 2 a group that has processes may share out nothing, so beside ours."""
    if group.version == 1:
        return group.folder
    base = group.folder if group.folder == group.mount else group.folder.parent
    control = base / "cgroup.subtree_control"
    if "cpu" not in control.read_text().split():
        control.write_text("+cpu")
    return base


def _remove_stale(base: Path, lab: Path) -> None:
    for group in base.glob(f"{lab.name.rpartition('-')[0]}-*"):
        if not (lab.parent / group.name).exists():
            _remove(group)


def _remove(folder: Path) -> None:
    """A group and those in it; groups that still have processes stay."""
    for child in [*(path for path in folder.glob("*") if path.is_dir()), folder]:
        try:
            os.rmdir(child)
        except OSError:
            pass
