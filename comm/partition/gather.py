"""FSDP2's all-gather of a unit's weights, level by level, and the copy of them that is kept for later gathers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather

from thinwire.comm.channel import Channel
from thinwire.comm.partition.cascade import Cascade
from thinwire.comm.partition.levels import Levels
from thinwire.comm.partition.placement import Placement
from thinwire.comm.partition.unit import Unit
from thinwire.comm.partition.wires.wire import Wire
from thinwire.comm.queue import CommQueue, Pending

OPERATION = "partition/gather"


class GatherWork(dist.Work):
    """Lets FSDP2 wait for a gather only when it needs the weights, also on a CPU."""

    def __init__(self, pending: Pending[None]) -> None:
        super().__init__()
        self._pending = pending

    def wait(self, timeout: timedelta | None = None) -> bool:
        self._pending.wait()
        return True


class Gather(AllGather):
    """All-gather over the params levels, slowest first: the slow links carry each shard once for each fast group.

    With `secondary`, what a rank has after the slow levels, 1/s_2 of the unit, is kept until the weights change, and
    later gathers use the levels inside it only: hpZ (Wang et al. 2023, 2306.10209). Unlike DeepSpeed, any change of the
    weights in place is noticed, not only the optimizer's; all ranks must make it, as with any change of weights.

    Args:
        wire: a format other than the weights' own dtype; None = that.
    Attributes:
        unit: whose weights.
        last: how many gathers over all levels, and how many inside `secondary` only, there were between the last two
            calls of begin_step().
    """

    def __init__(self, unit: Unit, levels: Levels, placement: Placement, wire: Wire | None, queue: CommQueue) -> None:
        inside = placement.secondary if placement.secondary is not None else 0
        self.unit = unit
        self.last = (0, 0)
        self._fast = Cascade(levels, 0, inside)
        self._slow = Cascade(levels, inside, placement.params)
        self._wire = wire
        self._queue = queue
        self._keeps = placement.secondary is not None
        self._kept: tuple[tuple[int, ...], Tensor] | None = None
        self._calls = [0, 0]
        self._in_backward = 0
        self._needed_in_backward = unit.is_gathered_for_backward

    @property
    def kept_bytes(self) -> int:
        """Memory of the secondary copy."""
        return self._kept[1].nbytes if self._kept else 0

    @property
    def predicted_kept_bytes(self) -> int:
        """Memory of the secondary copy once there has been a gather."""
        return self._payload_bytes(self.unit.padded_numel) * self._slow.leaves if self._keeps else 0

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work:
        self._in_backward += self.unit.is_in_backward
        exchange = partial(self._fill, output_tensor, input_tensor, self.unit.versions())
        return GatherWork(self._queue.submit(OPERATION, exchange))

    def forget(self) -> None:
        """Drop the copy: the weights have changed, also where this rank has no rows of them. No gather is under way."""
        self._kept = None

    def begin_step(self) -> None:
        """Count anew."""
        full, kept = self._calls
        if full + kept:
            self._needed_in_backward = self._in_backward > 0
        self.last = (full, kept)
        self._calls, self._in_backward = [0, 0], 0

    def sent_bytes(self, micro_batches: int) -> Counter[str]:
        """Payload bytes that this rank sends in a step of so many backwards, by level.

        Weights are gathered in each forward, and again in each backward: but for the root's, which stay, and those of a
        frozen unit through which no gradient went in the last step. With `secondary`, once per step over all levels;
        frozen ones only ever once.
        """
        gathers = micro_batches * (2 if self._needed_in_backward else 1)
        full = gathers if not self._keeps else 1 if self.unit.shapes else 0
        size = self._payload_bytes(self.unit.padded_numel)
        sent: Counter[str] = Counter()
        for level, count in self._fast.all_gather_bytes([size * self._slow.leaves] * self._fast.leaves).items():
            sent[level] += gathers * count
        for level, count in self._slow.all_gather_bytes([size] * self._slow.leaves).items():
            sent[level] += full * count
        return sent

    def _fill(self, output: Tensor, input: Tensor, versions: tuple[int, ...], channel: Channel) -> None:
        if self._kept is not None and self._kept[0] != versions:
            self._kept = None
        self._calls[self._kept is not None] += 1
        own_bytes = self._payload_bytes(input.numel())
        out = output.view(torch.uint8) if self._wire is None else None
        if self._kept is not None:
            block = self._kept[1]
        else:
            own = input.view(torch.uint8)
            if self._wire is not None:
                own = self._wire.encode(input.to(torch.float32), [input.numel()], key=0)
            block = self._slow.all_gather(channel, own, [own_bytes] * self._slow.leaves, None if self._keeps else out)
            if self._keeps:
                self._kept = versions, block
        whole = self._fast.all_gather(channel, block, [block.numel()] * self._fast.leaves, out)
        if self._wire is not None:
            for payload, part in zip(whole.view(-1, own_bytes), output.view(-1, input.numel()), strict=True):
                self._wire.decode(payload, part)
        elif whole.data_ptr() != output.data_ptr():  # the copy that is kept is all of it
            output.view(torch.uint8).copy_(whole)

    def _payload_bytes(self, numel: int) -> int:
        if self._wire is None:
            return numel * self.unit.gather_dtype.itemsize
        return self._wire.payload_bytes(numel)
