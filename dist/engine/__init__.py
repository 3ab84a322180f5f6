"""Engines wrap a model for the fast domain, by the `kind` of their settings."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import Field

from thinwire.dist.engine.ddp import DDPSettings
from thinwire.dist.engine.fsdp2 import FSDP2Settings

EngineSettings: TypeAlias = Annotated[DDPSettings | FSDP2Settings, Field(discriminator="kind")]

__all__ = ["DDPSettings", "EngineSettings", "FSDP2Settings"]
