"""metrics.jsonl and its siblings: every step once, whole lines, and clear words for a package that is missing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import psutil
import pytest

from thinwire.comm.meter import TrafficMeter
from thinwire.dist.interface import loopback_interface
from thinwire.dist.metrics import JsonLines, StepTraffic, TensorBoard, WandB, flat_numbers, read_records
from thinwire.dist.run_folder import numeric_settings, write_config


def record(step: int) -> dict[str, object]:
    return {"step": step, "loss": 1.0 / step, "seconds": 2.0 * step, "sent_bytes_by_level": {"node": 5}}


def test_records_are_on_disk_as_soon_as_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path, 0)
    for step in range(1, 4):
        lines.write(record(step))
        assert [json.loads(line) for line in path.read_text().splitlines()] == [record(s) for s in range(1, step + 1)]
    lines.close()
    assert lines.seconds_before == 0.0


def test_resuming_removes_the_steps_that_will_be_done_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record(step)) + "\n" for step in range(1, 8)) + '{"step": 8, "lo')
    lines = JsonLines(path, 5)
    assert lines.seconds_before == 10.0
    lines.write(record(6))
    lines.close()
    assert [r["step"] for r in read_records(path)] == [1, 2, 3, 4, 5, 6]


def test_not_a_number_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        JsonLines(tmp_path / "metrics.jsonl", 0).write({"step": 1, "loss": float("nan")})


def test_traffic_is_told_by_step_level_and_purpose() -> None:
    meter = TrafficMeter(["self", "node", "world"])
    meter.record("control/preflight", {1: 128, 2: 128}, {1: 128, 2: 128}, 0.0)
    traffic = StepTraffic(meter, loopback_interface().name)
    for _ in range(2):
        meter.record("allreduce/bucket0", {1: 100, 2: 30}, {1: 7, 2: 8}, 0.0)
        meter.record("allreduce/bucket1", {1: 1}, {2: 1}, 0.25)
        meter.record("control/flags", {1: 16, 2: 16}, {1: 16, 2: 16}, 0.0)
        told = traffic.since_last()
        assert told.pop("interface_sent_bytes") >= 0
        assert told.pop("operations") == {
            "allreduce/bucket": {
                "node": {"calls": 2, "sent_bytes": 101, "received_bytes": 7, "seconds": 0.25},
                "world": {"calls": 2, "sent_bytes": 30, "received_bytes": 9, "seconds": 0.25},
            },
            "control/flags": {
                level: {"calls": 1, "sent_bytes": 16, "received_bytes": 16, "seconds": 0.0}
                for level in ("node", "world")
            },
        }
        assert told == {
            "sent_bytes": 131,
            "received_bytes": 16,
            "sent_bytes_by_level": {"node": 101, "world": 30},
            "received_bytes_by_level": {"node": 7, "world": 9},
            "control_sent_bytes": 32,
        }


def test_the_interface_counter_is_the_kernels() -> None:
    name = loopback_interface().name
    assert psutil.net_io_counters(pernic=True)[name].bytes_sent > 0


@pytest.mark.parametrize(("sink", "extra"), [("tensorboard", "tensorboard"), ("wandb", "wandb")])
def test_a_missing_package_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sink: str, extra: str) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=rf"output\.{sink}: true .*pip install 'thinwire\[{extra}\]'"):
        _ = TensorBoard(tmp_path, 0) if sink == "tensorboard" else WandB(tmp_path, "name", {})


def test_numbers_of_inner_mappings_get_their_path() -> None:
    assert flat_numbers({"step": 1, "name": "x", "by": {"node": 5, "deep": {"a": 0.5}}}) == {
        "step": 1,
        "by/node": 5,
        "by/deep/a": 0.5,
    }


def test_the_configuration_is_written_whole(tmp_path: Path) -> None:
    write_config(tmp_path / "runs" / "a", "name: a\n")
    assert [p.name for p in (tmp_path / "runs" / "a").iterdir()] == ["config.yaml"]


def test_numeric_settings_leave_out_what_changes_no_number() -> None:
    config = {
        "name": "a",
        "method": {"kind": "allreduce", "dtype": "fp32"},
        "output": {"folder": "x"},
        "schedule": {"kind": "cosine", "decay_steps": "auto"},
        "train": {"steps": 5, "eval_every": 2, "global_batch": 8},
        "world": {"timeout_s": 1.0, "threads": 2},
    }
    assert numeric_settings(config) == {
        "method.kind": "allreduce",
        "method.dtype": "fp32",
        "schedule.kind": "cosine",
        "schedule.decay_steps": 5,
        "train.global_batch": 8,
        "world.threads": 2,
    }


def test_a_partitioned_run_may_go_on_with_its_states_elsewhere() -> None:
    base = {"schedule": {"kind": "constant", "decay_steps": "auto"}, "train": {"steps": 5}}
    partition = {"kind": "partition", "params": "node", "optim": "world", "weights": "bf16"}
    elsewhere = {**partition, "params": "rank", "optim": "node"}
    other_numbers = {**partition, "weights": "fp32"}
    facts = numeric_settings({**base, "method": partition})
    assert facts == numeric_settings({**base, "method": elsewhere})
    assert facts != numeric_settings({**base, "method": other_numbers})
