"""Names of the formats in which partition sends, for those who know how fast they are written and read."""

from __future__ import annotations

import json
from typing import Any, Literal, TypeAlias

from pydantic import TypeAdapter, ValidationError

from thinwire.comm.forecast import codec_label
from thinwire.comm.partition.wires.gradients import GradientWireSettings
from thinwire.comm.partition.wires.weights import GatherWireSettings, UpdateWireSettings
from thinwire.comm.settings import Settings

Use: TypeAlias = Literal["gather", "gradients", "update"]

_KNOWN: dict[str, TypeAdapter[Any]] = {
    "gather": TypeAdapter(GatherWireSettings),
    "gradients": TypeAdapter(GradientWireSettings),
    "update": TypeAdapter(UpdateWireSettings),
}


def wire_label(use: Use, settings: Settings) -> str:
    """A Coding.codec such as {"kind": "int4", "of": "gradients", "rounding": "stochastic"}."""
    return json.dumps({**json.loads(codec_label(settings)), "of": use}, sort_keys=True)


def wire_of(label: str) -> tuple[Use, Settings] | None:
    """The inverse of wire_label(); None of a label of something else."""
    try:
        given = json.loads(label)
        use = given.pop("of")
        return use, _KNOWN[use].validate_python(given)
    except (ValueError, TypeError, KeyError, AttributeError, ValidationError):
        return None
