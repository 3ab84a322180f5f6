"""How many more steps each method takes to the same loss than all-reduce: as far as it has been measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml
from pydantic import Field

from thinwire.comm.settings import Settings
from thinwire.dist.config import RunConfig


class MeasuredFactor(Settings):
    """Of the runs whose settings of the method include these; null: the loss was not reached."""

    method: dict[str, Any]
    factor: float | None = Field(gt=0)


class StepsTable(Settings):
    """source: the results that the figures are from. measured_on: model, ranks and steps."""

    source: str
    measured_on: str
    factors: tuple[MeasuredFactor, ...]


@dataclass(frozen=True)
class StepsFactor:
    """Steps to the same loss / those of all-reduce in fp32. steps: None where it is not known, or was not reached."""

    steps: float | None
    was_measured: bool


@cache
def load_steps_table() -> StepsTable:
    """What this version of thinwire has been measured to need."""
    text = files("thinwire.dist.plan").joinpath("steps_factor.yaml").read_text(encoding="utf-8")
    return StepsTable.model_validate(yaml.safe_load(text))


def steps_factor(config: RunConfig, table: StepsTable | None = None) -> StepsFactor:
    """Of a run; the first entry that its method's settings include counts."""
    settings = config.method.model_dump(mode="json")
    for entry in (table or load_steps_table()).factors:
        if includes(settings, entry.method):
            return StepsFactor(entry.factor, True)
    return StepsFactor(None, False)


def includes(settings: Any, part: Any) -> bool:
    """Whether nested settings have all that a part of them names, with its values; {} is equal to {} alone."""
    if isinstance(part, Mapping) and part:
        return isinstance(settings, Mapping) and all(
            key in settings and includes(settings[key], value) for key, value in part.items()
        )
    return bool(settings == part)
