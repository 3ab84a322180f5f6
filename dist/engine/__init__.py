"""Engines wrap a model for the fast domain, by the `kind` of their settings."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import Field

from thinwire.dist.engine.ddp import DDPSettings
from thinwire.dist.engine.deepspeed import DeepSpeedSettings
from thinwire.dist.engine.fsdp2 import FSDP2Settings

EngineSettings: TypeAlias = Annotated[DDPSettings | FSDP2Settings | DeepSpeedSettings, Field(discriminator="kind")]

__all__ = ["DDPSettings", "DeepSpeedSettings", "EngineSettings", "FSDP2Settings"]
