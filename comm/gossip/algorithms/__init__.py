"""Averaging algorithms: one file each. What they have in common is algorithm.py."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator, Field

from thinwire.comm.gossip.algorithms.dpsgd import DPSGDSettings

EachAlgorithm: TypeAlias = DPSGDSettings


def from_name(given: Any) -> Any:
    """Settings of a kind with its defaults, where only its name is given."""
    return {"kind": given} if isinstance(given, str) else given


AnyAlgorithm: TypeAlias = Annotated[EachAlgorithm, BeforeValidator(from_name)]
"""Settings of any algorithm, by `kind`; a string is the kind with its defaults."""
