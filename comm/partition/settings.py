"""What a user can set about partitioning: where each state is, and how it travels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from thinwire.comm.partition.placement import PRESETS, preset
from thinwire.comm.partition.wires.gradients import GradientWireSettings
from thinwire.comm.partition.wires.weights import GatherWireSettings, SameWeights, UpdateWireSettings
from thinwire.comm.settings import Settings

LevelName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


class PartitionSettings(Settings):
    """Each state sharded over a level of its own; the slow links carry gradients and weights once per optimizer step.

    preset: a named scheme, whose levels are used where params, grads, optim and secondary are not given: zero1, zero2,
      zero3, hsdp, mics, hpz or frontier.
    params, grads, optim: names of levels, each no faster than the one before; "rank" = whole on every rank.
    secondary: a level faster than params that keeps its share of the gathered weights until they change; null = none.
    weights: dtype in which they are kept between steps; with bf16, and with update wires that are not exact, the owner
      keeps an fp32 master.
    gather: format of the weights on their way over the params levels, in each forward and backward: same (as they are)
      or int8.
    update: format of changed weights on their way from their owner to the params level's shards, once per step: same,
      int8 or difference.
    gradients: format by name of level: fp32 (where none is given), bf16, fp16, int8 or int4.
    clip_norm: largest norm of the mean gradient; 0 = no limit.
    seed: of stochastic rounding; the same on every rank.
    """

    kind: Literal["partition"] = "partition"
    preset: str | None = None
    params: LevelName = "node"
    grads: LevelName = "node"
    optim: LevelName = "world"
    secondary: LevelName | None = None
    weights: Literal["fp32", "bf16"] = "fp32"
    gather: GatherWireSettings = SameWeights()
    update: UpdateWireSettings = SameWeights()
    gradients: dict[LevelName, GradientWireSettings] = Field(default_factory=dict)
    clip_norm: float = Field(0.0, ge=0)
    seed: int = Field(0, ge=0, lt=1 << 32)

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or given.get("preset") is None:
            return given
        if given["preset"] not in PRESETS:
            raise ValueError(f"preset: {given['preset']!r} is none of {', '.join(PRESETS)}")
        return {**preset(given["preset"]), **given}
