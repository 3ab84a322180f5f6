"""Machines with levels, played by ranks.py's threads: no FSDP2, no torch.distributed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from ranks import Rank, run_ranks

from thinwire.comm.channel import Channel
from thinwire.comm.meter import TrafficMeter
from thinwire.comm.partition.levels import Levels, build_levels

T = TypeVar("T")
NAMES = ("pair", "node", "world")


def levels_of(fanouts: Sequence[int], rank: int) -> Levels:
    """The levels of a machine whose ranks are numbered node by node; the last names of NAMES."""
    sizes = [1]
    for fanout in fanouts:
        sizes.append(sizes[-1] * fanout)
    return build_levels(NAMES[-len(fanouts) :], sizes[1:], range(sizes[-1]), rank=rank)


def slowest_between(levels: Levels, peer: int) -> str:
    """The level that a message to a peer crosses."""
    mine, theirs = levels.digits[levels.rank], levels.digits[peer]
    differ = [name for name, a, b in zip(levels.names, mine, theirs, strict=True) if a != b]
    return differ[-1] if differ else "self"


def on_machine(fanouts: Sequence[int], work: Callable[[Levels, Channel, TrafficMeter], T]) -> list[T]:
    """Run `work` on every rank's channel; what each returned."""
    size = levels_of(fanouts, 0).world_size

    def body(rank: Rank) -> T:
        levels = levels_of(fanouts, rank.rank)
        queue = rank.queue(levels=[slowest_between(levels, peer) for peer in range(size)])
        outcome = queue.submit("test", lambda channel: work(levels, channel, queue.meter)).wait()
        queue.close()
        return outcome

    return run_ranks(size, body)
