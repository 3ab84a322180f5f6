"""Export of weights to safetensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from thinwire.dist import checkpoint_export
from thinwire.dist.checkpoint_export import export_safetensors


def test_weights_come_back_tied_and_strided_ones_too(tmp_path: Path) -> None:
    weight = torch.randn(3, 4)
    state = {"embed": weight, "head": weight, "part": weight[1:], "t": weight.t(), "b": torch.ones(2).bfloat16()}
    export_safetensors(state, tmp_path / "new" / "model.safetensors", {"step": "3"})
    loaded = load_file(tmp_path / "new" / "model.safetensors")
    assert sorted(loaded) == sorted(state)
    assert all(loaded[name].equal(state[name]) for name in state)
    assert loaded["b"].dtype == torch.bfloat16
    with safe_open(tmp_path / "new" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"step": "3"}


def test_a_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    export_safetensors({"w": torch.zeros(2)}, path)

    def full(tensors: object, filename: Path, metadata: object) -> None:
        Path(filename).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_export, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        export_safetensors({"w": torch.ones(2)}, path)
    assert load_file(path)["w"].equal(torch.zeros(2))
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_what_is_no_dense_tensor_is_refused(tmp_path: Path) -> None:
    for value in (torch.ones(2, device="meta"), torch.ones(2).to_sparse(), 3.0):
        with pytest.raises(ValueError, match="export_safetensors: w is a"):
            export_safetensors({"w": value}, tmp_path / "x.safetensors")  # type: ignore[dict-item]
