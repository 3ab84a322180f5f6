"""encode_runs: tiles on a CPU and a real GPU against the reference; test_payload_kernels.py has the kernels."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_planes import Guarded, assert_same_bits, floats
from torch import Tensor

from thinwire.kernels.block_payload import BlockFormat, Runs
from thinwire.kernels.block_quantize import dequantize, quantize
from thinwire.kernels.encode_runs import encode_runs, encode_runs_reference
from thinwire.kernels.hadamard import HadamardTile, hadamard_reference


@st.composite
def runs_of_segments(draw: st.DrawFn) -> tuple[Runs, int]:
    """Runs whose values lie in a source in pieces, in another order and with gaps; and the length of the source."""
    lengths = draw(st.lists(st.integers(0, 300), min_size=1, max_size=6))
    gaps = draw(st.lists(st.integers(0, 20), min_size=len(lengths), max_size=len(lengths)))
    places, at = [], 0
    for length, gap in zip(lengths, gaps, strict=True):
        places.append((at + gap, length))
        at += gap + length
    segments = draw(st.permutations(places))
    cuts = sorted(draw(st.lists(st.integers(0, sum(lengths)), max_size=4)))
    bounds = [0, *cuts, sum(lengths)]
    return Runs([stop - start for start, stop in pairwise(bounds)], segments), at


def values(numel: int, seed: int, form: BlockFormat) -> Tensor:
    """Hostile ones; but a sum of 32 of them must be finite where they are transformed."""
    return floats(numel, seed) * (1e-3 if form.smooth else 1.0)


@settings(max_examples=60, deadline=None)
@given(
    given_runs=runs_of_segments(),
    bits=st.sampled_from([8, 4]),
    block=st.sampled_from([32, 96, 256]),
    smooth=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
    feedback=st.booleans(),
    rounding=st.sampled_from(["nearest", "stochastic"]),
    seed=st.integers(0, 2**32),
)
def test_tiles_equal_the_reference(given_runs, bits, block, smooth, dtype, feedback, rounding, seed) -> None:
    runs, source_numel = given_runs
    form = BlockFormat(bits, block, smooth)
    source = values(source_numel, seed, form).to(dtype)
    source[source.isinf()] = 1.0
    before, memory = source.clone(), Guarded(runs.numel, torch.float32)
    memory.plane.copy_(values(runs.numel, seed + 1, form) * 0.5)
    kept = memory.plane.clone()
    options = {"rounding": rounding, "key": seed}
    payload = Guarded(runs.payload_bytes(form), torch.uint8)
    encode_runs(source, runs, form, memory=memory.plane if feedback else None, payload=payload.plane, **options)
    payload.check(encode_runs_reference(source, runs, form, memory=kept if feedback else None, **options), "payload")
    memory.check(kept, "memory")
    assert_same_bits(source.view(torch.uint8), before.view(torch.uint8), "the source was changed")


def test_runs_are_what_quantize_makes_of_the_gathered_values() -> None:
    runs = Runs([700, 0, 41, 100_000], [(50_741, 50_000), (0, 50_741)])
    source = torch.randn(100_741, generator=torch.Generator().manual_seed(0))
    gathered = torch.cat([source[50_741:], source[:50_741]])
    form = BlockFormat(4, 64)
    payload = encode_runs(source, runs, form, rounding="stochastic", key=3)
    assert [len(part) for _, _, part in runs.payloads(payload, form)] == [44 + 4 + 352, 0, 16 + 32, 6252 + 4 + 50_000]
    for place, count, part in runs.payloads(payload, form):
        codes, scales = form.planes(part, count)
        made = quantize(gathered[place : place + count], bits=4, block=64, rounding="stochastic", key=3, offset=place)
        assert_same_bits(codes, made[0])
        assert_same_bits(scales, made[1])


def test_the_transform_is_its_own_inverse_and_spreads_one_value_over_32() -> None:
    x = torch.arange(-48.0, 48.0)
    once = hadamard_reference(x)
    assert torch.equal(hadamard_reference(once) / 32, x)
    assert once.square().sum() == 32 * x.square().sum()
    tiled = torch.empty(96)
    HadamardTile(96).transform(x, tiled)
    assert torch.equal(tiled, once)
    spike = torch.zeros(32)
    spike[13] = 1.0
    assert torch.equal(hadamard_reference(spike).abs(), torch.ones(32))


def test_smoothing_helps_where_blocks_have_outliers() -> None:
    x = torch.randn(1 << 14, generator=torch.Generator().manual_seed(0))
    x[::128] *= 30
    errors = []
    for smooth in (False, True):
        form, runs = BlockFormat(4, 128, smooth), Runs([1 << 14])
        memory = torch.zeros(1 << 14)
        encode_runs(x, runs, form, memory=memory)
        errors.append(float(memory.norm()))
    assert errors[1] < 0.6 * errors[0]


def test_what_is_not_finite_stays_so_and_spoils_its_block_alone() -> None:
    x = torch.ones(256)
    x[70] = torch.nan
    for smooth in (False, True):
        form = BlockFormat(8, 64, smooth)
        codes, scales = form.planes(encode_runs(x, Runs([256]), form), 256)
        assert scales.isfinite().tolist() == [True, False, True, True]
        assert dequantize(codes, scales, bits=8, block=64, numel=256).isfinite().view(4, 64).any(1).tolist() == [
            True,
            False,
            True,
            True,
        ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": torch.zeros(100, dtype=torch.float64)}, "source is torch.float64"),
        ({"source": torch.zeros(99)}, "source has 99 values; the runs reach to 100"),
        ({"source": torch.zeros(200)[::2]}, "must be flat and contiguous"),
        ({"memory": torch.zeros(99)}, "memory is"),
        ({"payload": torch.zeros(100, dtype=torch.uint8)}, "payload is"),
        ({"payload": torch.zeros(137, dtype=torch.uint8)[9:]}, "payload does not begin at"),
        ({"rounding": "up"}, "rounding is 'up'"),
    ],
)
def test_refuses(change: dict, message: str) -> None:
    arguments = {"source": torch.zeros(100), **change}
    with pytest.raises(ValueError, match=message):
        encode_runs(arguments.pop("source"), Runs([100]), BlockFormat(8, 256), **arguments)


def test_refuses_formats_and_runs_that_cannot_be() -> None:
    for arguments, message in [((2, 64), "bits is 2"), ((8, 48), "block is 48; it must be a multiple of 32")]:
        with pytest.raises(ValueError, match=message):
            BlockFormat(*arguments)
    with pytest.raises(ValueError, match="the segments hold 9 values and the runs 10"):
        Runs([4, 6], [(0, 9)])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")
@pytest.mark.parametrize("smooth", [False, True])
def test_gpu_equals_the_reference(smooth: bool) -> None:
    runs = Runs([100_000, 7, 90_016, 0, 333], [(100_352, 99_648), (16, 90_016), (250_000, 692)])
    for bits in (8, 4):
        form = BlockFormat(bits, 256, smooth)
        source, memory = values(251_000, 1, form), values(runs.numel, 2, form)
        ours = memory.cuda()
        payload = encode_runs(source.cuda(), runs, form, rounding="stochastic", key=5, memory=ours)
        expected = encode_runs_reference(source, runs, form, rounding="stochastic", key=5, memory=memory)
        assert_same_bits(payload.cpu(), expected)
        assert_same_bits(ours.cpu(), memory)
