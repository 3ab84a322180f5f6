"""The base of every settings model: frozen, complete, and deaf to no key."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A frozen pydantic model that refuses unknown keys.

    Each class with settings keeps its own subclass in its own file. `extra="forbid"` turns a
    misspelt key into an error instead of a silently ignored line; `allow_inf_nan=False` keeps
    `.nan` in a YAML file out of the arithmetic.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)
