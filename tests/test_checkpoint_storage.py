"""The DCP reader, writer and planners: resharding, DCP's own save and load, and files written by an enemy."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement
from torch.testing._internal.distributed.fake_pg import FakeStore

from thinwire.dist.checkpoint_agreement import CheckpointError, CheckpointMismatchError
from thinwire.dist.checkpoint_plan import (
    TreeLoadPlanner,
    TreeSavePlanner,
    load_state,
    plan_from_json,
    plan_to_json,
    results_from_json,
    results_to_json,
    save_state,
)
from thinwire.dist.checkpoint_storage import RawReader, RawWriter
from thinwire.dist.checkpoint_tree import flatten, unflatten


def trusting(folder: Path) -> RawReader:
    return RawReader(folder, "metadata.json", lambda names: None)


def trees() -> st.SearchStrategy[Any]:
    texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    tensors = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3).map(lambda v: torch.tensor(v, dtype=torch.int64))
    leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts, tensors)
    kinds = (texts, st.integers(), st.one_of(st.none(), st.booleans()), st.floats(allow_nan=False))
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.lists(inner, max_size=3).map(tuple),
            *(st.dictionaries(kind, inner, max_size=3) for kind in kinds),
        ),
        max_leaves=12,
    )


def spelled(value: Any) -> str:
    """repr that also tells tensors' dtype and shape, and is equal for equal trees only."""
    if isinstance(value, torch.Tensor):
        return f"tensor({value.dtype}, {list(value.shape)}, {value.tolist()})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {spelled(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return type(value).__name__ + str([spelled(v) for v in value])
    return repr(value)


@settings(max_examples=150, deadline=None)
@given(tree=trees())
def test_any_tree_survives_the_files(tmp_path_factory: pytest.TempPathFactory, tree: Any) -> None:
    folder = tmp_path_factory.mktemp("tree")
    save_state({"x": tree}, RawWriter(folder, "data.bin", "metadata.json"))
    assert spelled(load_state(trusting(folder), {})) == spelled({"x": tree})


@pytest.mark.parametrize(
    "stored",
    [
        {"$tensor": "absent"},
        {"$tensor": 1},
        {"$float": "1e400"},
        {"$tuple": {"a": 1}},
        {"$dict": [[1]]},
        {"$dict": [[[1], 2]]},
        {"$dict": [[{"$tuple": []}, 2]]},
        {"$pickle": "x"},
        {"$tuple": [], "$dict": []},
    ],
)
def test_a_form_that_was_never_written_is_refused(stored: Any) -> None:
    with pytest.raises(ValueError, match="unknown form"):
        unflatten({"x": [stored]}, {})


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torchs_own_save_and_load_work_with_the_pair(tmp_path: Path) -> None:
    tree = {"model": {"w": torch.randn(4, 4), "n": torch.tensor(3)}, "lr": 0.1, "betas": (0.9, 0.999)}
    dcp.save(
        tree,
        storage_writer=RawWriter(tmp_path, "data.bin", "metadata.json"),
        planner=TreeSavePlanner(),
        no_dist=True,
    )
    planner = TreeLoadPlanner()
    dcp.load({}, storage_reader=trusting(tmp_path), planner=planner, no_dist=True)
    loaded = planner.loaded()
    assert loaded["model"]["w"].equal(tree["model"]["w"])
    assert (loaded["lr"], loaded["betas"]) == (0.1, (0.9, 0.999))


@pytest.fixture
def _no_group_left() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def as_rank(rank: int, shape: tuple[int, ...], placements: list[Placement], whole: torch.Tensor | None) -> DTensor:
    """The DTensor that `rank` of a mesh of `shape` holds of `whole` (or of nothing yet): a world without messages."""
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", rank=rank, world_size=math.prod(shape), store=FakeStore())
    mesh = init_device_mesh("cpu", shape)
    if whole is None:
        whole = torch.zeros(13, 7)
    local = whole
    for dim, placement in enumerate(placements):
        if isinstance(placement, Shard):
            parts, index = mesh.size(dim), mesh.get_local_rank(dim)
            chunks = local.chunk(parts, placement.dim)
            empty = local.narrow(placement.dim, 0, 0)
            local = chunks[index] if index < len(chunks) else empty
    return DTensor.from_local(
        local.contiguous(), mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


LAYOUTS: list[tuple[tuple[int, ...], list[Placement]]] = [
    ((1,), [Shard(0)]),
    ((3,), [Shard(0)]),
    ((4,), [Shard(1)]),
    ((16,), [Shard(0)]),  # three ranks hold nothing
    ((2, 2), [Replicate(), Shard(0)]),
    ((2, 2), [Shard(1), Shard(0)]),
]


def save_as(folder: Path, shape: tuple[int, ...], placements: list[Placement], whole: torch.Tensor) -> None:
    """What the ranks of one disk do, one after the other, with the plans going through JSON as between ranks."""
    size = math.prod(shape)

    def planner_of(rank: int) -> TreeSavePlanner:
        planner = TreeSavePlanner()
        sharded = as_rank(rank, shape, placements, whole)
        planner.set_up_planner({"w": sharded, "bias": torch.arange(3), "step": 4})
        return planner

    plans = [json.loads(json.dumps(plan_to_json(planner_of(r).create_local_plan()))) for r in range(size)]
    results = []
    for rank in range(size):
        planner = planner_of(rank)
        spread, metadata = planner.create_global_plan([plan_from_json(p) for p in plans])
        writer = RawWriter(folder, f"shared-{rank:05d}.bin", "metadata.json")
        written = results_to_json(writer.write_data(spread[rank], planner).wait())
        results.append(results_from_json(json.loads(json.dumps(written))))
    writer.finish(metadata, results)


@pytest.mark.usefixtures("_no_group_left")
@pytest.mark.parametrize("saved", LAYOUTS, ids=str)
def test_sharded_state_is_written_once_and_read_under_any_mesh(
    tmp_path: Path, saved: tuple[tuple[int, ...], list[Placement]]
) -> None:
    whole = torch.arange(91.0).reshape(13, 7)
    save_as(tmp_path, *saved, whole)
    data_bytes = sum(p.stat().st_size for p in tmp_path.glob("*.bin"))
    chunks = len(json.loads((tmp_path / "metadata.json").read_text())["tensors"]["w"]["chunks"])
    assert data_bytes <= whole.numel() * 4 + 3 * 8 + 64 * (chunks + 1)
    for shape, placements in LAYOUTS:
        for rank in range(math.prod(shape)):
            template = as_rank(rank, shape, placements, None)
            loaded = load_state(trusting(tmp_path), {"w": template})
            expected = as_rank(rank, shape, placements, whole)
            assert isinstance(loaded["w"], DTensor)
            assert loaded["w"].placements == tuple(placements)
            assert loaded["w"].to_local().equal(expected.to_local())
            assert (loaded["step"], loaded["bias"].tolist()) == (4, [0, 1, 2])
            assert not template.to_local().any()
    assert load_state(trusting(tmp_path), {})["w"].equal(whole)


@pytest.mark.usefixtures("_no_group_left")
def test_a_disk_with_part_of_a_tensor_serves_only_that_part(tmp_path: Path) -> None:
    whole = torch.arange(91.0).reshape(13, 7)
    planner = TreeSavePlanner()
    planner.set_up_planner({"w": as_rank(0, (2,), [Shard(0)], whole)})
    plans, metadata = planner.create_global_plan([planner.create_local_plan()])
    writer = RawWriter(tmp_path, "data.bin", "metadata.json")
    writer.finish(metadata, [writer.write_data(plans[0], planner).wait()])
    loaded = load_state(trusting(tmp_path), {"w": as_rank(0, (2,), [Shard(0)], None)})
    assert loaded["w"].to_local().equal(whole[:7])
    with pytest.raises(CheckpointMismatchError, match="has 0 of the 42 values"):
        load_state(trusting(tmp_path), {"w": as_rank(1, (2,), [Shard(0)], None)})
    with pytest.raises(CheckpointMismatchError, match="stored in part on this disk"):
        load_state(trusting(tmp_path), {})


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    state = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.arange(5), "t": (1, 2)}
    save_state(state, RawWriter(folder, "data.bin", "metadata.json"))
    return folder


def a_of(metadata: dict[str, Any]) -> dict[str, Any]:
    return metadata["tensors"]["a"]


def chunk_of(metadata: dict[str, Any]) -> dict[str, Any]:
    return metadata["tensors"]["a"]["chunks"][0]


BIG = 2**62
HOSTILE = {
    "huge size": lambda m: a_of(m).update(size=[BIG, 4]),
    "huge size and chunk": lambda m: (a_of(m).update(size=[2**40, 4]), chunk_of(m).update(sizes=[2**40, 4])),
    "consistent huge chunk": lambda m: (
        a_of(m).update(size=[2**40, 4]),
        chunk_of(m).update(sizes=[2**40, 4], nbytes=2**44),
    ),
    "no bytes but endless": lambda m: (
        a_of(m).update(size=[0, BIG, BIG]),
        chunk_of(m).update(sizes=[0, BIG, BIG], offsets=[0, 0, 0], nbytes=0),
    ),
    "beyond 64 bits": lambda m: a_of(m).update(size=[10**40, 4]),
    "negative size": lambda m: a_of(m).update(size=[-3, 4]),
    "two negative sizes": lambda m: (a_of(m).update(size=[-3, -4]), chunk_of(m).update(sizes=[-3, -4])),
    "negative offset": lambda m: chunk_of(m).update(offsets=[-1, 0]),
    "offset outside": lambda m: chunk_of(m).update(offsets=[1, 0]),
    "huge offset": lambda m: chunk_of(m).update(offsets=[BIG, BIG]),
    "other rank": lambda m: chunk_of(m).update(offsets=[0], sizes=[12]),
    "many dimensions": lambda m: a_of(m).update(size=[1] * 100_000),
    "negative place": lambda m: chunk_of(m).update(at=-8),
    "huge place": lambda m: chunk_of(m).update(at=BIG),
    "place past the end": lambda m: chunk_of(m).update(at=92),
    "too few bytes": lambda m: chunk_of(m).update(nbytes=44),
    "shared bytes": lambda m: chunk_of(m).update(at=m["tensors"]["b"]["chunks"][0]["at"] - 16),
    "twice the same chunk": lambda m: a_of(m)["chunks"].append(copy.deepcopy(chunk_of(m))),
    "overlapping chunks": lambda m: a_of(m).update(
        chunks=[
            {**chunk_of(m), "sizes": [2, 4], "nbytes": 32},
            {**chunk_of(m), "offsets": [1, 0], "sizes": [2, 4], "nbytes": 32},
        ]
    ),
    "too many chunks": lambda m: a_of(m).update(chunks=[chunk_of(m)] * 5000),
    "unknown dtype": lambda m: a_of(m).update(dtype="object"),
    "other dtype": lambda m: a_of(m).update(dtype="float64"),
    "attribute of torch": lambda m: a_of(m).update(dtype="load"),
    "parent folder": lambda m: chunk_of(m).update(file="../data.bin"),
    "absolute path": lambda m: chunk_of(m).update(file="/etc/passwd"),
    "the folder": lambda m: chunk_of(m).update(file=".."),
    "line end": lambda m: chunk_of(m).update(file="data.bin\n"),
    "nul in the name": lambda m: chunk_of(m).update(file="a\0b"),
    "absent file": lambda m: chunk_of(m).update(file="other.bin"),
    "float size": lambda m: a_of(m).update(size=[3.0, 4]),
    "text for a number": lambda m: chunk_of(m).update(at="0"),
    "extra key": lambda m: chunk_of(m).update(pickle="gASV"),
    "other format": lambda m: m.update(format=2),
    "other byte order": lambda m: m.update(byteorder="big"),
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_hostile_metadata_is_refused_before_anything_is_allocated(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attack: str
) -> None:
    (tmp_path / "data.bin").write_bytes((sound / "data.bin").read_bytes())
    metadata = json.loads((sound / "metadata.json").read_text())
    HOSTILE[attack](metadata)
    (tmp_path / "metadata.json").write_text(json.dumps(metadata))

    def no_memory(*args: object, **kwargs: object) -> None:
        raise AssertionError("memory was asked for")

    monkeypatch.setattr(torch, "empty", no_memory)
    with pytest.raises((CheckpointError, ValueError)):
        load_state(trusting(tmp_path), {})


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "{", "[" * 100_000, '{"format": 1}', "\xff", '{"a": ' * 5000 + "1" + "}" * 5000]
)
def test_text_that_is_no_metadata_is_refused(sound: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "metadata.json").write_text(text, encoding="latin1")
    with pytest.raises(CheckpointError, match="malformed"):
        load_state(trusting(tmp_path), {})


def test_an_oversized_metadata_file_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "metadata.json", "wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(CheckpointError, match="at most"):
        load_state(trusting(tmp_path), {})


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_mutated_metadata_is_refused_or_loads_no_foreign_memory(
    sound: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Any one value replaced by any other: an error of ours, or a tree whose tensors fit in the data file."""
    metadata = json.loads((sound / "metadata.json").read_text())
    places: list[tuple[Any, Any]] = []

    def collect(value: Any) -> None:
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []:
            places.append((value, key))
            collect(value[key])

    collect(metadata)
    container, key = data.draw(st.sampled_from(places))
    numbers = st.one_of(st.integers(-4, 70), st.sampled_from([2**31, 2**32, 2**63 - 1, 2**63, 2**64, -(2**63)]))
    container[key] = data.draw(st.one_of(numbers, st.none(), st.text(max_size=3), st.lists(numbers, max_size=3)))
    folder = tmp_path_factory.mktemp("mutated")
    (folder / "data.bin").write_bytes((sound / "data.bin").read_bytes())
    (folder / "metadata.json").write_text(json.dumps(metadata))
    try:
        loaded = load_state(trusting(folder), {})
    except (CheckpointError, ValueError):
        return
    _, tensors = flatten({"x": loaded})
    assert sum(t.numel() * t.element_size() for t in tensors.values()) <= (sound / "data.bin").stat().st_size
