"""What is known of the links between machines: bits per second and latency, by pair."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from thinwire.comm.gossip.graphs.weights import Edge


@dataclass(frozen=True)
class Link:
    """bps: bits per second in one direction. latency_s: one way."""

    bps: float
    latency_s: float

    def __post_init__(self) -> None:
        if not 0 < self.bps < float("inf"):
            raise ValueError(f"link_bps: {self.bps:g}; bits per second are above 0 and finite")
        if not 0 <= self.latency_s < float("inf"):
            raise ValueError(f"latency_s: {self.latency_s:g}; seconds are 0 or more and finite")

    def transfer_s(self, payload_bytes: float) -> float:
        """Seconds for a payload alone, latency included."""
        return 8 * payload_bytes / self.bps + self.latency_s


ASSUMED = Link(bps=1e9, latency_s=1e-3)
"""What is taken for a link of which nothing is known."""


@dataclass(frozen=True)
class Links:
    """The link between any two machines.

    Args:
        usual: of pairs that are not named.
        pairs: by (sender, receiver), or by (lower, higher) for both directions.
    """

    usual: Link
    pairs: Mapping[Edge, Link] = field(default_factory=dict)

    def between(self, sender: int, receiver: int) -> Link:
        """The link that a message from one to the other takes."""
        one_way = self.pairs.get((sender, receiver))
        return one_way or self.pairs.get((min(sender, receiver), max(sender, receiver)), self.usual)
