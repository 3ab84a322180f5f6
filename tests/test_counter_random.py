"""counter_random: the fast words against their definition, and what rounding with them needs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire.kernels.counter_random import WordMaker, _words_reference, dither_reference, random_words


@settings(max_examples=80, deadline=None)
@given(key=st.integers(0, 2**64 - 1), offset=st.integers(0, 2**62), count=st.integers(0, 300))
def test_fast_words_equal_the_definition(key: int, offset: int, count: int) -> None:
    words = random_words(key, count, offset=offset)
    assert torch.equal(words, _words_reference(key, offset, count, "cpu"))
    signed = WordMaker(key, count // 2 + 1).halves(offset, count)
    assert torch.equal((signed.float() + 0.5) * 2.0**-16, dither_reference(key, count, offset=offset))


def test_words_belong_to_their_places_across_tiles() -> None:
    words = random_words(5, 100_000, offset=2**32 - 10)
    assert torch.equal(words[70_000:70_100], random_words(5, 100, offset=2**32 + 69_990))
    assert torch.equal(words[10:20], random_words(5, 10))  # the sequence has a period of 2^32 words
    assert words.min() >= 0
    assert words.max() < 2**32


def test_words_stay_what_they_are() -> None:
    assert random_words(0, 3).tolist() == [3707931316, 3906785950, 2180939774]


def test_every_bit_is_fair_and_keys_are_independent() -> None:
    for key in (0, 1, 2, 2**63):
        words = random_words(key, 1 << 18)
        ones = (words[:, None] >> torch.arange(32) & 1).double().mean(0)
        assert (ones - 0.5).abs().max() < 5 * 0.5 / 512, f"key {key}"
        other = random_words(key + 1, 1 << 18)
        both = torch.stack([words, other, words.roll(1), other.roll(1)]).double()
        assert (torch.corrcoef(both) - torch.eye(4, dtype=torch.double)).abs().max() < 5 / 512, f"key {key}"


def test_dither_is_centred_and_never_a_tie() -> None:
    dither = dither_reference(9, 1 << 20).double()
    assert dither.abs().max() < 0.5
    assert abs(dither.mean()) < 5 * 12**-0.5 / 1024
    assert abs(dither.square().mean() - 1 / 12) < 1e-3


@pytest.mark.parametrize(
    ("key", "offset", "message"), [(-1, 0, "key is -1"), (1 << 64, 0, "key"), (0, -1, "offset is -1")]
)
def test_refuses(key: int, offset: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_words(key, 4, offset=offset)
