"""philox: the authors' known answers, and what the directions made of the words must stay."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from thinwire.kernels.philox import direction_reference, philox

ONES = 0xFFFFFFFF
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)


def sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


@pytest.mark.parametrize(
    ("counter", "key", "rounds", "words"),
    [  # the first five are Random123's own
        ((0, 0, 0, 0), 0, 10, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((ONES, ONES, ONES, ONES), (1 << 64) - 1, 10, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (PI, 0x299F31D0A4093822, 10, "d16cfe09 94fdcceb 5001e420 24126ea1"),
        ((0, 0, 0, 0), 0, 7, "5f6fb709 0d893f64 4f121f81 4f730a48"),
        (PI, 0x299F31D0A4093822, 7, "4dfccaba 190a87f0 c47362ba b6b5242a"),
        ((1, 0, 0, 0), 0, 10, "f8e4cca4 5cb200db b1a574eb 097eff67"),
        ((0, 1, 0, 0), 0, 10, "6ad0c5ec ea236249 73a459f5 074944b3"),
        ((0, 0, 0, 0), 1, 10, "e3e80670 e50a0ebc 95f222c0 b615aa27"),
        ((0, 0, 0, 0), 1 << 32, 10, "fdde3e0b fa7e58b6 3380ec46 d8d55c4f"),
    ],
)
def test_known_answers(counter: tuple[int, int, int, int], key: int, rounds: int, words: str) -> None:
    made = philox(*counter, key, rounds=rounds)
    assert " ".join(f"{int(word):08x}" for word in made) == words


def test_counters_are_broadcast() -> None:
    blocks = torch.arange(1024)
    words = torch.stack(philox(blocks, 0, 0, 0, 0), dim=1)
    assert sha256(words.to(torch.uint32)) == "52534eb3c5b1d1e72ed9fac09a40edcb1df4e784c713c4a46caf2802bfcd4478"
    assert [int(word) for word in philox(5, 0, 0, 0, 0)] == words[5].tolist()
    grid = philox(blocks[:3, None], 0, torch.tensor([0, 7]), 0, 0)
    assert torch.equal(torch.stack(grid)[:, :, 0], words[:3].T)


def test_words_are_where_the_counters_are() -> None:
    assert direction_reference(300, key=1, tensor=2, place=(3, 4), device="meta").device.type == "meta"


def test_signs_are_the_bits() -> None:
    signs = direction_reference(1 << 17, key=0, tensor=0, place=(0, 0)).to(torch.int8)
    assert "".join("-+"[int(sign > 0)] for sign in signs[:16]) == "+-+-+-++---+-+++"
    assert signs.sum() == -514
    assert sha256(signs) == "18379b291e790a78635b222fce8fdad6713dbbc3f4191365f9ceee70de2ba97a"


def test_gaussian_numbers_are_centred_counts_of_ones() -> None:
    z = direction_reference(4096, key=0, tensor=0, place=(0, 0), distribution="gaussian")
    assert z[:8].tolist() == [1, 0, 1, -1, 0, -2, 2, 5]
    assert z.double().mean() == pytest.approx(-0.0627, abs=1e-4)
    assert z.double().var(correction=0) == pytest.approx(7.984, abs=1e-3)


@settings(max_examples=30, deadline=None)
@given(
    first=st.integers(0, 2**33),
    count=st.integers(0, 300),
    skipped=st.integers(0, 300),
    distribution=st.sampled_from(["rademacher", "gaussian"]),
)
def test_an_element_depends_on_its_place_alone(first, count, skipped, distribution) -> None:
    what = {"key": 3, "tensor": 2, "place": (1, ONES), "distribution": distribution}
    whole = direction_reference(skipped + count, first=first, **what)
    assert torch.equal(direction_reference(count, first=first + skipped, **what), whole[skipped:])


def test_every_field_of_the_address_gives_another_direction() -> None:
    addresses = [(0, 0, 0, 0), (1, 0, 0, 0), (1 << 32, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    z = torch.stack(
        [
            direction_reference(4096, key=key, tensor=tensor, place=(c2, c3)).double()
            for key, tensor, c2, c3 in addresses
        ]
    )
    correlations = z @ z.T / 4096 - torch.eye(len(z), dtype=torch.double)
    assert correlations.abs().max() < 5 / 64


@pytest.mark.parametrize("key", [-1, 1 << 64])
def test_refuses(key: int) -> None:
    with pytest.raises(ValueError, match=f"key is {key}; it must be from 0"):
        philox(0, 0, 0, 0, key)
