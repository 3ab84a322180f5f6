"""How compressed tensors become a mean that is the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

from thinwire.comm.compress.collective import Collective
from thinwire.comm.compress.collectives.all_gather import AllGather
from thinwire.comm.compress.collectives.balanced import Balanced
from thinwire.comm.compress.collectives.hierarchical import Hierarchical
from thinwire.comm.compress.collectives.leader_indices import LeaderIndices
from thinwire.comm.compress.collectives.low_rank import LowRankMean
from thinwire.comm.compress.collectives.two_shot import TwoShot
from thinwire.comm.compress.compressor import Compressor
from thinwire.comm.compress.compressors.low_rank import LowRank
from thinwire.comm.compress.compressors.rand_k import RandK

CollectiveKind: TypeAlias = Literal["two_shot", "all_gather", "contributor_mean", "leader_indices", "balanced"]
"""The collectives that a setting can name; which compressors each one takes is in build_collective()."""


def build_collective(
    compressor: Compressor,
    kind: Literal["auto"] | CollectiveKind = "auto",
    *,
    inner: Sequence[Sequence[int]] | None = None,
    server_error: bool = False,
) -> Collective:
    """The collective of a kind for a compressor.

        two_shot          dense elementwise compressors of fixed size: 2 (n-1)/n payloads per rank
        all_gather        any compressor but lowrank: (n-1) payloads
        contributor_mean  topk, threshold: all_gather, but each element is the mean over the ranks that sent it
        leader_indices    topk, threshold, randk: one rank's places for all, about 2 payloads
        balanced          topk, threshold: the largest entries of the sum, about 2 payloads

    auto: lowrank has a collective of its own; randk goes by leader_indices, dense payloads that can be cut by two_shot,
    and everything else by all_gather.

    Args:
        inner: the ranks of each host, whose mean is exact before it is compressed; None = each rank is alone.
        server_error: keep the error of the mean's own encoding, which two_shot alone can.
    Raises:
        ValueError: the compressor cannot go by this kind, or not with inner or server_error.
    """
    if inner is not None:
        if isinstance(compressor, LowRank) or server_error:
            raise ValueError(
                f"collective: between hosts ({list(inner)}) nothing can be kept by parts of tensors, as "
                f"{'a server error' if server_error else 'compressor lowrank'} must be; compress between all ranks, "
                "or use another compressor and feedback"
            )
        return Hierarchical(inner, build_collective(compressor, kind))
    if isinstance(compressor, LowRank):
        if kind != "auto":
            raise ValueError(f"collective: {kind!r} cannot average lowrank's factors; use collective: auto")
        if server_error:
            raise ValueError("collective: lowrank has no server error; use two_shot with a dense compressor")
        return LowRankMean(compressor)
    chosen = _suited_to(compressor) if kind == "auto" else kind
    if chosen == "two_shot":
        return TwoShot(compressor, server_error=server_error)
    if server_error:
        raise ValueError(
            f"collective: {chosen} encodes no mean whose error could be kept; use two_shot with a dense compressor"
        )
    if chosen == "leader_indices":
        return LeaderIndices(compressor)
    if chosen == "contributor_mean":
        if not compressor.sparse or isinstance(compressor, RandK):
            raise ValueError(
                f"collective: contributor_mean divides by the number of ranks that sent an element, and {compressor!r} "
                "sends the same ones on every rank; use topk or threshold, or collective: auto"
            )
        return AllGather(compressor, contributors_only=True)
    return Balanced(compressor) if chosen == "balanced" else AllGather(compressor)


def _suited_to(compressor: Compressor) -> CollectiveKind:
    if isinstance(compressor, RandK):
        return "all_gather" if compressor.values == "2bit" else "leader_indices"
    can_be_cut = compressor.fixed_size and compressor.elementwise and not compressor.sparse
    return "two_shot" if can_be_cut else "all_gather"


__all__ = [
    "AllGather",
    "Balanced",
    "CollectiveKind",
    "Hierarchical",
    "LeaderIndices",
    "LowRankMean",
    "TwoShot",
    "build_collective",
]
