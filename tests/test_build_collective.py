"""Which collective a compressor gets, and which it is refused."""

from __future__ import annotations

import pytest
from toy_compressors import ToyGrid, ToyTop

from thinwire.comm.compress.collectives import (
    AllGather,
    Balanced,
    Hierarchical,
    LeaderIndices,
    LowRankMean,
    TwoShot,
    build_collective,
)
from thinwire.comm.compress.compressor import Compressor
from thinwire.comm.compress.compressors.low_rank import LowRank
from thinwire.comm.compress.compressors.rand_k import RandK
from thinwire.comm.compress.compressors.top_k import TopK


@pytest.mark.parametrize(
    ("compressor", "kind", "expected"),
    [
        (ToyGrid(), "auto", TwoShot),
        (ToyTop(), "auto", AllGather),
        (TopK(), "auto", AllGather),
        (RandK(), "auto", LeaderIndices),
        (RandK(values="2bit"), "auto", AllGather),
        (LowRank(), "auto", LowRankMean),
        (ToyGrid(), "all_gather", AllGather),
        (TopK(), "balanced", Balanced),
        (TopK(), "leader_indices", LeaderIndices),
    ],
    ids=str,
)
def test_a_compressor_gets_what_suits_it(compressor: Compressor, kind, expected: type) -> None:
    assert type(build_collective(compressor, kind)) is expected


def test_hosts_get_the_same_between_them() -> None:
    collective = build_collective(TopK(), "balanced", inner=[[0, 1], [2, 3]])
    assert isinstance(collective, Hierarchical)
    assert isinstance(collective.outer, Balanced)


@pytest.mark.parametrize(
    ("compressor", "kind", "inner", "server_error", "message"),
    [
        (TopK(), "two_shot", None, False, "two_shot needs"),
        (ToyGrid(), "leader_indices", None, False, "does not choose places"),
        (ToyGrid(), "balanced", None, False, "does not choose the largest"),
        (LowRank(), "all_gather", None, False, "use collective: auto"),
        (LowRank(), "auto", None, True, "no server error"),
        (LowRank(), "auto", [[0], [1]], False, "compressor lowrank"),
        (ToyGrid(), "two_shot", [[0], [1]], True, "a server error"),
        (ToyGrid(), "two_shot", [[0, 1], [2]], False, "equally many"),
        (TopK(), "auto", None, True, "all_gather encodes no mean"),
    ],
    ids=str,
)
def test_pairs_that_cannot_work_are_refused(
    compressor: Compressor, kind, inner: list[list[int]] | None, server_error: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_collective(compressor, kind, inner=inner, server_error=server_error)
