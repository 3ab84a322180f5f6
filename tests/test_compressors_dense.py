"""Compressors that send something for every element: casts, block quantisers, signs, powers of two."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import thinwire as tw
from thinwire.comm.compress.compressor import Compressor
from thinwire.comm.compress.draw import Draw
from thinwire.comm.wire import PayloadError

DRAW = Draw(seed=1, step=2, name="w", rank=0)


def through(compressor: Compressor, x: Tensor, draw: Draw = DRAW) -> Tensor:
    decoded = compressor.decode(compressor.encode(x, draw), x.shape, draw)
    assert isinstance(decoded, Tensor)
    return decoded.view_as(x)


def mean_over_draws(compressor: Compressor, x: Tensor, draws: int) -> Tensor:
    total = torch.zeros_like(x, dtype=torch.float64)
    for step in range(draws):
        total += through(compressor, x, Draw(seed=0, step=step, name="w", rank=0))
    return total / draws


def test_casts() -> None:
    x = torch.tensor([0.1, -3.0, 70000.0, -1e30, 3.4e38, 1e-9])
    assert torch.equal(through(tw.Dense(), x), x)
    assert through(tw.FP16(), x).tolist() == [x[0].half().item(), -3.0, 65504.0, -65504.0, 65504.0, 0.0]
    largest = torch.finfo(torch.bfloat16).max
    assert torch.equal(through(tw.BF16(), x), x.clamp(-largest, largest).bfloat16().float())


@pytest.mark.parametrize("compressor", [tw.Dense(), tw.BF16(), tw.FP16()], ids=lambda c: c.kind)
def test_a_cast_that_is_not_finite_is_refused(compressor: Compressor) -> None:
    payload = compressor.encode(torch.ones(5), DRAW)
    payload[-2:] = 0xFF
    with pytest.raises(PayloadError, match="not finite"):
        compressor.decode(payload, torch.Size((5,)), DRAW)


@pytest.mark.parametrize("block", [64, 256])
@pytest.mark.parametrize(("cls", "bits"), [(tw.Int8, 8), (tw.Int4, 4), (tw.Ternary, 2)])
def test_sizes(cls: type[tw.Int8 | tw.Int4 | tw.Ternary], bits: int, block: int) -> None:
    """numel (bits / 8 + 4 / block) bytes."""
    compressor = cls(block=block)
    numel = 100 * block
    assert compressor.payload_bytes(torch.Size((numel,))) * block * 8 == numel * (bits * block + 32)
    assert compressor.payload_bytes(torch.Size((numel + 1,))) == numel * (bits * block + 32) // (8 * block) + 1 + 4


def test_sizes_of_signs_and_powers() -> None:
    assert tw.Sign(block=256).payload_bytes(torch.Size((1 << 20,))) == (1 << 17) + (1 << 14)
    assert tw.Sign(block=32).payload_bytes(torch.Size((3, 11))) == 5 + 8
    assert tw.Natural(bits=8).payload_bytes(torch.Size((1000,))) == 1001
    assert tw.Natural(bits=9).payload_bytes(torch.Size((1000,))) == 1125


@pytest.mark.parametrize(("cls", "levels"), [(tw.Int8, 127), (tw.Int4, 7), (tw.Ternary, 1)])
def test_levels_pass_through_unharmed_on_both_sides(cls: type[tw.Int8 | tw.Int4 | tw.Ternary], levels: int) -> None:
    x = torch.arange(-levels, levels + 1, dtype=torch.float32) / 64
    assert torch.equal(through(cls(block=256), x), x)
    assert torch.equal(through(cls(block=256, rounding="stochastic"), x), x)


@pytest.mark.parametrize("cls", [tw.Int8, tw.Int4, tw.Ternary])
def test_nearest_is_nearest_and_stochastic_is_one_of_the_two_around(cls: type[tw.Int8 | tw.Int4 | tw.Ternary]) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    compressor = cls(block=64)
    scales = torch.nn.functional.pad(x, (0, 24)).view(-1, 64).abs().amax(1) / compressor.levels
    step = scales.repeat_interleave(64)[:1000]
    assert bool(((through(compressor, x) - x).abs() <= step * 0.500001).all())
    assert bool(((through(cls(block=64, rounding="stochastic"), x) - x).abs() <= step * 1.000001).all())


@pytest.mark.parametrize(
    "compressor",
    [
        tw.Int8(rounding="stochastic", block=32),
        tw.Int4(rounding="stochastic", block=32),
        tw.Ternary(rounding="stochastic", block=32),
        tw.Natural(bits=8),
        tw.Natural(bits=9),
    ],
    ids=lambda c: f"{c.kind}-{getattr(c, 'bits', '')}",
)
def test_stochastic_rounding_has_no_bias(compressor: Compressor) -> None:
    """Of many equal elements, the mean lies within five standard errors of the element; the draws are fixed."""
    one_block = torch.cat([torch.tensor([1.0]), torch.linspace(-1, 1, 31)])
    x = one_block.repeat(2000)
    y = through(compressor, x).double().view(2000, 32)
    spread = y.std(0) / math.sqrt(2000)
    assert bool(((y.mean(0) - one_block.double()).abs() <= 5 * spread + 1e-7).all())
    assert bool((y.std(0) > 0).any())


def test_ranks_and_steps_round_differently() -> None:
    x = torch.linspace(-1, 1, 1000)
    compressor = tw.Int4(rounding="stochastic")
    draws = [Draw(0, step, "w", rank) for step in range(2) for rank in range(2)]
    different = {tuple(compressor.encode(x, draw).tolist()) for draw in draws}
    assert len(different) == 4


@given(st.integers(1, 500), st.sampled_from([8, 32, 256]), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_sign_error_is_exact(numel: int, block: int, seed: int) -> None:
    """||C(x) - x||^2 = sum over blocks of ||x||_2^2 - ||x||_1^2 / n, whatever x."""
    x = torch.randn(numel, generator=torch.Generator().manual_seed(seed))
    error = float((through(tw.Sign(block=block), x).double() - x.double()).square().sum())
    expected = sum(
        float(part.square().sum() - part.abs().sum().square() / len(part)) for part in x.double().split(block)
    )
    assert error == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_sign_sends_nothing_for_a_block_of_zeros() -> None:
    x = torch.zeros(100)
    x[70] = 1.0
    y = through(tw.Sign(block=32), x)
    assert torch.equal(y[:64], torch.zeros(64))
    assert y[64:96].abs().tolist() == [1 / 32] * 32


def test_sign_does_not_pile_up_errors_where_one_element_moves() -> None:
    """With one nonzero element of 1024, errors stay in its own small block: the rest is never touched."""
    x = torch.zeros(1024)
    x[5] = 1.0
    compressor, memory, left = tw.Sign(block=32), torch.zeros(1024), torch.zeros(1024)
    for _ in range(300):
        compressor.encode_with_feedback(x, memory, left, DRAW)
        memory, left = left, memory
    assert bool((memory[32:] == 0).all())
    assert float(memory.norm()) < 31


def test_natural_gives_powers_of_two_around_each_element() -> None:
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    for bits in (8, 9):
        ratio = through(tw.Natural(bits=bits), x) / x  # type: ignore[arg-type]
        assert bool(((ratio > 0.5) & (ratio < 2)).all())
        mantissa, _ = torch.frexp(through(tw.Natural(bits=bits), x).abs())  # type: ignore[arg-type]
        assert bool((mantissa == 0.5).all())


def test_natural_over_the_whole_range() -> None:
    powers = torch.tensor([2.0**e for e in (-126, -100, -1, 0, 1, 100, 127)])
    assert torch.equal(through(tw.Natural(bits=9), -powers), -powers)
    assert torch.equal(through(tw.Natural(bits=9), torch.full((9,), 3.4e38)), torch.full((9,), 2.0**127))
    subnormal = torch.full((1000,), 2.0**-128)
    y = through(tw.Natural(bits=9), subnormal)
    assert set(y.tolist()) == {0.0, 2.0**-126}
    assert 180 < int((y > 0).sum()) < 320
    # 8 bits: 127 powers up to the largest of the tensor; below them the smallest or zero.
    wide = torch.cat([torch.tensor([2.0**20]), torch.full((1000,), 2.0**-108), torch.tensor([2.0**-106])])
    y = through(tw.Natural(bits=8), wide)
    assert y[0] == 2.0**20
    assert y[-1] == 2.0**-106
    assert set(y[1:-1].tolist()) == {0.0, 2.0**-106}
    assert 180 < int((y[1:-1] > 0).sum()) < 320


@pytest.mark.parametrize(
    ("compressor", "position", "value", "words"),
    [
        (tw.Int8(block=8), 8, 0x80, "code below -127"),
        (tw.Int4(block=8), 8, 0x80, "code below -7"),
        (tw.Int4(block=8), 9, 0x08, "code below -7"),
        (tw.Ternary(block=8), 8, 0x20, "code below -1"),
        (tw.Int8(block=8), 3, 0xBF, "negative"),
        (tw.Int8(block=8), 3, 0x7F, "too large|not finite"),
        (tw.Sign(block=8), 3, 0xBF, "negative"),
        (tw.Sign(block=8), -1, 0xF0, "behind the last element"),
        (tw.Int4(block=8), -1, 0x10, "behind the last element"),
        (tw.Natural(bits=9), 0, 0xFF, "power of two"),
        (tw.Natural(bits=8), 0, 0xFF, "power of two"),
    ],
    ids=str,
)
def test_what_no_encoder_writes_is_refused(compressor: Compressor, position: int, value: int, words: str) -> None:
    x = torch.ones(11)
    payload = compressor.encode(x, DRAW)
    payload[position] = value
    with pytest.raises(PayloadError, match=words):
        compressor.decode(payload, x.shape, DRAW)
