"""dist/processors: what a process may use of its machine; launch/lab/processors: what the lab gives to each rank."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from thinwire.dist.processors import CpuGroup, cpu_group, processor_quota, usable_processors
from thinwire.launch.lab import Lab, LabError, processors, why_not_cores
from thinwire.launch.lab.processors import Shares

needs_groups = pytest.mark.skipif(why_not_cores() is not None, reason=f"no control groups: {why_not_cores()}")
MANY = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755"


def proc(folder: Path, mounts: list[str], groups: list[str]) -> Path:
    (folder / "mountinfo").write_text("\n".join([MANY, *mounts]) + "\n")
    (folder / "cgroup").write_text("\n".join(groups) + "\n")
    return folder


def v1(folder: Path, root: str = "/") -> str:
    return f"32 31 0:29 {root} {folder} rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct"


def v2(folder: Path) -> str:
    return f"41 31 0:38 / {folder} rw,relatime - cgroup2 cgroup2 rw,nsdelegate"


def test_version_1_has_the_least_of_all_groups_above(tmp_path: Path) -> None:
    inner = tmp_path / "cpu" / "outer" / "inner"
    inner.mkdir(parents=True)
    for folder, quota in ((inner, "-1"), (inner.parent, "150000"), (tmp_path / "cpu", "-1")):
        (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (folder / "cpu.cfs_period_us").write_text("100000\n")
    here = proc(tmp_path, [v1(tmp_path / "cpu"), v2(tmp_path / "unified")], ["3:cpu,cpuacct:/outer/inner", "0::/"])
    group = cpu_group(here)
    assert group is not None
    assert (group.folder, group.version) == (inner, 1)
    assert processor_quota(here) == 1.5
    (inner / "cpu.cfs_quota_us").write_text("40000")
    assert processor_quota(here) == 0.4


def test_version_2(tmp_path: Path) -> None:
    inner = tmp_path / "all" / "user.slice" / "run.scope"
    inner.mkdir(parents=True)
    (inner / "cpu.max").write_text("max 100000\n")
    here = proc(tmp_path, [v2(tmp_path / "all")], ["0::/user.slice/run.scope"])
    group = cpu_group(here)
    assert group is not None
    assert (group.folder, group.version) == (inner, 2)
    assert processor_quota(here) == math.inf
    (inner.parent / "cpu.max").write_text("200000 100000\n")
    assert processor_quota(here) == 2


def test_a_container_whose_groups_have_other_names_outside(tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("50000")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
    here = proc(tmp_path, [v1(tmp_path / "cpu", root="/docker/abc")], ["3:cpu:/docker/abc"])
    assert processor_quota(here) == 0.5
    here = proc(tmp_path, [v1(tmp_path / "cpu", root="/docker/abc")], ["3:cpu:/elsewhere"])
    assert processor_quota(here) == 0.5


def test_without_control_groups(tmp_path: Path) -> None:
    assert cpu_group(tmp_path) is None
    assert processor_quota(tmp_path) == math.inf
    assert cpu_group(proc(tmp_path, [], ["0::/"])) is None
    assert usable_processors() >= 1


@needs_groups
def test_every_rank_of_a_lab_has_its_own(tmp_path: Path) -> None:
    script = (
        "import time; from thinwire.dist.processors import *; began, busy = time.time(), time.process_time()\n"
        "while time.time() < began + 1: pass\n"
        "print(processor_quota(), cpu_group().folder, (time.process_time() - busy) / (time.time() - began))"
    )
    with Lab(hosts=2, ranks_per_host=1, cores_per_rank=0.25) as lab, (tmp_path / "rank0.log").open("w") as log:
        run = lab.start([sys.executable, "-c", script], output=tmp_path, stdout=log, stderr=log)
        assert run.wait(60) == 0, (tmp_path / "rank0.log").read_text()
        mine, other = ((tmp_path / f"rank{rank}.log").read_text().split() for rank in range(2))
        groups = [Path(mine[1]), Path(other[1])]
        assert [float(mine[0]), float(other[0])] == [0.25, 0.25]
        assert groups[0] != groups[1]
        assert groups[0].parent.exists()
        assert float(mine[2]) < 0.3  # however slow this machine is, it is no more than that; 1 without a quota
    assert not groups[0].parent.exists()


@needs_groups
def test_a_host_under_mpirun_has_those_of_its_ranks_together(tmp_path: Path) -> None:
    shares = Shares(tmp_path / "thinwire-test-3", 0.25, 4)
    try:
        one, three = shares.make(1), shares.make(3)
        group = cpu_group()
        assert group is not None
        name = "cpu.max" if group.version == 2 else "cpu.cfs_quota_us"
        quotas = [int((folder / name).read_text().split()[0]) for folder in (one, three)]
        assert quotas[1] == 3 * quotas[0]
    finally:
        shares.close()


@needs_groups
def test_groups_of_a_lab_that_was_killed_are_removed(tmp_path: Path) -> None:
    killed, alive = tmp_path / "thinwire-test-1", tmp_path / "thinwire-test-2"
    shares = Shares(killed, 0.1, 1)
    left = shares.make(1).parent
    alive.mkdir()
    other = Shares(alive, 0.1, 1)
    try:
        assert not left.exists()
    finally:
        other.close()


def test_more_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(LabError, match=r"cores_per_rank: 4 ranks with 900 processors each need 3600, .* at most"):
        Shares(tmp_path, 900, 4)


def test_groups_that_cannot_be_made_are_told_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    not_a_folder = tmp_path / "file"
    not_a_folder.write_text("")
    monkeypatch.setattr(processors, "cpu_group", lambda: CpuGroup(tmp_path, not_a_folder, 1))
    with pytest.raises(LabError, match=r"cores_per_rank: no control group can be made .* run the lab as root"):
        Shares(tmp_path / "thinwire-test-4", 0.1, 1)
    monkeypatch.setattr(processors, "cpu_group", lambda: None)
    with pytest.raises(LabError, match=r"cores_per_rank: there are no control groups .* leave --cores-per-rank out"):
        Shares(tmp_path / "thinwire-test-4", 0.1, 1)


def test_groups_of_version_2_are_made_beside_those_that_have_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "user.slice" / "run.scope"
    mine.mkdir(parents=True)
    control = mine.parent / "cgroup.subtree_control"
    control.write_text("memory")
    monkeypatch.setattr(processors, "cpu_group", lambda: CpuGroup(tmp_path, mine, 2))
    shares = Shares(tmp_path / "thinwire-test-5", 0.3, 2)
    assert control.read_text() == "+cpu"
    folder = shares.make(2)
    assert folder.parent == mine.parent / "thinwire-test-5"
    assert (folder.parent / "cgroup.subtree_control").read_text() == "+cpu"
    assert (folder / "cpu.max").read_text() == "6000 10000"
