"""What the ranks tell each other once a step: their losses and times, and whether they were asked to stop."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any

import torch

from thinwire.comm.queue import CommQueue, Pending
from thinwire.comm.rank_names import name_ranks

_ADVICE = (
    "Lower optimizer.lr, lengthen schedule.warmup_steps, send gradients in a wider dtype, or look at the text of that "
    "step; the last checkpoint is from before it"
)


class NonFiniteError(ArithmeticError):
    """A loss or gradient is NaN or infinite. Raised on every rank before the optimizer takes it up.

    Args:
        what: is not finite. advice: what to change.
    Attributes: step (the first is 1); ranks whose loss was not finite, empty if only the averaged gradient was not.
    """

    def __init__(self, step: int, ranks: tuple[int, ...], what: str, advice: str = _ADVICE) -> None:
        if ranks:
            whose = f"the loss of {name_ranks(ranks)} is NaN or infinite"
        else:
            whose = "every rank's loss is finite, so a gradient overflowed, on its way over the wire at the latest"
        super().__init__(f"step {step}: {what}: {whose}. {advice}")
        self.step = step
        self.ranks = ranks


@dataclass(frozen=True)
class Report:
    """What all ranks said about a step.

    loss: the mean of the finite losses, nan if there is none. non_finite_ranks: whose were not.
    computed_s, waited_s: seconds of the step, by rank, in which it computed, and in which it waited for the others.
    """

    loss: float
    non_finite_ranks: tuple[int, ...]
    stopping_ranks: tuple[int, ...]
    computed_s: tuple[float, ...]
    waited_s: tuple[float, ...]

    def record(self) -> dict[str, Any]:
        """What the step's record says of every rank: it shows whom the others waited for. Nothing of a rank alone."""
        if len(self.computed_s) == 1:
            return {}
        return {
            "compute_ms_by_rank": [round(1e3 * s, 3) for s in self.computed_s],
            "exposed_comm_ms_by_rank": [round(1e3 * s, 3) for s in self.waited_s],
        }


# Loss, seconds computed, seconds waited; the sign of the last is the wish to stop.
_REPORT = struct.Struct("<dff")


class StepReports:
    """Each rank's loss, times and wish to stop, exchanged once a step: 16 bytes to every peer.

    Sent after a step and read after the next, so its latency hides behind a step's computation; and since every rank
    reads the same words at the same place, all stop after the same step.
    """

    def __init__(self, queue: CommQueue) -> None:
        self._queue = queue
        self._pending: Pending[torch.Tensor] | None = None

    def send(self, loss: float, stop: bool, *, computed_s: float = 0.0, waited_s: float = 0.0) -> None:
        """Tell the others. Every rank calls this after every step."""
        assert self._pending is None
        told = _REPORT.pack(loss, computed_s, math.copysign(waited_s, -1.0 if stop else 1.0))
        mine = torch.frombuffer(bytearray(told), dtype=torch.uint8)
        self._pending = self._queue.submit("control/flags", lambda channel: channel.all_gather_same(mine))

    def read(self) -> Report:
        """What was sent last, by all ranks."""
        assert self._pending is not None
        pending, self._pending = self._pending, None
        rows = [_REPORT.unpack(bytes(row)) for row in pending.wait().tolist()]
        losses: list[float] = [row[0] for row in rows]
        non_finite = tuple(r for r, loss in enumerate(losses) if not math.isfinite(loss))
        finite = [loss for loss in losses if math.isfinite(loss)]
        return Report(
            loss=math.fsum(finite) / len(finite) if finite else math.nan,
            non_finite_ranks=non_finite,
            stopping_ranks=tuple(r for r, row in enumerate(rows) if math.copysign(1.0, row[2]) < 0),
            computed_s=tuple(row[1] for row in rows),
            waited_s=tuple(abs(row[2]) for row in rows),
        )
