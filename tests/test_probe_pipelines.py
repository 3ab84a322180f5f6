"""dist/probe/pipelines.py: peers that echo stand for peers that have the same, whatever is sent."""

from __future__ import annotations

import pytest
import torch
from ranks import Rank, run_ranks
from torch import Tensor

import thinwire as tw
from thinwire.comm.channel import Channel
from thinwire.comm.compress.compressor import Compressor
from thinwire.comm.compress.compressors.dense import BF16
from thinwire.comm.compress.compressors.rand_k import RandK
from thinwire.comm.forecast import Coding
from thinwire.dist.plan.cluster import CodecSpeed
from thinwire.dist.plan.exchange_time import one_coding_s
from thinwire.dist.probe import pipelines
from thinwire.dist.probe.clock import Lockstep
from thinwire.dist.probe.codecs import COMPRESSORS
from thinwire.dist.probe.pipelines import Echo, measure_handling

NOTHING = CodecSpeed(encode_s=0.0, decode_s=0.0)


def gradients(rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(rows, 256, generator=generator) for name in "ab"}


@pytest.mark.parametrize("compressor", [tw.Int8(), BF16(), tw.TopK(density=0.125)], ids=lambda c: c.kind)
@pytest.mark.parametrize("size", [2, 3])
def test_an_echo_gives_what_equal_ranks_would(compressor: Compressor, size: int) -> None:
    """All of what each sends whole; of what is cut into slices the own one, which the others' are copies of."""
    rows = 6

    def exchanged(channel: Channel) -> dict[str, Tensor]:
        own = gradients(rows)
        pipeline = pipelines._pipeline(compressor, {name: x.shape for name, x in own.items()}, size)
        for _ in range(2):  # the second with what the first left out
            pipeline.begin_step()
            assert pipeline.exchange(channel, own)
            pipeline.end_step(True)
        return own

    def work(rank: Rank) -> dict[str, Tensor]:
        return rank.queue().submit("exchange", exchanged).wait()

    among_ranks, alone = run_ranks(size, work)[0], exchanged(Echo(size))
    ours, theirs = (torch.cat([x.flatten() for x in given.values()]) for given in (alone, among_ranks))
    own = len(ours) if compressor.sparse else len(ours) // size
    assert torch.equal(ours[:own], theirs[:own])


@pytest.mark.parametrize("size", [2, 3])
def test_every_compressor_is_handled(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines, "_LARGE", 64)

    def work(rank: Rank) -> list[CodecSpeed]:
        lockstep = Lockstep(rank.queue(), torch.device("cpu"))
        return [measure_handling(lockstep, compressor, NOTHING) for compressor in COMPRESSORS]

    found = run_ranks(size, work)
    assert found == found[:1] * size  # every rank has the slowest one's
    handled = [speed.handle_s + speed.handle_call_s > 0 for speed in found[0]]
    unequal = [isinstance(compressor, RandK) for compressor in COMPRESSORS]  # as many values as do not part equally
    assert all(a or b for a, b in zip(handled, unequal, strict=True))


def test_what_a_pipeline_takes_is_what_counts() -> None:
    """Of a codec that was slower by itself, coding has the seconds that are left, in the shares that it had."""
    slow = CodecSpeed(encode_s=1.0, decode_s=2.0, encode_call_s=30.0, decode_call_s=10.0)

    def work(rank: Rank) -> tuple[CodecSpeed, CodecSpeed]:
        lockstep = Lockstep(rank.queue(), torch.device("cpu"))
        return measure_handling(lockstep, tw.Int8(), slow), measure_handling(lockstep, tw.Int8(), NOTHING)

    (speed, bare), _ = run_ranks(2, work)
    assert (speed.handle_s, speed.handle_call_s) == (0.0, 0.0)
    assert 0.0 <= speed.encode_s < 1e-3
    assert 0.0 <= speed.encode_call_s < 1.0
    assert speed.decode_s == pytest.approx(2 * speed.encode_s)
    assert speed.decode_call_s == pytest.approx(speed.encode_call_s / 3)
    assert (bare.encode_s, bare.decode_call_s) == (0.0, 0.0)
    assert bare.handle_s + bare.handle_call_s > 0


def test_handling_is_charged_by_element_and_once() -> None:
    speed = CodecSpeed(encode_s=1.0, decode_s=10.0, encode_call_s=100.0, handle_s=1000.0, handle_call_s=0.5)
    assert one_coding_s(Coding("c", 1, 2, 3, 4), speed) == 1 + 20 + 300
    assert one_coding_s(Coding("c", 1, 2, 3, 4, handled=5), speed) == 1 + 20 + 300 + 5000 + 0.5
