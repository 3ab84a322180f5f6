"""How fast this machine encodes and decodes, in every format, while all ranks do."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from pydantic import TypeAdapter, ValidationError

from thinwire.comm.compress.compressor import Compressor
from thinwire.comm.compress.compressors import AnyCompressor
from thinwire.comm.compress.compressors.block_quantized import Int4, Int8, Ternary
from thinwire.comm.compress.compressors.dense import BF16, FP16, Dense
from thinwire.comm.compress.compressors.low_rank import LowRank
from thinwire.comm.compress.compressors.natural import Natural
from thinwire.comm.compress.compressors.rand_k import RandK
from thinwire.comm.compress.compressors.sign import Sign
from thinwire.comm.compress.compressors.ternary_cluster import TernaryCluster
from thinwire.comm.compress.compressors.threshold import Threshold
from thinwire.comm.compress.compressors.top_k import TopK
from thinwire.comm.compress.decoded import add_to
from thinwire.comm.compress.draw import Draw
from thinwire.comm.forecast import codec_label
from thinwire.comm.gossip.forecast import HANDLING
from thinwire.dist.plan.cluster import CodecSpeed
from thinwire.dist.probe import wires
from thinwire.dist.probe.clock import Lockstep
from thinwire.dist.probe.gossip_round import measure_round
from thinwire.dist.probe.pipelines import measure_handling
from thinwire.dist.probe.wires import Works

_LARGE, _SMALL = 1 << 18, 1 << 12
_COLUMNS = 256
_BLOCK_S, _BLOCKS = 0.02, 2
_MOST_CALLS = 200  # of a block
# Of small tensors a step has many in a row, whose code is hot; a large one finds its memory cold.
_FEWEST_SMALL, _FEWEST_LARGE = 4, 1

COMPRESSORS: tuple[Compressor, ...] = (
    Dense(),
    BF16(),
    FP16(),
    Int8(),
    Int4(),
    Ternary(),
    Sign(),
    Natural(),
    TopK(density=0.01, values="int8"),
    TopK(k=64, chunk=4096, values="2bit"),
    RandK(density=0.01),
    Threshold(density=0.01),
    LowRank(rank=4, dtype="bf16"),
    LowRank(rank=16, dtype="bf16"),
    TernaryCluster(density=0.01),
)
"""One of each kind at least; two of those that methods use in two ways."""

EVERY = (*(codec_label(compressor) for compressor in COMPRESSORS), *wires.EVERY, HANDLING)
"""Labels of what is timed in any case."""


def compressor_of(codec: str) -> Compressor | None:
    """The compressor that a Coding names; None where it is another codec."""
    try:
        return TypeAdapter[Compressor](AnyCompressor).validate_json(codec)
    except ValidationError:
        return None


def measure_codecs(lockstep: Lockstep, labels: Iterable[str]) -> dict[str, CodecSpeed]:
    """Seconds of the slowest rank, the better of two blocks of calls, by label; none of unknown ones. Collective."""
    speeds = {}
    for label in labels:
        if label == HANDLING:
            speeds[label] = measure_round(lockstep)
            continue
        works = [_works_of(label, numel, lockstep) for numel in (_LARGE, _SMALL)]
        if None in works:
            continue
        large, small = (
            [_per_call(lockstep, work, fewest) for work in pair]
            for pair, fewest in zip(works, (_FEWEST_LARGE, _FEWEST_SMALL), strict=True)
            if pair is not None
        )
        per_element = [max(0.0, (a - b) / (_LARGE - _SMALL)) for a, b in zip(large, small, strict=True)]
        per_call = [max(0.0, b - _SMALL * each) for b, each in zip(small, per_element, strict=True)]
        speed = CodecSpeed(
            encode_s=per_element[0],
            decode_s=per_element[1],
            encode_call_s=per_call[0],
            decode_call_s=per_call[1],
        )
        compressor = compressor_of(label)
        speeds[label] = speed if compressor is None else measure_handling(lockstep, compressor, speed)
    return speeds


def _works_of(label: str, numel: int, lockstep: Lockstep) -> Works | None:
    """Encoding with error feedback, and decoding and adding up, of a tensor of this size."""
    size, device = lockstep.queue.size, lockstep.device
    compressor = compressor_of(label)
    if compressor is None:
        return wires.works_of(label, numel // size * size, size, device)
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(numel, generator=generator).to(device).view(-1, _COLUMNS)
    memory, after, out = torch.zeros_like(gradient), torch.empty_like(gradient), torch.zeros_like(gradient)
    draw = Draw(seed=0, step=0, name="speed", rank=0)
    payload = compressor.encode_with_feedback(gradient, memory, after, draw)  # the first call compiles
    return (
        lambda: compressor.encode_with_feedback(gradient, memory, after, draw),
        lambda: add_to(out, compressor.decode(payload, gradient.shape, draw)),
    )


def _per_call(lockstep: Lockstep, work: Callable[[], object], fewest: int) -> float:
    """Seconds of one call among many, beside which the clock's own are short."""
    first_s = lockstep.time_computing(work, 2)[1]
    count = max(fewest, min(_MOST_CALLS, int(_BLOCK_S / max(first_s, 1e-7))))

    def block() -> None:
        for _ in range(count):
            work()

    return min(lockstep.time_computing(block, _BLOCKS)) / count
