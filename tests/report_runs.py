"""Run folders as `thinwire train` would leave them, with numbers that can be worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

CONFIG: dict[str, Any] = {
    "name": "run",
    "seed": 0,
    "model": {"kind": "gpt", "layers": 2, "width": 64, "context": 32},
    "data": {"corpus": "stdlib", "tokenizer": "bytes", "validation_fraction": 0.05},
    "optimizer": {"kind": "adamw", "lr": 1e-3},
    "train": {"steps": 4, "global_batch": 8, "eval_windows": 64},
    "method": {"kind": "allreduce", "dtype": "fp32"},
    "checkpoint": {"resume": "auto"},
}
FACTS: dict[str, Any] = {
    "after_steps": 0,
    "thinwire": "1",
    "torch": "2",
    "ranks": 2,
    "hosts": ["a", "b"],
    "levels": [{"name": "world", "size": 2}],
    "device": "cpu",
    "parameters": 1000,
    "tokens_per_step": 256,
    "data": {"training text": "SHA 1", "validation text": "SHA 2"},
    "predicted_bytes": {"world": 1000},
}


def plain_record(step: int, **others: Any) -> dict[str, Any]:
    """100 ms of computing, or 900 in the first step; a validation in every second step."""
    record = {
        "step": step,
        "loss": 5.0 - step,
        "seconds": 2.0 * step,
        "compute_ms": 100.0 if step > 1 else 900.0,
        "exposed_comm_ms": 50.0,
        "sent_bytes": 1000,
        "control_sent_bytes": 48,
        "interface_sent_bytes": 1100,
        **others,
    }
    if step % 2 == 0:
        record |= {"val_loss": 6.0 - step, "val_bits_per_byte": 8.0 - step}
    return record


def write_run(
    folder: Path,
    record: Callable[[int], Mapping[str, Any]] = plain_record,
    *,
    steps: int = 4,
    config: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """A run folder. config, facts: what differs from CONFIG and FACTS, by dotted path."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record(step)) + "\n" for step in range(1, steps + 1)))
    settings = json.loads(json.dumps(CONFIG))
    for path, value in (config or {}).items():
        *parents, leaf = path.split(".")
        node = settings
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "run.json").write_text(json.dumps({"format": 1, "starts": [{**FACTS, **(facts or {})}]}))
    return folder
