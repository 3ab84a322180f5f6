"""What links `graph: auto` counts on: measured once, at the start, by all ranks together."""

from __future__ import annotations

import math

import torch

from thinwire.comm.compress.measure import measure_link
from thinwire.comm.gossip.graphs.links import Link, Links
from thinwire.comm.queue import CommQueue


def probe_links(queue: CommQueue, device: torch.device) -> Links | None:
    """The slowest rank's rate and latency while all send, for every link; the same on all ranks. A second at most.

    Both are rounded to powers of two, so that the same machines choose the same graph from run to run, as far as that
    can be. Collective.

    Args:
        device: of tensors that the queue's process group can send.
    Returns: None in a world of one.
    """
    if queue.size == 1:
        return None
    measured = queue.submit("control/probe", lambda channel: measure_link(channel, device)).wait()
    return Links(Link(_power_of_two(measured.bps), _power_of_two(measured.latency_s)))


def _power_of_two(value: float) -> float:
    return 2.0 ** round(math.log2(value))
