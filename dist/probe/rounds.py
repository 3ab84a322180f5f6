"""Who measures with whom, in rounds of disjoint pairs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product, zip_longest
from typing import TypeAlias

Pair: TypeAlias = tuple[int, int]
"""Two ranks, the lower first."""


def circle(players: int) -> list[list[Pair]]:
    """Rounds in which each meets every other once: n - 1 of them for an even n, n for an odd one.

    The circle method (Kirkman 1847): one keeps its seat, the others move on by one, and who sit opposite meet.
    """
    seats: list[int | None] = list(range(players))
    if players % 2:
        seats.append(None)
    rounds = []
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        opposite = zip(seats[:half], reversed(seats[half:]), strict=True)
        rounds.append([(min(a, b), max(a, b)) for a, b in opposite if a is not None and b is not None])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return [pairs for pairs in rounds if pairs]


def pair_rounds(hosts: Sequence[str], most: int) -> list[list[Pair]]:
    """Rounds in which all pairs of ranks meet, and no host's link has more than one pair at a time.

    n hosts of one rank each take n - 1 rounds, or n where n is odd.

    Args:
        hosts: a name for each rank's.
        most: rounds; where it would take more, only the first ranks of two hosts meet.
    """
    members: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        members.setdefault(host, []).append(rank)
    groups = list(members.values())
    inside = [[[(group[a], group[b]) for a, b in pairs] for pairs in circle(len(group))] for group in groups]
    rounds = [[pair for pairs in at_once for pair in pairs] for at_once in zip_longest(*inside, fillvalue=[])]
    between = _between(groups)
    if len(rounds) + len(between) > most:
        between = _between([group[:1] for group in groups])
    return rounds + between


def _between(groups: Sequence[Sequence[int]]) -> list[list[Pair]]:
    """Each rank of a group with each of another, one pair of two groups at a time."""
    rounds = []
    for meeting in circle(len(groups)):
        pairs = [[(min(a, b), max(a, b)) for a, b in product(groups[i], groups[j])] for i, j in meeting]
        rounds += [[pair for pair in at_once if pair is not None] for at_once in zip_longest(*pairs)]
    return rounds
