"""What becomes of a DeepSpeed configuration: every key is translated or spoken of, and the result is a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from thinwire.comm.partition.settings import PartitionSettings
from thinwire.launch.cli import app
from thinwire.launch.deepspeed_config import translate
from thinwire.launch.import_deepspeed import render

BASE = Path(__file__).parents[1] / "configs" / "gpt_3m.yaml"


def zero(**settings: Any) -> dict[str, Any]:
    return {"zero_optimization": settings}


@pytest.mark.parametrize(
    ("given", "method"),
    [
        ({}, {"kind": "allreduce"}),
        ({"communication_data_type": "bfp16"}, {"kind": "allreduce", "dtype": "bf16"}),
        (zero(stage=1), {"kind": "partition", "preset": "zero1"}),
        (zero(stage=2), {"kind": "partition", "preset": "zero2"}),
        (zero(stage=3), {"kind": "partition", "preset": "zero3"}),
        (zero(stage=3, zero_hpz_partition_size=4), {"kind": "partition", "preset": "hpz"}),
        (zero(stage=3, mics_shard_size=4), {"kind": "partition", "preset": "mics"}),
        (zero(stage=3, zero_quantized_weights=True), {"kind": "partition", "preset": "zero3", "gather": "int8"}),
        (
            zero(stage=3, zero_quantized_gradients=True),
            {
                "kind": "partition",
                "preset": "zero3",
                "gradients": {"node": {"kind": "int4", "smooth": False}, "world": {"kind": "int4"}},
            },
        ),
        (
            {**zero(stage=2), "communication_data_type": "fp16"},
            {"kind": "partition", "preset": "zero2", "gradients": {"node": "fp16", "world": "fp16"}},
        ),
    ],
)
def test_what_deepspeed_shards_and_sends_becomes_a_method(given: dict[str, Any], method: dict[str, Any]) -> None:
    found = translate(given).settings
    assert found["method"] == method
    if method["kind"] == "partition":
        PartitionSettings.model_validate(method)
    sizes = [given.get("zero_optimization", {}).get(f"{name}_size", 0) for name in ("zero_hpz_partition", "mics_shard")]
    assert found.get("mesh") == ({"levels": [{"name": "node", "size": 4}]} if any(sizes) else None)


def test_a_whole_file_becomes_a_run_and_says_what_it_cannot_be(tmp_path: Path) -> None:
    given = {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": "auto",
        "optimizer": {"type": "Adam", "params": {"lr": 3e-4, "betas": [0.8, 0.99], "weight_decay": "auto"}},
        "scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 900, "warmup_num_steps": 100}},
        "fp16": {"enabled": True, "loss_scale": 0},
        "zero_optimization": {
            "stage": 3,
            "zeropp_loco_param": {"err_beta": 0.8, "reset_T": 1024},
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "offload_param": {"device": "none"},
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": 0,
        },
        "flops_profiler": {"enabled": False, "profile_step": 1},
        "wall_clock_breakdown": False,
        "tensorboard": {"enabled": True, "output_path": "x"},
        "train_batch_sise": 3,
    }
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(given))
    text = render(file, BASE)
    run = yaml.safe_load(text)
    base = yaml.safe_load(BASE.read_text())
    assert run["model"]["kind"] == base["model"]["kind"]
    assert run["train"]["steps"] == base["train"]["steps"]
    assert run["train"] | {"global_batch": 64, "micro_batch": 4, "clip_norm": 0.0, "precision": "bf16"} == run["train"]
    adamw = {"kind": "adamw", "lr": 3e-4, "beta1": 0.8, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0}
    assert run["optimizer"] == adamw
    assert run["schedule"] == {"kind": "cosine", "warmup_steps": 100, "decay_steps": 900, "final": 1e-4}
    assert run["engine"]["kind"] == "fsdp2"
    assert run["engine"]["prefetch"] == 0
    assert run["output"]["tensorboard"]
    file.with_suffix(".yaml").write_text(text)
    again = CliRunner().invoke(app, ["config", "show", str(file.with_suffix(".yaml")), "name=x"])
    assert again.exit_code == 0, again.output
    spoken_of = set(translate(given).remarks)
    assert spoken_of == {
        "gradient_accumulation_steps",
        "optimizer.params.weight_decay",
        "scheduler.params.warmup_type",
        "fp16",
        "zero_optimization.stage",
        "zero_optimization.zeropp_loco_param",
        "zero_optimization.offload_optimizer",
        "train_batch_sise",
    }
    comment = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    assert all(key in comment for key in spoken_of)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("{", "not valid JSON"),
        ("[]", "expected an object"),
        (json.dumps(zero(stage=4)), "zero_optimization.stage: 4 is none of 0, 1, 2, 3"),
        (json.dumps({"communication_data_type": "int8"}), "'int8' is none of"),
    ],
)
def test_what_is_no_deepspeed_configuration_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "ds.json"
    if text is not None:
        file.write_text(text)
    outcome = CliRunner().invoke(app, ["config", "import-deepspeed", str(file)])
    assert outcome.exit_code == 2
    assert message in outcome.output


def test_optimizers_and_schedules_that_thinwire_lacks_are_named() -> None:
    given = {
        "optimizer": {"type": "OneBitAdam", "params": {"lr": 1e-3}},
        "scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 1e-5}},
    }
    remarks = translate(given).remarks
    assert "method: {kind: compress" in remarks["optimizer.type"]
    assert "OneCycle" in remarks["scheduler.type"]
    sgd = translate({"optimizer": {"type": "SGD", "params": {"lr": 0.1, "weight_decay": 0.1, "dampening": 0.5}}})
    plain = {"kind": "sgd", "lr": 0.1, "momentum": 0.0, "nesterov": False, "weight_decay": 0.1}
    assert sgd.settings["optimizer"] == plain
    assert set(sgd.remarks) == {"optimizer.params.weight_decay", "optimizer.params.dampening"}
