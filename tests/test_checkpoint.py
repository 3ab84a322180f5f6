"""Checkpointer: what goes in comes out, on one rank and several, on shared and separate disks."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import pytest
import torch
from checkpoints import alone, among, assert_same
from ranks import Rank, run_ranks

from thinwire.dist.checkpoint import (
    Checkpointer,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointSettings,
    Loaded,
)


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(11, 6)
        self.norm = torch.nn.LayerNorm(6)
        self.middle = torch.nn.Linear(6, 6, dtype=torch.bfloat16)
        self.head = torch.nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.tensor(0))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.embed(tokens))
        return self.head(x + self.middle(x.bfloat16()).float())


def train(model: Tied, optimizer: torch.optim.Optimizer, steps: int, draws: torch.Generator) -> list[float]:
    losses = []
    for _ in range(steps):
        tokens = torch.randint(11, (4, 8), generator=draws)
        loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def fresh() -> tuple[Tied, torch.optim.AdamW, torch.Generator]:
    model = Tied()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2), torch.Generator().manual_seed(1)


def test_resume_continues_bit_for_bit_with_an_optimizer_that_has_not_stepped(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, optimizer, draws = fresh()
    train(model, optimizer, 3, draws)
    shared = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    alone(tmp_path).save(3, shared, {"draws": draws.get_state()}, {"config": "abc"})
    expected = train(model, optimizer, 3, draws)

    model, optimizer, draws = fresh()
    template = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    loaded = alone(tmp_path).load_latest(template)
    assert loaded is not None
    assert loaded.per_rank is not None
    assert (loaded.step, loaded.facts, loaded.refused) == (3, {"config": "abc"}, ())
    model.load_state_dict(loaded.shared["model"])
    optimizer.load_state_dict(loaded.shared["optimizer"])
    draws.set_state(loaded.per_rank["draws"])
    assert train(model, optimizer, 3, draws) == expected


def odd_tree() -> dict[str, object]:
    base = torch.arange(24.0).reshape(4, 6)
    return {
        "bf16": torch.randn(5, 3).bfloat16(),
        "int64": torch.tensor([2**62, -1]),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.empty(0, 7),
        "transposed": base.t(),
        "strided": base[::2, 1::2],
        "bool": torch.tensor([True, False, True]),
        "complex": torch.randn(3, dtype=torch.complex64).conj(),
        "fp8": torch.randn(4).to(torch.float8_e4m3fn),
        "nonfinite": torch.tensor([float("nan"), float("inf"), -0.0]),
        "state": {0: {"step": torch.tensor(1.0), "lr": 0.1 + 0.2}, 1: (), "1b": None},
        "python": random.Random(3).getstate(),
        "plain": [1, -(2**80), True, "é/~.", [], {}, (1, [2.5e-310, -0.0, float("nan"), float("-inf")])],
        "a/b": {"c": torch.ones(1)},
        "a": {"b/c": torch.zeros(1), "$tensor": 1},
    }


def test_odd_tensors_and_plain_values_come_back_exactly(tmp_path: Path) -> None:
    tree = odd_tree()
    alone(tmp_path).save(1, tree, {"own": tree})
    loaded = alone(tmp_path).load_latest()
    assert loaded is not None
    assert_same(loaded.shared, tree)
    assert_same(loaded.per_rank, {"own": tree})


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    model = Tied()
    path = alone(tmp_path).save(1, {"model": model.state_dict()}, {})
    data_bytes = sum(f.stat().st_size for f in path.glob("shared-*.bin"))
    assert data_bytes < 2 * model.embed.weight.numel() * 4 + 6 * 6 * 2 + 6 * 64
    loaded = alone(tmp_path).load_latest()
    assert loaded is not None
    weights = loaded.shared["model"]
    assert weights["head.weight"].data_ptr() == weights["embed.weight"].data_ptr()


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({"model": {"sub": {1, 2}}}, "model/sub is a builtins.set"),
        ({"model": [torch.Size([1])]}, "model/0 is a torch.Size"),
        ({"model": {(1, 2): 3}}, r"key \(1, 2\)"),
        ({"model": {0: 1, "0": 2}}, "two keys that read as 0"),
        ({"model": torch.ones(2, device="meta")}, "model is a tensor of dtype torch.float32"),
        ({"model": torch.ones(2).to_sparse()}, "layout torch.sparse_coo"),
        ({"model": "\ud800"}, "no UTF-8 form"),
    ],
)
def test_what_a_checkpoint_cannot_hold_is_refused_by_path(tmp_path: Path, value: dict[str, object], told: str) -> None:
    checkpoints = alone(tmp_path)
    with pytest.raises(CheckpointError, match=told):
        checkpoints.save(1, value, {})
    with pytest.raises(CheckpointError, match=told):
        checkpoints.save(1, {}, value)
    assert [p.name for p in tmp_path.iterdir()] == []


def test_nesting_is_limited_to_what_can_be_read_back(tmp_path: Path) -> None:
    tree: object = 1.0
    for _ in range(50):
        tree = {1: (tree,)} if isinstance(tree, dict) else {1: tree}
    too_deep = {"x": tree}
    with pytest.raises(CheckpointError, match="nested deeper than 50"):
        alone(tmp_path).save(1, too_deep, {})
    tree = 1.0
    for _ in range(24):
        tree = {1: (tree,)}
    alone(tmp_path).save(1, {"x": tree}, {})
    loaded = alone(tmp_path).load_latest()
    assert loaded is not None
    assert loaded.shared == {"x": tree}


def test_facts_that_json_would_change_are_refused(tmp_path: Path) -> None:
    checkpoints = alone(tmp_path)
    for facts in ({"a": (1, 2)}, {"a": {1: 2}}, {"a": float("nan")}, {"a": {1, 2}}):
        with pytest.raises(CheckpointError, match="facts"):
            checkpoints.save(1, {}, {}, facts)


def test_generations_beyond_keep_are_removed_oldest_first(tmp_path: Path) -> None:
    checkpoints = alone(tmp_path, keep=3)
    for step in (5, 10, 15, 20, 20):
        checkpoints.save(step, {"step": step}, {})
        (tmp_path / ".writing-0123").mkdir()  # as a killed writer leaves it
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000010", "step-00000015", "step-00000020"]
    checkpoints.save(25, {"step": 25}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000015", "step-00000020", "step-00000025"]


def test_no_checkpoint_is_none_but_a_run_does_not_start_afresh_over_damage(tmp_path: Path) -> None:
    checkpoints = alone(tmp_path)
    assert checkpoints.load_latest() is None
    (tmp_path / ".writing-0123").mkdir()
    assert checkpoints.load_latest() is None
    path = checkpoints.save(1, {}, {})
    (path / "metadata.json").unlink()
    with pytest.raises(CheckpointError, match=r"step-00000001.*metadata\.json cannot be read.*start afresh"):
        alone(tmp_path).load_latest()


def test_old_checkpoints_are_not_mixed_with_a_run_that_did_not_load_them(tmp_path: Path) -> None:
    alone(tmp_path).save(7, {}, {})
    with pytest.raises(CheckpointError, match=r'checkpoint.resume is "never", but .*step-00000007'):
        alone(tmp_path, resume="never")
    with pytest.raises(CheckpointError, match="neither wrote nor loaded"):
        alone(tmp_path).save(8, {}, {})
    reader = Checkpointer(tmp_path, CheckpointSettings(), group=None, rank=0, world_size=1, read_only=True)
    assert isinstance(reader.load_latest(), Loaded)
    with pytest.raises(CheckpointError, match="read-only"):
        reader.save(8, {}, {})


def test_another_runs_folder_or_one_generation_of_it_can_be_read(tmp_path: Path) -> None:
    checkpoints = alone(tmp_path / "old")
    checkpoints.save(1, {"x": 1}, {})
    checkpoints.save(2, {"x": 2}, {})

    def read(path: Path) -> Loaded | None:
        return Checkpointer(path, CheckpointSettings(), group=None, rank=0, world_size=1, read_only=True).load_latest()

    loaded = [read(tmp_path / "old"), read(tmp_path / "old" / "step-00000001")]
    assert [x.shared for x in loaded if x] == [{"x": 2}, {"x": 1}]
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        read(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_abandoned_newer_generations_go_once_there_is_a_new_one(tmp_path: Path) -> None:
    checkpoints = alone(tmp_path)
    for step in (10, 20):
        checkpoints.save(step, {"x": step}, {})
    data = tmp_path / "step-00000020" / "metadata.json"
    data.write_bytes(data.read_bytes().replace(b"20", b"21"))
    again = alone(tmp_path)
    loaded = again.load_latest()
    assert loaded is not None
    assert (loaded.step, loaded.shared) == (10, {"x": 10})
    assert len(loaded.refused) == 1
    assert "step-00000020" in loaded.refused[0]
    again.save(30, {"x": 30}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000030"]


def test_another_shape_or_dtype_is_a_mismatch_not_damage(tmp_path: Path) -> None:
    alone(tmp_path).save(1, {"w": torch.ones(2, 3)}, {})
    with pytest.raises(CheckpointMismatchError, match=r"w is torch.float32 of size \(2, 3\).*of size \(3, 2\) here"):
        alone(tmp_path).load_latest({"w": torch.ones(3, 2)})
    with pytest.raises(ValueError, match=r"torch\.bfloat16"):
        alone(tmp_path).load_latest({"w": torch.ones(2, 3).bfloat16()})


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, draws = fresh()
    train(model, optimizer, 1, draws)
    folders = [tmp_path / "0", tmp_path / "1"]

    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("pickle was used")

    for name in ("load", "loads", "Unpickler", "_Unpickler", "dump", "dumps", "Pickler", "_Pickler"):
        monkeypatch.setattr(pickle, name, forbidden)
    monkeypatch.setattr(torch, "load", forbidden)
    monkeypatch.setattr(torch, "save", forbidden)

    def work(rank: Rank) -> None:
        shared = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        among(rank, folders[0]).save(1, shared, {"tree": odd_tree()})
        assert among(rank, folders[0]).load_latest(shared)

    run_ranks(2, work)


def test_settings_refuse_a_single_generation() -> None:
    with pytest.raises(ValueError, match="keep"):
        CheckpointSettings(keep=1)
