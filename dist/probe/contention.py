"""What communication takes from the processor that computes meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from thinwire.comm.two_shot import TwoShotMean
from thinwire.dist.probe.clock import Lockstep, now

_WIDTH = 256  # of a matrix product: a fraction of a millisecond


def contention(lockstep: Lockstep, size_bytes: int, sent_bytes: int, seconds: float) -> float:
    """Seconds of computing that a rank loses for each byte that it sends, and receives, behind the computing's back.

    Every rank multiplies matrices, first by itself and then while the queue's thread averages tensors over all ranks;
    what it does less in that time is what moving the bytes has cost. Nothing where a core is free for that, or on a
    GPU. Collective.

    Args:
        size_bytes: of a tensor. sent_bytes: that this rank sends to average one.
        seconds: for all of it.
    """
    if lockstep.device.type == "cuda" or lockstep.queue.size == 1:
        return 0.0
    products = _products(seconds / 3)
    lockstep.wait()
    alone, alone_s = products(lambda: False)
    tensor, mean = torch.zeros(size_bytes // 4), TwoShotMean(torch.float32)
    once_s = lockstep.time_exchange("probe/mean", lambda channel: mean(channel, tensor), 2)[-1]
    repeats = max(1, int(seconds / 3 / once_s))  # the same on every rank
    ended = threading.Event()

    def average() -> None:
        for _ in range(repeats):
            lockstep.queue.submit("probe/mean", lambda channel: mean(channel, tensor)).wait()
        ended.set()

    lockstep.wait()
    began = now(lockstep.device)
    waiting = threading.Thread(target=average, name="probe-mean")
    waiting.start()
    done, _ = products(ended.is_set, limit_s=None)
    waiting.join()
    elapsed_s = now(lockstep.device) - began
    lost_s = max(0.0, elapsed_s - done * alone_s / max(1, alone))
    rows = lockstep.share([lost_s, float(repeats * sent_bytes)])
    return sum(row[0] for row in rows) / max(1.0, sum(row[1] for row in rows))


def _products(seconds: float) -> Callable[..., tuple[int, float]]:
    """Multiply for a while, or until told to stop; returns how many products, in how many seconds."""
    left, right = torch.randn(_WIDTH, _WIDTH), torch.randn(_WIDTH, _WIDTH)
    out = torch.empty(_WIDTH, _WIDTH)
    cpu = torch.device("cpu")

    def run(stopped: Callable[[], bool], limit_s: float | None = seconds) -> tuple[int, float]:
        count, began = 0, now(cpu)
        while not stopped() and (limit_s is None or now(cpu) - began < limit_s):
            torch.mm(left, right, out=out)
            count += 1
        return count, now(cpu) - began

    return run
