"""The configuration: every ready-made file loads, and every mistake is told with its path, value and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from worlds import small_config, small_config_file

from thinwire.dist.config import ConfigError, dump_config, load_config
from thinwire.dist.models import build_model
from thinwire.dist.train import TrainSettings
from thinwire.launch.train import main, show

CONFIGS = Path(__file__).parent.parent / "configs"
MILLIONS = {"gpt_0.8m": 0.82, "gpt_3m": 3.21, "gpt_10m": 10.72, "gpt_30m": 30.26, "gpt_124m": 124.84, "demo": 3.21}
MILLIONS |= {"moe_8m": 7.82, "moe_domains": 0.50, "demo_moe": 9.51}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_ready_made_file_loads_and_has_the_parameters_it_says(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem
    for world_size in (1, 2, 4, 8):
        config.train.share(world_size)
    if config.model.kind == "hf":
        return  # its size is that of the folder
    model = build_model(config.model, tokenizer_vocab=256, seed=0, device=torch.device("meta"))
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    named = [MILLIONS[path.stem]] if path.stem in MILLIONS else MILLIONS.values()  # a method is shown with one of these
    assert any(millions == pytest.approx(size, abs=0.005) for size in named)


def test_all_sizes_are_there() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} >= set(MILLIONS)


def test_overrides_replace_settings(tmp_path: Path) -> None:
    config = small_config(tmp_path, "train.steps=7", "optimizer={kind: sgd, lr: 1e-1}", "checkpoint.every_steps=3")
    assert config.train.steps == 7
    assert config.optimizer.kind == "sgd"
    assert config.optimizer.lr == 0.1
    assert config.checkpoint.every_steps == 3


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "+1e-4", "0.0001", ".1e-3", "1.e-4"])
def test_floats_are_read_as_people_write_them(tmp_path: Path, text: str) -> None:
    assert small_config(tmp_path, f"optimizer.lr={text}").optimizer.lr == 1e-4


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.stps=5", ["train.stps", "unknown", "train.steps"]),
        ("lr=5", ["lr", "unknown", "optimizer.lr"]),
        ("method.density=0.1", ["method.density", "unknown", "dtype"]),
        ("model.layers=x", ["model.layers", "'x'", "whole number", "above 0"]),
        ("model.layers=0", ["model.layers", "0", "above 0"]),
        ("model.layers=2.5", ["model.layers", "2.5", "whole number"]),
        ("model.layers=true", ["model.layers", "True", "whole number"]),
        ("model.layers='2'", ["model.layers", "'2'", "whole number"]),
        ("optimizer.lr=.nan", ["optimizer.lr", "nan", "number"]),
        ("optimizer.lr=-1", ["optimizer.lr", "-1", "above 0"]),
        ("train.eval_windows=most", ["train.eval_windows", "'most'", "whole number at least 0", "all"]),
        ("train.micro_batch=0", ["train.micro_batch", "0", "above 0", "auto"]),
        ("optimizer.kind=adam", ["optimizer.kind", "'adam'", "adamw, sgd", "did you mean adamw"]),
        ("method.dtype=bf61", ["method.dtype", "'bf61'", "fp32 or bf16 or fp16", "did you mean bf16"]),
        ("method.kind=compres", ["method.kind", "'compres'", "allreduce, compress", "did you mean compress"]),
        ("method={kind: compress, compressor: topkk}", ["method.compressor.kind", "'topkk'", "did you mean topk"]),
        ("method={kind: compress, compressor: int8, feedback: ef22}", ["method.feedback.kind", "'ef22'", "ef21"]),
        ("method={kind: compress, compressor: {kind: topk, densty: 1}}", ["method.compressor.densty", "density"]),
        (
            "method={kind: compress, compressor: bf16, feedback: dgc}",
            ["method", "dgc", "give topk, threshold or randk"],
        ),
        ("model={kind: gpt}", ["model.layers", "missing", "whole number"]),
        ("model=gpt", ["model", "'gpt'", "kind: gpt or moe or hf"]),
        ("model.heads=3", ["model", "32", "multiple of 2 x heads"]),
        ("data.files=[]", ["data", "files"]),
        ("data.corpus=stdlib", ["data", "files", "stdlib"]),
        ("name=a/b", ["name", "'a/b'"]),
        ("mesh.levels=[{name: pair, size: x}]", ["mesh.levels[0].size", "'x'", "whole number"]),
        ("world.timeout_s=0", ["world.timeout_s", "above 0"]),
        ("train.steps", ["'train.steps'", "key.path=value"]),
        ("seed.x=1", ["seed", "key"]),
        ("train.steps=[", ["train.steps", "YAML"]),
    ],
)
def test_mistakes_are_explained(tmp_path: Path, override: str, parts: list[str]) -> None:
    overrides = ["seed=1", override] if override.startswith("seed.") else [override]
    with pytest.raises(ConfigError) as caught:
        small_config(tmp_path, *overrides)
    text = str(caught.value)
    for part in parts:
        assert part in text
    for jargon in ("http", "pydantic", "type=", "Input should"):
        assert jargon not in text


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"3 settings(?s:.*)model\.layers(?s:.*)train\.stps(?s:.*)mesh"):
        small_config(tmp_path, "model.layers=x", "train.stps=1", "mesh=3")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train: {steps: 1}\ntrain: {steps: 2}\n", "line 2: the key 'train' is given twice"),
        ("train: [\n", "not valid YAML"),
        ("- a\n", "expected keys and values"),
        ("", "expected keys and values"),
    ],
)
def test_broken_files_are_explained(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        load_config(path)


def test_a_missing_file_is_explained(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "absent.yaml")
    assert main(tmp_path / "absent.yaml", []) == 2
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_what_config_show_prints_loads_back_to_the_same(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    owner = "method" if "onebyte" in path.stem else "optimizer"
    overrides = [f"{owner}.lr=1e-5", "mesh.levels=[{name: pair, size: 2}]"]
    assert show(path, overrides) == 0
    shown = tmp_path / "shown.yaml"
    shown.write_text(capsys.readouterr().out)
    config = load_config(path, overrides)
    secrets = []
    if path.stem == "gossip_machines":
        with pytest.raises(ConfigError, match="asterisks stand for it"):
            load_config(shown)
        secrets = ["method.machines.secret=change this text"]
    assert load_config(shown, secrets) == config
    assert dump_config(load_config(shown, secrets)) == dump_config(config)
    assert getattr(config, owner).lr == 1e-5


def test_config_show_explains_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert show(small_config_file(tmp_path), ["trian.steps=1"]) == 2
    assert "did you mean train" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "world_size", "says"),
    [
        (10, "auto", 4, "train.global_batch: 10 .* 4 ranks; nearest: 8 or 12"),
        (2, "auto", 4, "train.global_batch: 2 .* nearest: 4"),
        (24, 5, 2, "train.micro_batch: 5 does not divide the 12 .* nearest: 3, 4, 6, or auto"),
        (24, 16, 2, "train.micro_batch: 16 .* nearest: 4, 6, 12, or auto"),
    ],
)
def test_batches_that_cannot_be_shared_are_refused(
    global_batch: int, micro_batch: int | str, world_size: int, says: str
) -> None:
    settings = TrainSettings(steps=1, global_batch=global_batch, micro_batch=micro_batch)
    with pytest.raises(ValueError, match=says):
        settings.share(world_size)


def test_shares_multiply_to_the_global_batch() -> None:
    assert TrainSettings(steps=1, global_batch=24).share(4) == (6, 1)
    assert TrainSettings(steps=1, global_batch=24, micro_batch=2).share(4) == (2, 3)
