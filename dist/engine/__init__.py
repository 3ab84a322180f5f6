"""Engines wrap a model for the fast domain, by the `kind` of their settings."""

from __future__ import annotations

from typing import TypeAlias

from thinwire.dist.engine.ddp import DDPSettings

# A second engine makes this Annotated[DDPSettings | OtherSettings, Field(discriminator="kind")].
EngineSettings: TypeAlias = DDPSettings

__all__ = ["DDPSettings", "EngineSettings"]
