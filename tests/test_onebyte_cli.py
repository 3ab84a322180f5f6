"""`thinwire onebyte`: every form of a base, what is written, what is said, and the exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from onebyte_logs import MEMBERS, base_weights, manifest_for, write_run
from safetensors.torch import load_file, save_file
from torch import Tensor

from thinwire.comm.onebyte.log import Log
from thinwire.comm.onebyte.rounds import Contribution, Roster, Round
from thinwire.dist.checkpoint import Checkpointer, CheckpointSettings
from thinwire.launch import onebyte

ROUNDS = 12


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A log, and the weights at its end; the base is base.safetensors beside it."""
    base = base_weights()
    save_file(base, tmp_path / "base.safetensors")
    return tmp_path / "run.log", write_run(tmp_path / "run.log", base, ROUNDS, snapshot_every=5)


def as_file(folder: Path, base: dict[str, Tensor]) -> Path:
    save_file(base, folder / "other.safetensors")
    return folder / "other.safetensors"


def as_pretrained(folder: Path, base: dict[str, Tensor]) -> Path:
    save_file(base, folder / "model.safetensors")
    return folder


def as_shards(folder: Path, base: dict[str, Tensor]) -> Path:
    places = {name: f"model-{i:05d}-of-00003.safetensors" for i, name in enumerate(base)}
    for name, file in places.items():
        save_file({name: base[name]}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def checkpoints_in(folder: Path, base: dict[str, Tensor]) -> Path:
    settings = CheckpointSettings()
    checkpointer = Checkpointer(folder / "checkpoints", settings, group=None, rank=0, world_size=1)
    checkpointer.save(3, {"model": {name: torch.zeros_like(base[name]) for name in base}}, {"method": {}})
    checkpointer.save(7, {"model": base, "optimizer": {"step": 7}}, {"method": {}})
    return folder


def as_generation(folder: Path, base: dict[str, Tensor]) -> Path:
    return checkpoints_in(folder, base) / "checkpoints" / "step-00000007"


def as_checkpoints(folder: Path, base: dict[str, Tensor]) -> Path:
    return checkpoints_in(folder, base) / "checkpoints"


@pytest.mark.parametrize(
    "form", [as_file, as_pretrained, as_shards, checkpoints_in, as_checkpoints, as_generation], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("beginning", ["", "bert."])
def test_every_form_of_base(run: tuple[Path, dict[str, Tensor]], tmp_path: Path, form, beginning: str) -> None:  # type: ignore[no-untyped-def]
    log, final = run
    (folder := tmp_path / "model").mkdir()
    beside = {f"{beginning}frozen": torch.arange(5), "unused": torch.ones(2)}
    base = form(folder, {**{beginning + name: tensor for name, tensor in base_weights().items()}, **beside})
    assert onebyte.replay(log, base, tmp_path / "new" / "out.safetensors") == 0
    written = load_file(tmp_path / "new" / "out.safetensors")
    expected = {**{beginning + name: tensor for name, tensor in final.items()}, **beside}
    assert sorted(written) == sorted(expected)
    assert all(torch.equal(written[name], expected[name]) for name in expected)


def test_names_that_the_run_had_in_front(tmp_path: Path) -> None:
    """A model that trained as part of another: what all names have in front is not in the file."""
    base = {f"network.{name}": tensor for name, tensor in base_weights().items()}
    final = write_run(tmp_path / "run.log", base, 3)
    save_file({f"transformer.{name}": t for name, t in base_weights().items()}, tmp_path / "base.safetensors")
    out = tmp_path / "out.safetensors"
    assert onebyte.replay(tmp_path / "run.log", tmp_path / "base.safetensors", out, step_by_step=True) == 0
    written = load_file(out)
    assert all(torch.equal(written[f"transformer.{n}"], final[f"network.{n}"]) for n in base_weights())


def test_a_16_bit_file_that_was_trained_in_fp32(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tied weights under a second name follow, also from checkpoints; equal constants do not."""
    half = base_weights(torch.float16)
    half["block.0.norm"] = torch.ones(7, dtype=torch.float16)
    final = write_run(tmp_path / "run.log", {name: tensor.float() for name, tensor in half.items()}, 3)
    stored = {**half, "head.weight": half["embed.weight"].clone(), "block.1.norm": torch.ones(7, dtype=torch.float16)}
    save_file(stored, tmp_path / "base.safetensors")
    out = tmp_path / "out.safetensors"
    assert onebyte.replay(tmp_path / "run.log", tmp_path / "base.safetensors", out) == 0
    assert "head.weight was equal to embed.weight in the base, and follows it" in capsys.readouterr().out
    written = load_file(out)
    assert torch.equal(written["head.weight"], final["embed.weight"])
    assert not torch.equal(written["block.0.norm"], torch.ones(7))
    assert torch.equal(written["block.1.norm"], torch.ones(7, dtype=torch.float16))


def test_as_a_user_types_it(run: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    """Both kinds of replay write the same file, and what they leave of a run can be verified."""
    log, final = run
    command = [sys.executable, "-m", "thinwire.launch.cli", "onebyte", "replay", str(log), "--base", "base.safetensors"]
    done = subprocess.run(
        [*command, "--out", "a.safetensors"], check=False, cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "a.safetensors: 3 tensors, 3 of them trained, after 12 rounds" in done.stdout
    assert "a snapshot in the log confirms the weights after 10 rounds" in done.stdout
    out = tmp_path / "b.safetensors"
    assert onebyte.replay(log, tmp_path / "base.safetensors", out, step_by_step=True) == 0
    assert out.read_bytes() == (tmp_path / "a.safetensors").read_bytes()
    assert all(torch.equal(load_file(out)[name], final[name]) for name in final)


def test_verify(run: tuple[Path, dict[str, Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, _ = run
    assert onebyte.verify(log, None) == 0
    assert "all 15 records are sound, 12 rounds" in (told := capsys.readouterr().out)
    assert "give --base MODEL" in told
    assert onebyte.verify(log, tmp_path / "base.safetensors") == 0
    assert "after 12 rounds: " in (told := capsys.readouterr().out)
    assert "a snapshot in the log confirms the weights after 10 rounds" in told
    log.write_bytes(log.read_bytes()[:-1])
    assert onebyte.verify(log, None) == 0
    assert "the last 12 bytes are a record that its writer did not finish" in capsys.readouterr().out


def test_mistakes(run: tuple[Path, dict[str, Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, final = run
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    save_file(final, tmp_path / "final.safetensors")
    save_file({"embed.weight": final["embed.weight"]}, tmp_path / "part.safetensors")
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn.safetensors").write_bytes(base.read_bytes()[:100])
    (tmp_path / "weights.pt").write_bytes(b"")
    (tmp_path / "shards").mkdir()
    index = as_shards(tmp_path / "shards", base_weights()) / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../model-00001"))
    for model, message in {
        "nothing": "nothing does not exist",
        "empty": "holds no model: neither model.safetensors nor",
        "weights.pt": "no pickle is read",
        "torn.safetensors": "torn.safetensors cannot be read",
        "shards": "which is not a file beside it",
        "part.safetensors": r"lacks block.0.norm and 1 more of the 3 tensors",
        "final.safetensors": "embed.weight is the first of 3 tensors that differ",
    }.items():
        assert onebyte.replay(log, tmp_path / model, out) == 2
        assert message in (told := capsys.readouterr().err), told
        assert told.startswith("thinwire: ")
    assert onebyte.replay(log, base, tmp_path / "out.pt") == 2
    assert onebyte.replay(log, base, out, until=13) == 2
    assert onebyte.verify(tmp_path / "no.log", None) == 2
    assert onebyte.inspect(tmp_path / "no.log", as_json=False) == 2
    assert "no.log: No such file or directory" in capsys.readouterr().err
    assert onebyte.verify(log, base, device="abacus") == 2
    assert "--device abacus: " in capsys.readouterr().err
    assert not out.exists()
    damaged = bytearray(log.read_bytes())
    damaged[-20] ^= 1
    log.write_bytes(damaged)
    for work in (lambda: onebyte.verify(log, base), lambda: onebyte.inspect(log, as_json=True)):
        assert work() == 1
        assert "its check bytes are not those of the chain" in capsys.readouterr().err


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Counts of a log written by hand: who came and went, zero, saturated and absent codes."""
    path = tmp_path / "run.log"
    with Log.create(path, manifest_for(base_weights(), slope_floor=1.0).to_bytes()) as log:
        log.append(Roster(0, MEMBERS[:2]))
        log.append(Round(0, 0.5, (Contribution(0, b"\x00\x7f"), Contribution(1, b"\xff\x80"))))
        log.append(Round(1, 0.5, (Contribution(1, b"\x01\x89"),)))
        log.append(Roster(1, MEMBERS[1:3]))
        log.append(Round(2, 0.25, (Contribution(1, b"\x01\x02"), Contribution(2, b"\x10\x00"))))
    assert onebyte.inspect(path, as_json=True) == 0
    found = json.loads(capsys.readouterr().out)
    expected = {"rounds": 3, "contributions": 10, "contributions_least": 2, "contributions_most": 4, "rosters": 2}
    expected |= {"zero": 2, "saturated": 2, "absent": 1, "rate_changes": 1, "snapshots": 0, "last_snapshot": None}
    expected |= {"octaves": {"0": 3, "1": 2, "15": 2}, "rates": [0.5, 0.25, 0.25, 0.5]}
    expected |= {"round_bytes": 13 + 9 + 13, "size_bytes": path.stat().st_size, "torn_bytes": 0}
    expected |= {"weights": 19 * 7 + 7 + 7 * 31, "fp32_gradient_bytes": 4 * (19 * 7 + 7 + 7 * 31)}
    assert {key: found[key] for key in expected} == expected
    stays = {(s["slot"], s["first"], s["end"]): (s["rounds"], s["codes"], s["absent"]) for s in found["stays"]}
    assert stays == {(0, 0, 2): (1, 2, 0), (1, 0, None): (3, 6, 1), (2, 2, None): (1, 2, 0)}
    assert onebyte.inspect(path, as_json=False) == 0
    told = capsys.readouterr().out
    assert "0     machine0  -        2        0           2        1 of 2          0" in told.splitlines()
    assert "rate          0.5 first, 0.25 last, 0.25 to 0.5" in told
    with Log.create(tmp_path / "empty.log", manifest_for(base_weights()).to_bytes()):
        pass
    assert onebyte.inspect(tmp_path / "empty.log", as_json=False) == 0
    assert "rounds        0\n" in capsys.readouterr().out
    with Log.create(tmp_path / "odd.log", b"[]"):
        pass
    assert onebyte.inspect(tmp_path / "odd.log", as_json=False) == 2
    assert "cannot read its manifest" in capsys.readouterr().err
