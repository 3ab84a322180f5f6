"""How fast this machine encodes and decodes, by every compressor, while all ranks do."""

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
from thinwire.dist.plan.cluster import CodecSpeed
from thinwire.dist.probe.clock import Lockstep
from thinwire.dist.probe.pipelines import measure_handling

_LARGE, _SMALL = 1 << 18, 1 << 12
_COLUMNS = 256
_BLOCK_S, _BLOCKS = 0.02, 2
_FEWEST_CALLS, _MOST_CALLS = 4, 200  # of a block; the first ones find their memory cold

EVERY: tuple[Compressor, ...] = (
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


def compressor_of(codec: str) -> Compressor | None:
    """The compressor that a Coding names; None where it is none that can be measured alone."""
    try:
        return TypeAdapter[Compressor](AnyCompressor).validate_json(codec)
    except ValidationError:
        return None


def measure_codecs(lockstep: Lockstep, compressors: Iterable[Compressor]) -> list[CodecSpeed]:
    """Seconds of the slowest rank, in the better of some blocks of calls. Collective."""
    speeds = []
    for compressor in compressors:
        large = _seconds(lockstep, compressor, _LARGE)
        small = _seconds(lockstep, compressor, _SMALL)
        per_element = [max(0.0, (a - b) / (_LARGE - _SMALL)) for a, b in zip(large, small, strict=True)]
        per_call = [max(0.0, b - _SMALL * each) for b, each in zip(small, per_element, strict=True)]
        speed = CodecSpeed(
            encode_s=per_element[0],
            decode_s=per_element[1],
            encode_call_s=per_call[0],
            decode_call_s=per_call[1],
        )
        speeds.append(measure_handling(lockstep, compressor, speed))
    return speeds


def _seconds(lockstep: Lockstep, compressor: Compressor, numel: int) -> tuple[float, float]:
    """Of encoding with error feedback, and of decoding and adding up, a tensor of this size."""
    device = lockstep.device
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(numel, generator=generator).to(device).view(-1, _COLUMNS)
    memory, after, out = torch.zeros_like(gradient), torch.empty_like(gradient), torch.zeros_like(gradient)
    draw = Draw(seed=0, step=0, name="speed", rank=0)
    payload = compressor.encode_with_feedback(gradient, memory, after, draw)  # the first call compiles

    def encode() -> None:
        compressor.encode_with_feedback(gradient, memory, after, draw)

    def decode() -> None:
        add_to(out, compressor.decode(payload, gradient.shape, draw))

    return _per_call(lockstep, encode), _per_call(lockstep, decode)


def _per_call(lockstep: Lockstep, work: Callable[[], object]) -> float:
    """Seconds of one call among many, beside which the clock's own are short."""
    first_s = lockstep.time_computing(work, 2)[1]
    count = max(_FEWEST_CALLS, min(_MOST_CALLS, int(_BLOCK_S / max(first_s, 1e-7))))

    def block() -> None:
        for _ in range(count):
            work()

    return min(lockstep.time_computing(block, _BLOCKS)) / count
