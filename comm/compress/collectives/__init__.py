"""How compressed tensors become a mean that is the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

from thinwire.comm.compress.collective import Collective
from thinwire.comm.compress.collectives.all_gather import AllGather
from thinwire.comm.compress.collectives.two_shot import TwoShot
from thinwire.comm.compress.compressor import Compressor

CollectiveKind: TypeAlias = Literal["two_shot", "all_gather", "leader_indices", "balanced"]
"""The collectives that a setting can name; which compressors each one takes is in build_collective()."""


def build_collective(
    compressor: Compressor,
    kind: Literal["auto"] | CollectiveKind = "auto",
    *,
    inner: Sequence[Sequence[int]] | None = None,
    server_error: bool = False,
) -> Collective:
    if kind == "auto":
        two_shot = not compressor.sparse and compressor.fixed_size and compressor.elementwise
        kind = "two_shot" if two_shot else "all_gather"
    if kind == "two_shot":
        return TwoShot(compressor, server_error=server_error)
    return AllGather(compressor)


__all__ = ["AllGather", "CollectiveKind", "TwoShot", "build_collective"]
