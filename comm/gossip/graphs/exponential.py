"""Exponential graphs: machine i sends to i + 1, i + 2, i + 4, ... (modulo n). Directed, doubly stochastic."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

from thinwire.comm.gossip.graphs.sequence import Repeating
from thinwire.comm.gossip.graphs.weights import pushed
from thinwire.comm.gossip.mixing import Mixing
from thinwire.comm.settings import Settings


class ExponentialSettings(Settings):
    """`graph: exponential`: in every round to all of i + 2^k < i + n, with weights 1/(t+1), t = ceil(log2 n).

    Ying et al. 2021, 2110.13363. The gap is 2/(t+1) for an even number of machines, and larger for an odd one.
    """

    kind: Literal["exponential"] = "exponential"

    def build(self, size: int, seed: int) -> Repeating:
        """The graph of so many machines."""
        return Repeating(f"exponential graph of {size}", [shifted(exponential_shifts(size), size)])


class OnePeerExponentialSettings(Settings):
    """`graph: one_peer_exponential`: in round t to i + 2^(t mod ceil(log2 n)), one half; one message a round.

    Ying et al. 2021, 2110.13363. One period is an exact average only if the number of machines is a power of two; with
    others take base_k.
    """

    kind: Literal["one_peer_exponential"] = "one_peer_exponential"

    def build(self, size: int, seed: int) -> Repeating:
        """The graph of so many machines."""
        rounds = [shifted([shift], size) for shift in exponential_shifts(size)] or [shifted([], size)]
        return Repeating(f"one-peer exponential graph of {size}", rounds)


def exponential_shifts(size: int) -> list[int]:
    """1, 2, 4, ... below the number of machines."""
    return [1 << k for k in range((size - 1).bit_length())]


def shifted(shifts: Sequence[int], size: int) -> Mixing:
    """Every machine keeps 1 / (1 + len(shifts)) and sends as much to each machine so many places on."""
    weight = Fraction(1, 1 + len(shifts))
    return pushed({(i, (i + shift) % size): weight for shift in shifts for i in range(size)}, size)
