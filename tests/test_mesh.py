"""The mesh: groups nest, every rank agrees, and the DeviceMesh says the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch.testing._internal.distributed.fake_pg import FakeStore

from thinwire.comm.settings import Settings
from thinwire.dist.mesh import Level, Mesh, MeshSettings, build_mesh
from thinwire.dist.topology import GpuPlace


class Run(Settings):
    mesh: MeshSettings


def levels(*pairs: tuple[str, int]) -> MeshSettings:
    return MeshSettings.model_validate({"levels": [{"name": name, "size": size} for name, size in pairs]})


def named(mesh: Mesh) -> list[tuple[str, int]]:
    return [(level.name, level.size) for level in mesh.levels]


@st.composite
def jobs(draw: st.DrawFn) -> tuple[MeshSettings, list[str], list[GpuPlace | None]]:
    """Any placement of ranks on hosts and any NVLinks between their GPUs, with levels detected or given."""
    count = draw(st.integers(1, 12))
    hosts = draw(st.lists(st.sampled_from("abcd"), min_size=count, max_size=count))
    gpus: list[GpuPlace | None] = []
    for rank in range(count):
        peers = draw(st.lists(st.integers(0, count - 1), max_size=1))
        switch = draw(st.integers(0, 1))
        fabric = draw(st.sampled_from([None, "f"]))
        place = GpuPlace(
            uuid=f"GPU-{rank}",
            name="",
            pci=f"{rank}",
            nvlink_peers=tuple(map(str, peers)),
            nvswitch_links=switch,
            fabric=fabric,
        )
        gpus.append(draw(st.sampled_from([place, None])))
    sizes = [n for n in range(1, count + 1) if count % n == 0]
    given_sizes: list[int] = []
    for size in sorted(draw(st.lists(st.sampled_from(sizes), max_size=3))):
        if not given_sizes or size % given_sizes[-1] == 0:
            given_sizes.append(size)
    some = levels(*((f"level{i}", size) for i, size in enumerate(given_sizes)))
    return draw(st.sampled_from([MeshSettings(), some])), hosts, gpus


@settings(max_examples=150, deadline=None)
@given(jobs())
def test_groups_nest_and_every_rank_sees_the_same(job):
    choice, hosts, gpus = job
    ranks = range(len(hosts))
    meshes = [build_mesh(choice, rank=rank, hosts=hosts, gpus=gpus) for rank in ranks]
    mesh = meshes[0]
    assert all(replace(other, rank=0) == mesh for other in meshes)
    assert mesh.levels[-1].size == len(hosts)
    for name in mesh.named:
        assert sorted(rank for group in mesh.groups(name) for rank in group) == list(ranks)
        assert {len(group) for group in mesh.groups(name)} == {mesh.level(name).size}
        assert all(rank in meshes[rank].group(name) for rank in ranks)
    for inner, outer in zip(mesh.levels, mesh.levels[1:], strict=False):
        assert outer.size > inner.size
        assert outer.size % inner.size == 0
        for small in mesh.groups(inner.name):
            assert sum(set(small) <= set(big) for big in mesh.groups(outer.name)) == 1


@settings(max_examples=100, deadline=None)
@given(jobs())
def test_level_of_peer_is_symmetric_and_the_smallest(job):
    choice, hosts, gpus = job
    meshes = [build_mesh(choice, rank=rank, hosts=hosts, gpus=gpus) for rank in range(len(hosts))]
    seen = [mesh.level_of_peer() for mesh in meshes]
    for a, mesh in enumerate(meshes):
        for b in range(len(hosts)):
            assert seen[a][b] == seen[b][a]
            holding = [level.name for level in mesh.levels if b in mesh.group(level.name)]
            assert seen[a][b] == ("self" if a == b else holding[0])


@settings(max_examples=60, deadline=None)
@given(jobs())
def test_a_detected_node_never_joins_ranks_of_two_hosts(job):
    _, hosts, gpus = job
    mesh = build_mesh(MeshSettings(), rank=0, hosts=hosts, gpus=gpus)
    for level in mesh.levels:
        for group in mesh.groups(level.name):
            if level.name in ("pair", "node"):
                assert len({hosts[rank] for rank in group}) == 1
    if mesh.level("node").name == "node":
        assert {frozenset(group) for group in mesh.groups("node")} == {
            frozenset(r for r, host in enumerate(hosts) if host == name) for name in set(hosts)
        }


@pytest.mark.parametrize(
    ("hosts", "expected", "order"),
    [
        ("a", [("world", 1)], (0,)),
        ("aaaa", [("node", 4)], (0, 1, 2, 3)),
        ("abcd", [("world", 4)], (0, 1, 2, 3)),
        ("aabb", [("node", 2), ("world", 4)], (0, 1, 2, 3)),
        ("abab", [("node", 2), ("world", 4)], (0, 2, 1, 3)),  # mpirun --map-by node
    ],
)
def test_levels_from_host_names(hosts, expected, order):
    mesh = build_mesh(MeshSettings(), rank=0, hosts=list(hosts))
    assert (named(mesh), mesh.order, mesh.remarks) == (expected, order, ())


def test_uneven_hosts_merge_into_the_world_and_say_so():
    mesh = build_mesh(MeshSettings(), rank=0, hosts=list("aaab"))
    assert named(mesh) == [("world", 4)]
    assert mesh.level("node") == mesh.level("world") == Level("world", 4)
    assert mesh.level("pair").size == 1
    assert mesh.level_of_peer() == ["self", "world", "world", "world"]
    assert mesh.describe() == (
        "4 ranks on 2 hosts; levels, fastest first: world of 4 (the network). "
        "node is merged into the next level, because its groups hold 1 or 3 ranks."
    )


def test_dropped_levels_keep_their_names():
    one_rank_per_host = build_mesh(MeshSettings(), rank=1, hosts=list("abcd"))
    assert one_rank_per_host.groups("node") == ((0,), (1,), (2,), (3,))
    assert one_rank_per_host.group("node") == (1,)
    one_host = build_mesh(MeshSettings(), rank=1, hosts=list("aaaa"))
    assert one_host.level("world") == Level("node", 4)
    assert one_host.group("world") == (0, 1, 2, 3)
    with pytest.raises(ValueError, match="the mesh has no level 'rack'; it has pair, node, fabric, world"):
        one_host.level("rack")


def test_given_levels_count_ranks_and_end_with_the_world():
    mesh = build_mesh(levels(("pair", 2), ("node", 4)), rank=5, hosts=["a"] * 8)
    assert named(mesh) == [("pair", 2), ("node", 4), ("world", 8)]
    assert mesh.level_of_peer() == ["world"] * 4 + ["pair", "self", "node", "node"]
    assert (mesh.world_size, mesh.remarks) == (8, ())
    same = build_mesh(levels(("one", 1), ("pair", 2), ("couple", 2), ("all", 8)), rank=5, hosts=["a"] * 8)
    assert named(same) == [("pair", 2), ("all", 8)]
    assert same.level("couple") == Level("pair", 2)
    assert same.level("world") == Level("all", 8)
    assert same.group("one") == (5,)


def test_given_levels_follow_the_hosts_and_say_where_they_cannot():
    follows = build_mesh(levels(("node", 2)), rank=0, hosts=list("abab"))
    assert follows.groups("node") == ((0, 2), (1, 3))
    assert follows.remarks == ()
    rack = build_mesh(levels(("rack", 4)), rank=0, hosts=list("aabbccdd"))
    assert rack.remarks == ()
    cuts = build_mesh(levels(("node", 2)), rank=0, hosts=list("aaab"))
    assert cuts.groups("node") == ((0, 1), (2, 3))
    assert "node, as given, joins ranks 2 3 of the hosts a and b, but not all ranks of a." in cuts.describe()


@pytest.mark.parametrize(
    ("value", "path", "text"),
    [
        ("fast", ("mesh", "levels"), "must be auto, or a list of levels"),
        ([{"name": "a", "size": 2}, {"name": "b", "size": 3}], ("mesh", "levels", 1, "size"), "multiple of 2"),
        ([{"name": "a", "size": 0}], ("mesh", "levels", 0, "size"), "greater than or equal to 1"),
        ([{"name": "a", "sise": 1}], ("mesh", "levels", 0, "sise"), "Extra inputs are not permitted"),
        ([{"name": "A b", "size": 1}], ("mesh", "levels", 0, "name"), "should match pattern"),
        ([{"name": "self", "size": 1}], ("mesh", "levels", 0, "name"), "must differ"),
        ([{"name": "a", "size": 2}, {"name": "a", "size": 4}], ("mesh", "levels", 1, "name"), "must differ"),
        ([{"name": "world", "size": 2}, {"name": "a", "size": 4}], ("mesh", "levels", 0, "name"), "the last level"),
    ],
)
def test_wrong_settings_are_refused_with_their_path(value, path, text):
    with pytest.raises(ValidationError) as caught:
        Run.model_validate({"mesh": {"levels": value}})
    places = {error["loc"]: error["msg"] for error in caught.value.errors()}
    assert text in places[path]


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        (levels(("node", 3)), r"mesh\.levels\[0\]\.size is 3; the job has 4 ranks.* allowed are 1, 2, 4"),
        (levels(("a", 2), ("node", 8)), r"mesh\.levels\[1\]\.size is 8; the job has 4 ranks"),
        (levels(("world", 2)), r"mesh\.levels\[0\]\.size is 2; world holds every rank, so it must be 4"),
    ],
)
def test_levels_that_do_not_fit_the_job_are_refused(choice, text):
    with pytest.raises(ValueError, match=text):
        build_mesh(choice, rank=0, hosts=list("aabb"))


def test_settings_survive_a_round_trip():
    given_levels = levels(("pair", 2), ("node", 4))
    assert MeshSettings.model_validate(given_levels.model_dump()) == given_levels
    assert MeshSettings.model_validate(MeshSettings().model_dump(mode="json")).levels == "auto"


@pytest.mark.parametrize(
    ("choice", "hosts"),
    [
        (MeshSettings(), "abababab"),
        (MeshSettings(), "aaab"),
        (MeshSettings(), "a"),
        (levels(("pair", 2), ("node", 4)), "aaaabbbb"),
        (levels(("pair", 2), ("node", 4)), "abababab"),
    ],
)
def test_the_rows_of_the_device_mesh_are_the_groups(choice, hosts):
    for rank in {0, len(hosts) - 1}:
        mesh = build_mesh(choice, rank=rank, hosts=list(hosts))
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=len(hosts))
        try:
            device_mesh = mesh.device_mesh("cpu")
            assert device_mesh.mesh_dim_names == tuple(level.name for level in reversed(mesh.levels))
            for level in mesh.levels:
                rows = device_mesh.mesh.reshape(-1, level.size).tolist()
                assert tuple(map(tuple, rows)) == mesh.groups(level.name)
            # The fastest dimension's process group is this rank's group of the fastest level.
            fastest = mesh.levels[0].name
            assert tuple(dist.get_process_group_ranks(device_mesh.get_group(fastest))) == mesh.group(fastest)
        finally:
            dist.destroy_process_group()
