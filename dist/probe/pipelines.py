"""What an exchange computes beside its encoding and decoding: joining, packing, checking, on memory that is not hot."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import ValidationError
from torch import Tensor

from thinwire.comm.channel import Channel
from thinwire.comm.compress.assemble import assemble
from thinwire.comm.compress.compressor import Compressor
from thinwire.comm.compress.feedback import EF, NoFeedback
from thinwire.comm.compress.pipeline import Pipeline
from thinwire.comm.compress.settings import CompressSettings
from thinwire.comm.wire import PayloadError
from thinwire.dist.plan.cluster import CodecSpeed
from thinwire.dist.plan.exchange_time import one_coding_s
from thinwire.dist.probe.clock import Lockstep

_TENSORS, _COLUMNS = 4, 256  # of a group
_LARGE, _SMALL = 1024, 32  # rows of each tensor, about
_CALLS = 3


class Echo(Channel):
    """Peers that send what this rank sends, at once: an exchange without a network.

    Args:
        size: ranks, this one included, which is the first.
    """

    def __init__(self, size: int) -> None:
        self.rank = 0
        self.size = size

    def among(self, ranks: Sequence[int]) -> Channel:
        return Echo(len(ranks))

    def all_to_all(
        self,
        output: Tensor,
        input: Tensor,
        output_splits: Sequence[int],
        input_splits: Sequence[int],
        *,
        in_rounds: bool = False,
    ) -> None:
        for part, length in zip(output.split(list(output_splits)), output_splits, strict=True):
            part.copy_(input[:length])

    def all_gather(self, output: Tensor, local: Tensor, splits: Sequence[int], *, in_rounds: bool = False) -> None:
        for part, length in zip(output.split(list(splits)), splits, strict=True):
            part.copy_(local[:length])


def measure_handling(lockstep: Lockstep, compressor: Compressor, speed: CodecSpeed) -> CodecSpeed:
    """The same speed with what `method: compress` needs besides, per element and per call. Collective.

    A group of tensors goes through the whole pipeline, between peers that echo. What that takes longer than the group's
    encoding and decoding would by `speed` is what is added; nothing where slices come out of unequal length, so that an
    echo is no answer.
    """
    size = lockstep.queue.size
    # Slices of equal length, so that what this rank sends might be any other's.
    step = size * math.lcm(_TENSORS * _COLUMNS, compressor.granule) // (_TENSORS * _COLUMNS)
    large, small = (step * math.ceil(rows / step) for rows in (_LARGE, _SMALL))
    try:
        large_s, small_s = (_handling_s(lockstep, compressor, speed, rows) for rows in (large, small))
    except PayloadError:  # on every rank, since all have the same
        return speed
    per_row = max(0.0, large_s - small_s) / max(1, large - small)
    return speed.model_copy(
        update={"handle_s": per_row / (_TENSORS * _COLUMNS), "handle_call_s": max(0.0, small_s - small * per_row)}
    )


def _handling_s(lockstep: Lockstep, compressor: Compressor, speed: CodecSpeed, rows: int) -> float:
    size = lockstep.queue.size
    generator = torch.Generator().manual_seed(0)
    gradients = {
        f"{number}": torch.randn(rows, _COLUMNS, generator=generator).to(lockstep.device) for number in range(_TENSORS)
    }
    pipeline = _pipeline(compressor, {name: x.shape for name, x in gradients.items()}, size)
    channel = Echo(size)

    def exchange() -> None:
        pipeline.begin_step()
        pipeline.end_step(pipeline.exchange(channel, gradients))

    exchange()  # the first call compiles, and measures the compression error
    taken_s = min(lockstep.time_computing(exchange, _CALLS))
    codings = [c for lane in pipeline.lanes(gradients) for s in lane.stages(0, size, fused=True) for c in s.coding]
    bare = speed.model_copy(update={"handle_s": 0.0, "handle_call_s": 0.0})
    return max(0.0, taken_s - sum(one_coding_s(coding, bare) for coding in codings))


def _pipeline(compressor: Compressor, shapes: dict[str, torch.Size], size: int) -> Pipeline:
    try:
        settings = CompressSettings(compressor=compressor, feedback=EF(), dense_below=0)
    except ValidationError:  # an unbiased one has nothing to remember
        settings = CompressSettings(compressor=compressor, feedback=NoFeedback(), dense_below=0)
    return assemble(settings, shapes, rank=0, size=size, inner=None, learning_rate=lambda _: 1.0)
