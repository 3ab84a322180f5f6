"""What can be reached along edges."""

from __future__ import annotations

from collections.abc import Iterable

from thinwire.comm.gossip.graphs.weights import Edge


def reached(start: int, edges: Iterable[Edge], size: int, *, both_ways: bool) -> set[int]:
    """The machines to which word from `start` comes along the edges.

    both_ways: edges are undirected; otherwise each leads from its first machine to its second.
    """
    receivers: list[list[int]] = [[] for _ in range(size)]
    for sender, receiver in edges:
        receivers[sender].append(receiver)
        if both_ways:
            receivers[receiver].append(sender)
    found, fresh = {start}, {start}
    while fresh:
        fresh = {there for here in fresh for there in receivers[here]} - found
        found |= fresh
    return found
