"""A run's folder, and whether what it already holds can be continued by a given configuration."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from thinwire.comm.settings import Settings
from thinwire.dist.config_errors import ConfigError

METRICS = "metrics.jsonl"
CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
FACTS = "run.json"
TRACES = "traces"
_MOST_TRACED_STEPS = 50  # files that a browser still opens

# Settings that leave every number of the training as it is.
_HARMLESS = {
    "name",
    "output",
    "checkpoint",
    "data.cache",
    "model.expert_parallel",
    "train.eval_every",
    "train.eval_batch",
    "train.eval_windows",
    "world.interface",
    "world.rendezvous_timeout_s",
    "world.timeout_s",
}

# Of a partitioned run: who holds what. Another choice adds the same numbers in another order, as other ranks would.
_PLACES = {
    "engine.prefetch",
    "mesh.levels",
    "method.grads",
    "method.optim",
    "method.params",
    "method.preset",
    "method.secondary",
}


class OutputSettings(Settings):
    """Where results go. Rank 0 alone writes them.

    folder: each run has a folder of its own below it.
    every_s: seconds between two lines of progress where there is no terminal.
    tensorboard, wandb: also send the metrics there; each needs its package.
    trace_steps: [first, last], counted from 1: steps of which every rank writes a trace for Perfetto into the run
      folder of its own host; null = none. `thinwire report` draws it.
    """

    folder: str = Field("runs", min_length=1)
    every_s: float = Field(5.0, ge=0)
    tensorboard: bool = False
    wandb: bool = False
    trace_steps: tuple[int, int] | None = None

    @model_validator(mode="after")
    def _trace_can_be_opened(self) -> OutputSettings:
        if self.trace_steps is not None:
            first, last = self.trace_steps
            if not 1 <= first <= last < first + _MOST_TRACED_STEPS:
                raise ValueError(
                    f"trace_steps: [{first}, {last}]; give the first and the last step to trace, counted from 1, no "
                    f"more than {_MOST_TRACED_STEPS} steps, such as [10, 12]"
                )
        return self


def write_config(folder: Path, text: str) -> None:
    """Put the resolved configuration into the run folder, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{CONFIG}.tmp"
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, folder / CONFIG)


def numeric_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved settings, by dotted path, on which the numbers of the training depend.

    train.steps is one of them only as the end of the schedule: a run with a fixed schedule may be made longer.
    """
    settings = {path: value for path, value in _flatten(config) if not _harmless(path)}
    if settings["method.kind"] == "partition":
        settings = {path: value for path, value in settings.items() if path not in _PLACES}
    steps = settings.pop("train.steps")
    if settings["schedule.kind"] == "constant":
        settings.pop("schedule.decay_steps")
    elif settings["schedule.decay_steps"] == "auto":
        settings["schedule.decay_steps"] = steps
    return settings


def check_same_run(saved: Mapping[str, Any], present: Mapping[str, Any], where: Path) -> None:
    """Refuse to continue a checkpoint whose numeric settings differ from the present ones.

    Args:
        saved, present: numeric_settings() of the checkpoint and of this run, with the facts about its data.
        where: the checkpoint.
    Raises:
        ConfigError: with every difference.
    """
    missing = "nothing"
    differing = [
        f"  {path}: {saved.get(path, missing)} in the checkpoint, {present.get(path, missing)} now"
        for path in dict.fromkeys((*saved, *present))
        if saved.get(path, missing) != present.get(path, missing)
    ]
    if differing:
        listed = "\n".join(differing)
        raise ConfigError(
            f"checkpoint.resume: auto would continue {where}, which was trained otherwise:\n{listed}\n"
            "Give the same settings, or start another run with name=... or output.folder=..., which may begin where "
            "this one ended with checkpoint.resume=PATH"
        )


def _harmless(path: str) -> bool:
    return path in _HARMLESS or path.partition(".")[0] in _HARMLESS


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in tree.items():
        pairs += _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return pairs
