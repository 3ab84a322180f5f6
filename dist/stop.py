"""Stopping in order: SIGTERM and SIGUSR1 ask for it, the ranks agree on the step, a second signal kills."""

from __future__ import annotations

import math
import os
import signal
import threading
from dataclasses import dataclass
from types import FrameType

import torch

from thinwire.comm.queue import CommQueue, Pending


class StopRequest:
    """Whether this process was asked to stop after the current step.

    Attributes: reason, the name of the signal, or "" as long as nobody asked.
    """

    def __init__(self) -> None:
        self.reason = ""

    def listen(self) -> None:
        """Take SIGTERM and SIGUSR1 as requests. Elsewhere than in the main thread Python has no signals: does nothing."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.reason:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.reason = signal.Signals(number).name


@dataclass(frozen=True)
class Report:
    """What all ranks said about a step: the mean of their losses, which were not finite, and who wants to stop."""

    loss: float
    non_finite_ranks: tuple[int, ...]
    stopping_ranks: tuple[int, ...]


class StepReports:
    """Each rank's loss and wish to stop, exchanged once a step: 16 bytes to every peer.

    Sent after a step and read after the next, so its latency hides behind a step's computation; and since every rank
    reads the same words at the same place, all stop after the same step.
    """

    OPERATION = "control/flags"

    def __init__(self, queue: CommQueue) -> None:
        self._queue = queue
        self._pending: Pending[torch.Tensor] | None = None

    def send(self, loss: float, stop: bool) -> None:
        """Tell the others. Every rank calls this after every step."""
        assert self._pending is None
        mine = torch.tensor([loss, float(stop)], dtype=torch.float64)
        self._pending = self._queue.submit(self.OPERATION, lambda channel: channel.all_gather_same(mine))

    def read(self) -> Report | None:
        """What was sent last, by all ranks; None if nothing was sent since the last read."""
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        rows = pending.wait().tolist()
        losses = [row[0] for row in rows]
        non_finite = tuple(r for r, loss in enumerate(losses) if not math.isfinite(loss))
        return Report(
            loss=math.nan if non_finite else math.fsum(losses) / len(losses),
            non_finite_ranks=non_finite,
            stopping_ranks=tuple(r for r, row in enumerate(rows) if row[1]),
        )
