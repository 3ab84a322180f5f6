"""What communication takes from the processor that would compute meanwhile."""

from __future__ import annotations

import time

import torch

from thinwire.comm.two_shot import TwoShotMean
from thinwire.dist.probe.clock import Lockstep


def busy_s_per_byte(lockstep: Lockstep, size_bytes: int, sent_bytes: int, seconds: float) -> float:
    """Seconds for which a processor is busy with each byte that a rank sends, and receives; 0 on a GPU. Collective.

    Every rank averages tensors over all ranks and computes nothing meanwhile. What the processor spends on that, copies
    and sums included, is what computing would not have had, as much longer as a rank's share of a processor is small.

    Args:
        size_bytes: of a tensor. sent_bytes: that this rank sends to average one.
        seconds: for all of it.
    """
    if lockstep.device.type == "cuda":
        return 0.0
    tensor, mean = torch.zeros(size_bytes // 4), TwoShotMean(torch.float32)
    once_s = lockstep.time_exchange("probe/mean", lambda channel: mean(channel, tensor), 2)[-1]
    repeats = max(1, int(seconds / once_s))  # the same on every rank
    lockstep.wait()
    began = time.process_time()
    for _ in range(repeats):
        lockstep.queue.submit("probe/mean", lambda channel: mean(channel, tensor)).wait()
    spent_s = (time.process_time() - began) / lockstep.core_share
    rows = lockstep.share([spent_s, float(repeats * sent_bytes)])
    return sum(row[0] for row in rows) / sum(row[1] for row in rows)
