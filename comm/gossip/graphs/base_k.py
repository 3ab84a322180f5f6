"""Base-(k+1) graphs: an exact average after a few rounds with at most k neighbours each, for any number of machines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, TypeAlias

from pydantic import Field

from thinwire.comm.gossip.graphs.sequence import Repeating
from thinwire.comm.gossip.graphs.weights import Edge, group_weights, symmetric
from thinwire.comm.settings import Settings

Round: TypeAlias = dict[Edge, Fraction]
"""Weights on the undirected edges of one round."""


class BaseKSettings(Settings):
    """`graph: {kind: base_k, k: 1}`: Base-(k+1).

    k: most neighbours of a machine in a round; 1 is the Base-2 graph, of pairs.
    """

    kind: Literal["base_k"] = "base_k"
    k: int = Field(1, ge=1)

    def build(self, size: int, seed: int) -> Repeating:
        """The graph of so many machines."""
        k = max(1, min(self.k, size - 1))  # more neighbours than there are others change nothing
        rounds = base_rounds(range(size), k) or [{}]
        return Repeating(f"base-{self.k + 1} graph of {size}", [symmetric(weights, size) for weights in rounds])


def base_rounds(nodes: Sequence[int], k: int) -> list[Round]:
    """One period of the Base-(k+1) graph (Takezawa et al. 2023, 2305.11420, algorithm 3).

    With n = p q, where p has only prime factors up to k+1 and q none: p copies of the Simple Base-(k+1) graph of q
    machines side by side, and then exact averages across the copies; or the Simple Base-(k+1) graph of all, if that is
    not longer. The rounds' matrices are symmetric and doubly stochastic, and their product is J.
    """
    simple = simple_base_rounds(nodes, k)
    smooth = _smooth_part(len(nodes), k)
    if smooth in (1, len(nodes)):
        return simple
    q = len(nodes) // smooth
    copies = [simple_base_rounds(nodes[c * q : (c + 1) * q], k) for c in range(smooth)]
    within = [_side_by_side(rounds) for rounds in zip(*copies, strict=True)]
    columns = [_hyper_hypercube(nodes[place::q], k) for place in range(q)]
    across = [_side_by_side(rounds) for rounds in zip(*columns, strict=True)]
    return min(simple, within + across, key=len)


@dataclass(frozen=True)
class _Digit:
    """One digit of n in base k+1: a_l parts of (k+1)^(p_l) machines, and the rounds in which they average exactly."""

    members: Sequence[int]
    parts: list[Sequence[int]]
    together: list[Round]
    apart: list[Round]


def simple_base_rounds(nodes: Sequence[int], k: int) -> list[Round]:
    """One period of the Simple Base-(k+1) graph (the same paper, algorithm 2).

    First every digit's machines average among themselves. Then, for one digit after the other, each machine of the
    later digits averages with one machine in every part of it, so that the part's sum becomes that of the whole. At
    last every part averages within.
    """
    size = len(nodes)
    if _smooth_part(size, k) == size:
        return _hyper_hypercube(nodes, k)
    digits = _digits(nodes, k)
    first = len(digits[0].together)
    rounds = []
    for number in range(first + 1 + len(digits[0].apart)):
        if number < first:
            weights = [digit.together[number % len(digit.together)] for digit in digits if digit.together]
        else:
            weights = []
            for place, digit in enumerate(digits):
                entered = first + place + (place < len(digits) - 1)  # the round in which its last phase begins
                if number >= entered and digit.apart:
                    weights.append(digit.apart[(number - entered) % len(digit.apart)])
            if number - first < len(digits) - 1:
                weights.append(_hand_on(digits[number - first :], k))
        rounds.append(_side_by_side(weights))
    return rounds


def _digits(nodes: Sequence[int], k: int) -> list[_Digit]:
    """The digits of the number of machines that are not zero, the highest first, each with its machines."""
    power = 1
    while power * (k + 1) <= len(nodes):
        power *= k + 1
    digits, start = [], 0
    while start < len(nodes):
        digit = (len(nodes) - start) // power
        members = nodes[start : start + digit * power]
        if digit:
            parts = [members[place : place + power] for place in range(0, len(members), power)]
            together = _hyper_hypercube(members, k)
            apart = [
                _side_by_side(rounds) for rounds in zip(*(_hyper_hypercube(part, k) for part in parts), strict=True)
            ]
            digits.append(_Digit(members, parts, together, apart if len(members) > k else together))
        start += len(members)
        power //= k + 1
    return digits


def _hand_on(digits: Sequence[_Digit], k: int) -> Round:
    """Every machine of the later digits averages with one in each part of the first; those left over, in groups."""
    now, later = digits[0], [node for digit in digits[1:] for node in digit.members]
    weight = Fraction(len(now.members), len(now.members) + len(later)) / len(now.parts)
    free = [list(part) for part in now.parts]
    weights = {}
    for node in later:
        for part in free:
            weights[min(node, partner := part.pop()), max(node, partner)] = weight
    left = [node for part in free for node in part]
    weights.update(group_weights(left[place : place + k + 1] for place in range(0, len(left), k + 1)))
    return weights


def _hyper_hypercube(nodes: Sequence[int], k: int) -> list[Round]:
    """Exact averages of a number of machines whose prime factors are at most k+1 (the same paper, algorithm 1).

    With n = f_1 f_2 ..., every f at most k+1: in round r the machines that differ only in digit r average fully.
    """
    rounds, stride, left = [], 1, len(nodes)
    for factor in range(k + 1, 1, -1):
        while left % factor == 0:
            starts = [i for i in range(len(nodes)) if i // stride % factor == 0]
            rounds.append(group_weights([nodes[i + place * stride] for place in range(factor)] for i in starts))
            stride *= factor
            left //= factor
    assert left == 1, "a prime factor is above k + 1"
    return rounds


def _smooth_part(size: int, k: int) -> int:
    """The largest divisor whose prime factors are all at most k+1."""
    left = size
    for factor in range(2, k + 2):
        while left % factor == 0:
            left //= factor
    return size // left


def _side_by_side(rounds: Sequence[Round]) -> Round:
    """Rounds of machines that have nothing in common, as one."""
    return {edge: weight for round in rounds for edge, weight in round.items()}
