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
from thinwire.comm.forecast import Coding
from thinwire.comm.wire import PayloadError
from thinwire.dist.plan.cluster import CodecSpeed
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
    """The speed that a compressor has in `method: compress`, with what that needs besides. Collective.

    A group of tensors goes through the whole pipeline, between peers that echo, and what that takes is what counts.
    Where it is more than the group's encoding and decoding by `speed`, per element or per call, the rest is handling;
    where it is less, encoding and decoding are faster than they were one by one. `speed` itself where slices come out
    of unequal length, so that an echo is no answer.
    """
    size = lockstep.queue.size
    # Slices of equal length, so that what this rank sends might be any other's.
    step = size * math.lcm(_TENSORS * _COLUMNS, compressor.granule) // (_TENSORS * _COLUMNS)
    large, small = (step * math.ceil(rows / step) for rows in (_LARGE, _SMALL))
    try:
        (large_s, coded), (small_s, _) = (_exchange_s(lockstep, compressor, rows) for rows in (large, small))
    except PayloadError:  # on every rank, since all have the same
        return speed
    numel = large * _TENSORS * _COLUMNS
    element_s = max(0.0, large_s - small_s) / max(1, numel - small * _TENSORS * _COLUMNS)
    call_s = max(0.0, small_s - small * _TENSORS * _COLUMNS * element_s)
    coded_s = sum(one.encoded * speed.encode_s + one.decoded * speed.decode_s for one in coded) / numel
    called_s = sum(one.encodes * speed.encode_call_s + one.decodes * speed.decode_call_s for one in coded)
    per_element, per_call = (min(1.0, a / b) if b else 1.0 for a, b in ((element_s, coded_s), (call_s, called_s)))
    return CodecSpeed(
        encode_s=per_element * speed.encode_s,
        decode_s=per_element * speed.decode_s,
        encode_call_s=per_call * speed.encode_call_s,
        decode_call_s=per_call * speed.decode_call_s,
        handle_s=max(0.0, element_s - coded_s),
        handle_call_s=max(0.0, call_s - called_s),
    )


def _exchange_s(lockstep: Lockstep, compressor: Compressor, rows: int) -> tuple[float, list[Coding]]:
    """Seconds of a group's exchange between echoes, and the coding in it."""
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
    return taken_s, [
        c for lane in pipeline.lanes(gradients) for s in lane.stages(0, size, fused=True) for c in s.coding
    ]


def _pipeline(compressor: Compressor, shapes: dict[str, torch.Size], size: int) -> Pipeline:
    try:
        settings = CompressSettings(compressor=compressor, feedback=EF(), dense_below=0)
    except ValidationError:  # an unbiased one has nothing to remember
        settings = CompressSettings(compressor=compressor, feedback=NoFeedback(), dense_below=0)
    return assemble(settings, shapes, rank=0, size=size, inner=None, learning_rate=lambda _: 1.0)
