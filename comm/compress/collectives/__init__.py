"""How compressed tensors become a mean that is the same on every rank."""

from __future__ import annotations

from typing import Literal, TypeAlias

CollectiveKind: TypeAlias = Literal["two_shot", "all_gather", "leader_indices", "balanced"]
"""The collectives that a setting can name; which compressors each one takes is in build_collective()."""
