"""Ranks in sentences for people."""

from __future__ import annotations

from collections.abc import Sequence


def ranges(ranks: Sequence[int]) -> str:
    """Ranks in ascending order, neighbours joined: 0, 1, 2, 5 as "0-2, 5"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def name_ranks(ranks: Sequence[int]) -> str:
    """ "rank 3" or "ranks 0-2, 5"."""
    return f"rank{'s' if len(ranks) != 1 else ''} {ranges(ranks)}"
