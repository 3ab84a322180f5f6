"""The value code: sizes, errors, equal bits, and nothing but finite numbers from whatever arrives."""

from __future__ import annotations

import struct
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from thinwire.comm.compress.value_code import ValueKind, decode_values, encode_values, values_bytes
from thinwire.comm.wire import PayloadError

KINDS = get_args(ValueKind)
every_kind = pytest.mark.parametrize("kind", KINDS)
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


def kept(count: int, seed: int = 0) -> Tensor:
    """What top-k leaves of a normal tensor: the largest 1 %, of both signs."""
    x = torch.randn(100 * count, generator=torch.Generator().manual_seed(seed))
    return x[x.abs().topk(count).indices.sort().values]


def round_trip(values: Tensor, kind: ValueKind, key: int = 0) -> Tensor:
    payload = encode_values(values, kind, key)
    assert payload.numel() == values_bytes(values.numel(), kind)
    behind = torch.cat([payload, torch.full((3,), 0xA5, dtype=torch.uint8)])
    decoded, used = decode_values(behind[:], values.numel(), kind)
    assert used == payload.numel()
    assert decoded.dtype == torch.float32
    assert decoded.shape == values.shape
    assert bool(decoded.isfinite().all())
    return decoded


def relative_error(values: Tensor, decoded: Tensor) -> float:
    return float((values - decoded).norm() / values.norm())


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(KINDS), st.lists(finite, max_size=600), st.integers(0, 1 << 62))
def test_any_finite_values_come_out_finite_and_near(kind, numbers, key) -> None:
    values = torch.tensor(numbers, dtype=torch.float32)
    decoded = round_trip(values, kind, key)
    if kind.startswith("int") and numbers:
        largest = 127 if kind.startswith("int8") else 7
        for block, found in zip(values.double().split(256), decoded.double().split(256), strict=True):
            step = float(block.abs().max()) / largest
            allowed = step * (1.001 if kind.endswith("_stochastic") else 0.501)
            assert float((block - found).abs().max()) <= allowed + 2.0**-100  # a smaller block counts as zero
    elif kind == "2bit" and numbers:
        assert float(decoded.min()) >= min(numbers)
        assert float(decoded.max()) <= max(numbers)


@every_kind
def test_the_same_key_gives_the_same_bytes(kind) -> None:
    values = kept(700)
    assert torch.equal(encode_values(values, kind, 5), encode_values(values, kind, 5))
    differs = not torch.equal(encode_values(values, kind, 5), encode_values(values, kind, 6))
    assert differs == kind.endswith("_stochastic")


@every_kind
def test_zeros_stay_zeros(kind) -> None:
    values = torch.zeros(600)
    assert torch.equal(round_trip(values, kind), values)


@pytest.mark.parametrize(
    ("kind", "bits", "most_error"),
    [
        ("fp32", 32, 0.0),
        ("bf16", 16, 0.002),
        ("fp16", 16, 0.0003),
        ("int8", 8.125, 0.004),
        ("int4", 4.125, 0.07),
        ("2bit", 2.0, 0.065),
        ("sign", 1.0, 0.11),
    ],
)
def test_bits_and_errors_of_what_top_k_keeps(kind, bits, most_error) -> None:
    values = kept(16384)
    assert 8 * values_bytes(16384, kind) / 16384 == pytest.approx(bits, abs=0.01)
    assert relative_error(values, round_trip(values, kind)) <= most_error


def test_the_layouts_are_fixed() -> None:
    """Another machine, or an older thinwire, reads these very bytes."""
    values = torch.tensor([1.0, -127.0, 0.4, 64.6])
    assert bytes(encode_values(values, "int8").tolist()) == struct.pack("<fbbbb", 1.0, 1, -127, 0, 65)
    assert bytes(encode_values(values * 7 / 127, "int4").tolist()) == struct.pack("<fBB", 1.0, 0x90, 0x40)
    assert bytes(encode_values(torch.tensor([1.0, -2.0, 0.0]), "sign").tolist()) == struct.pack("<fB", 1.0, 0b101)
    codebook = encode_values(torch.tensor([4.0, -8.0, 1.0, -1.0, 4.0]), "2bit")
    assert bytes(codebook.tolist()) == struct.pack("<ffffBB", -8.0, -1.0, 1.0, 4.0, 0b01_10_00_11, 0b11)
    assert bytes(encode_values(torch.tensor([1.0]), "bf16").tolist()) == b"\x80\x3f"


def test_ties_round_to_even() -> None:
    values = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5])
    assert round_trip(values, "int8").tolist() == [127, 0, 2, 2, 0, -2]


@pytest.mark.parametrize("kind", ["int8_stochastic", "int4_stochastic"])
def test_rounding_by_chance_is_unbiased(kind) -> None:
    values = kept(256)
    rounds = 400
    mean = sum(round_trip(values, kind, key) for key in range(rounds)) / rounds
    step = float(values.abs().max()) / (127 if kind == "int8_stochastic" else 7)
    # Each mean has a standard deviation of at most step / 2 / sqrt(rounds); 256 of them stay within 5.
    assert float((mean - values).abs().max()) <= 5 * step / 2 / rounds**0.5
    assert relative_error(values, round_trip(values, kind.removesuffix("_stochastic"))) < relative_error(
        values, round_trip(values, kind)
    )


def test_four_numbers_are_kept_exactly() -> None:
    values = torch.tensor([3.0, -1.0, 0.25, 7.0]).repeat_interleave(torch.tensor([5, 1, 90, 3]))
    assert torch.equal(round_trip(values, "2bit"), values)


@pytest.mark.parametrize("seed", range(4))
def test_the_codebook_is_better_than_equal_bins_over_six_sigma(seed) -> None:
    """Four bins of equal width over six standard deviations about the mean, with the means of the bins."""
    values = kept(4096, seed)
    width = 6 * values.std() / 4
    bins = ((values - values.mean()) / width + 2).floor().clamp(0, 3).long()
    sums = torch.zeros(4).index_add_(0, bins, values)
    means = sums / torch.bincount(bins, minlength=4).clamp(min=1)
    ours = relative_error(values, round_trip(values, "2bit"))
    assert ours < 0.7 * relative_error(values, means[bins])


def test_the_codebook_of_many_values_comes_from_a_sample_and_is_as_good() -> None:
    values = kept(60_000)
    assert relative_error(values, round_trip(values, "2bit")) < 0.065


@pytest.mark.parametrize("kind", ["int8", "int4", "2bit", "sign", "int8_stochastic"])
def test_powers_of_two_pass_through(kind) -> None:
    values = kept(900)
    assert torch.equal(round_trip(values * 2.0**-20, kind) * 2.0**20, round_trip(values, kind))


@pytest.mark.parametrize(
    ("kind", "payload", "what"),
    [
        ("int8", struct.pack("<fbb", 1.0, 3, -128), "code -128"),
        ("int4", struct.pack("<fB", 1.0, 0x81), "code -8"),
        ("int8", struct.pack("<fbb", float("nan"), 3, 1), "scale"),
        ("int8", struct.pack("<fbb", float("inf"), 3, 1), "scale"),
        ("int4", struct.pack("<fB", -1.0, 0x11), "scale"),
        ("int4", struct.pack("<fB", 1e38, 0x11), "scale"),
        ("sign", struct.pack("<fB", float("inf"), 1), "scale"),
        ("sign", struct.pack("<fB", -2.0, 1), "scale"),
        ("2bit", struct.pack("<ffffB", 0.0, 1.0, float("nan"), 0.0, 1), "codebook"),
        ("fp32", struct.pack("<ff", 1.0, float("inf")), "not finite"),
        ("bf16", b"\x80\x7f\x00\x00", "not finite"),
        ("fp16", b"\x00\x7c\x00\x00", "not finite"),
    ],
)
def test_what_no_encoder_writes_is_refused(kind, payload, what) -> None:
    with pytest.raises(PayloadError, match=what):
        decode_values(torch.tensor(list(payload), dtype=torch.uint8), 2, kind)


@every_kind
@pytest.mark.parametrize("count", [-1, 1 << 40, 1 << 62])
def test_impossible_counts_are_refused(kind, count) -> None:
    with pytest.raises(PayloadError):
        decode_values(torch.zeros(64, dtype=torch.uint8), count, kind)


@every_kind
def test_damaged_payloads_are_refused_or_give_finite_values(kind, mutations) -> None:
    count = 300
    payload = encode_values(kept(count), kind)
    chance = np.random.default_rng(0)
    for number, damaged in enumerate(mutations(payload)):
        claimed = int(chance.integers(0, 2 * count)) if number % 3 == 2 else count
        try:
            decoded, used = decode_values(damaged, claimed, kind)
        except PayloadError:
            continue
        assert decoded.shape == (claimed,)
        assert 0 <= used <= damaged.numel()
        assert bool(decoded.isfinite().all())
