"""FSDP2's all-gather of a unit's weights, level by level, and the copy of them that is kept for later gathers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import timedelta

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
    weights in place is noticed, not only the optimizer's.

    Args:
        wire: a format other than the weights' own dtype; None = that.
    """

    def __init__(self, unit: Unit, levels: Levels, placement: Placement, wire: Wire | None, queue: CommQueue) -> None:
        inside = placement.secondary if placement.secondary is not None else 0
        self._unit = unit
        self._fast = Cascade(levels, 0, inside)
        self._slow = Cascade(levels, inside, placement.params)
        self._wire = wire
        self._queue = queue
        self._keeps = placement.secondary is not None
        self._kept: tuple[tuple[int, ...], Tensor] | None = None
        self.calls = 0

    @property
    def kept_bytes(self) -> int:
        """Memory of the secondary copy."""
        return self._kept[1].nbytes if self._kept else 0

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work:
        self.calls += 1
        versions = self._unit.versions()
        if self._keeps and self._kept is not None and self._kept[0] != versions:
            self._kept = None

        def exchange(channel: Channel) -> None:
            self._fill(channel, output_tensor, input_tensor, versions)

        return GatherWork(self._queue.submit(OPERATION, exchange))

    def sent_bytes(self, full_gathers: int, kept_gathers: int) -> Counter[str]:
        """Payload bytes that this rank sends in so many gathers, by level."""
        size = self._payload_bytes(self._unit.padded_numel)
        sent: Counter[str] = Counter()
        fast = self._fast.all_gather_bytes([size * self._slow.leaves] * self._fast.leaves)
        for level, count in fast.items():
            sent[level] += (full_gathers + kept_gathers) * count
        for level, count in self._slow.all_gather_bytes([size] * self._slow.leaves).items():
            sent[level] += full_gathers * count
        return sent

    def _fill(self, channel: Channel, output: Tensor, input: Tensor, versions: tuple[int, ...]) -> None:
        if self._kept is not None:
            block = self._kept[1]
        else:
            if self._wire is None:
                own = input.view(torch.uint8)
            else:
                own = self._wire.encode(input.to(torch.float32), [input.numel()], key=0)
            block = self._slow.all_gather(channel, own, [own.numel()] * self._slow.leaves)
            if self._keeps:
                self._kept = versions, block
        whole = self._fast.all_gather(channel, block, [block.numel()] * self._fast.leaves)
        if self._wire is None:
            output.view(torch.uint8).copy_(whole)
            return
        for payload, part in zip(
            whole.view(-1, self._payload_bytes(input.numel())), output.view(-1, input.numel()), strict=True
        ):
            self._wire.decode(payload, part)

    def _payload_bytes(self, numel: int) -> int:
        if self._wire is None:
            return numel * self._unit.gather_dtype.itemsize
        return self._wire.payload_bytes(numel)
