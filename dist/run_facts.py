"""run.json: what a reader of a run must know that is neither a setting nor a number of a step."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

import thinwire
from thinwire.comm.method import Method
from thinwire.dist.run_folder import FACTS
from thinwire.dist.task import TaskData
from thinwire.dist.world import World

FORMAT = 1


class Described(Protocol):
    """What every trainer knows of itself once it is built."""

    parameters: int

    @property
    def method(self) -> Method:
        """How it communicates."""
        ...

    @property
    def data(self) -> TaskData:
        """What it learns from."""
        ...


def describe_run(trainer: Described, world: World, *, global_batch: int, machines: int) -> dict[str, Any]:
    """Who trains what on what, as JSON values; predicted_bytes as the method says before the first step.

    Args:
        global_batch: sequences per step.
        machines: that take part in a step: the ranks of the job, or those of gossip that are each started alone.
    """
    return {
        "thinwire": thinwire.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "ranks": machines,
        "hosts": list(world.hosts),
        "levels": [{"name": level.name, "size": level.size} for level in world.mesh.levels],
        "device": world.device.type,
        "backend": world.backend,
        "interface": world.interface.name,
        "threads": torch.get_num_threads(),
        "launcher": world.place.launcher,
        "parameters": trainer.parameters,
        "tokens_per_step": round(global_batch * trainer.data.tokens_per_sample),
        "tokenizer": trainer.data.identity,
        "data": trainer.data.fingerprint,
        "predicted_bytes": trainer.method.predicted_bytes(),
    }


def write_facts(folder: Path, facts: Mapping[str, Any], finished_steps: int) -> None:
    """Put them into the run folder, after those of the earlier starts of this run, up to which it goes on.

    Args:
        finished_steps: with which this start begins.
    """
    path = folder / FACTS
    earlier = json.loads(path.read_text(encoding="utf-8"))["starts"] if path.exists() else []
    kept = [start for start in earlier if start["after_steps"] < finished_steps]
    content = {"format": FORMAT, "starts": [*kept, {"after_steps": finished_steps, **facts}]}
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
