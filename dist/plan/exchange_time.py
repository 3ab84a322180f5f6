"""Seconds of computing, and seconds of one exchange by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from thinwire.comm.forecast import Coding, Exchange
from thinwire.dist.plan.cluster import Cluster, CodecSpeed


@dataclass(frozen=True)
class ComputeTime:
    """Seconds of one rank: forward and backward of one micro-batch, and the optimizer's step.

    coupled_s: by which a step is longer where the ranks wait for one another, whatever they send.
    """

    forward_s: float
    backward_s: float
    optimizer_s: float
    coupled_s: float = 0.0

    def step_s(self, micro_batches: int) -> float:
        """Of a whole step of a rank that waits for nobody."""
        return micro_batches * (self.forward_s + self.backward_s) + self.optimizer_s


def exchange_s(exchange: Exchange, cluster: Cluster) -> float:
    """Seconds of one occurrence: coding, and at each level bytes / rate + shots x latency, the slowest of them.

    The levels of one exchange send at the same time; its shots on different levels come one after another only where
    the method says so by an exchange for each.
    """
    times = [
        cluster.level(level).send_s(count, exchange.shots.get(level, 0))
        for level, count in exchange.sent_bytes.items()
        if count
    ]
    return coding_s(exchange, cluster) + max(times, default=0.0)


def taken_s(exchange: Exchange, cluster: Cluster) -> float:
    """Seconds of computing that one occurrence takes away from this rank where both run at once.

    Moving bytes, encoding and decoding keep a processor busy, as long as a probe has measured while all ranks did: with
    two for each rank nothing is lost, with one or less all of it.
    """
    if cluster.measured is None:
        return 0.0
    cores = min(2.0, max(1.0, cluster.measured.cores_per_rank))
    moved_s = sum(exchange.sent_bytes.values()) * cluster.measured.cpu_s_per_byte
    return (moved_s + coding_s(exchange, cluster)) * (2 / cores - 1)


def coding_s(exchange: Exchange, cluster: Cluster) -> float:
    """Seconds of encoding and decoding in one occurrence; what has not been measured costs nothing."""
    speeds: Mapping[str, CodecSpeed] = cluster.measured.codecs if cluster.measured else {}
    return sum(one_coding_s(coding, speeds[coding.codec]) for coding in exchange.coding if coding.codec in speeds)


def one_coding_s(coding: Coding, speed: CodecSpeed) -> float:
    """Seconds of what one Coding counts."""
    return (
        coding.encoded * speed.encode_s
        + coding.encodes * speed.encode_call_s
        + coding.decoded * speed.decode_s
        + coding.decodes * speed.decode_call_s
        + coding.handled * speed.handle_s
        + bool(coding.handled) * speed.handle_call_s
    )
