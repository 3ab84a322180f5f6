"""The base of every settings model: frozen, complete, and deaf to no key."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


class Settings(BaseModel):
    """A frozen pydantic model that refuses unknown keys.

    Each class with settings keeps its own subclass in its own file. `extra="forbid"` turns a
    misspelt key into an error instead of a silently ignored line; `allow_inf_nan=False` keeps
    `.nan` in a YAML file out of the arithmetic.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)


def _from_list(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


FROM_LIST = BeforeValidator(_from_list)
"""For a tuple inside settings that a validator sees first: pydantic no longer knows then that its list came as JSON."""
