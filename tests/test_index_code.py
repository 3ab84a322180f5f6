"""The index code: exact, within a breath of the limit, never wrong, and safe with whatever arrives."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from thinwire.comm.compress.index_code import BITMAP, ELIAS_FANO, RAW, RICE, decode_indices, encode_indices
from thinwire.comm.wire import PayloadError


def random_places(numel: int, count: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.sort(np.random.default_rng(seed).choice(numel, count, replace=False)))


def limit_bits(numel: int, count: int) -> float:
    """log2 of the number of sets."""
    return (math.lgamma(numel + 1) - math.lgamma(count + 1) - math.lgamma(numel - count + 1)) / math.log(2)


def check(places: Tensor, numel: int) -> Tensor:
    """The payload, after a round trip, also in front of other bytes."""
    payload = encode_indices(places, numel)
    behind = torch.cat([payload, torch.full((9,), 0xA5, dtype=torch.uint8)])
    for received in (payload, behind):
        found, used = decode_indices(received, numel, places.numel())
        assert found.dtype == torch.int64
        assert torch.equal(found, places)
        assert used == payload.numel()
    assert payload.numel() <= numel / 8 + 2
    return payload


def in_each_form() -> dict[int, tuple[Tensor, int]]:
    spread = torch.arange(63)
    gaps = np.random.default_rng(1).integers(0, 90, 1500) * np.repeat([1, 40, 3, 1000, 1, 17], 250) + 1
    return {
        RAW: (torch.tensor([3, 70, 201]), 256),
        BITMAP: (random_places(4000, 1900), 4000),
        ELIAS_FANO: (65 * spread + 64, 65 * spread.numel()),
        RICE: (torch.from_numpy(np.cumsum(gaps)), int(gaps.sum()) + 5),
    }


@pytest.mark.parametrize("form", in_each_form())
def test_each_form_is_chosen_where_it_is_smallest(form) -> None:
    places, numel = in_each_form()[form]
    assert int(check(places, numel)[0]) == form


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(0, 3000), max_size=700), st.integers(0, 40), st.integers(0, 5000))
def test_round_trip_of_any_set(gaps, shift, after) -> None:
    places = torch.cumsum(torch.tensor([(gap << shift) + 1 for gap in gaps], dtype=torch.int64), 0) - 1
    numel = (int(places[-1]) if gaps else 0) + 1 + after
    if numel <= 1 << 40 or numel < 8 * len(gaps) + 64:
        check(places, numel)


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 2000), st.floats(0, 1), st.integers(0, 1000))
def test_round_trip_at_any_density(numel, density, seed) -> None:
    check(random_places(numel, round(density * numel), seed), numel)


def test_nothing_and_everything_take_no_bytes() -> None:
    assert check(torch.empty(0, dtype=torch.int64), 0).numel() == 0
    assert check(torch.empty(0, dtype=torch.int64), 1 << 62).numel() == 0
    assert check(torch.arange(1000), 1000).numel() == 0


@pytest.mark.parametrize("numel", [2, 255, 257, (1 << 31) - 1, 1 << 31, (1 << 31) + 1, (1 << 40) + 3, 1 << 62])
def test_one_index_at_either_end(numel) -> None:
    for place in (0, numel - 1):
        assert check(torch.tensor([place]), numel).numel() <= 2 + math.log2(numel) / 8


def test_tensors_of_more_than_2_to_the_31_elements() -> None:
    numel = 5 << 40
    gaps = np.random.default_rng(0).geometric(1e-9, 5000)
    places = torch.from_numpy(np.cumsum(gaps) - 1)
    assert int(places[-1]) > 1 << 41
    assert int(check(places, numel)[0]) == RICE
    check(torch.tensor([0, 1, (1 << 31) - 1, 1 << 31, (1 << 32) + 1, numel - 1]), numel)


@pytest.mark.parametrize("count", [255, 256, 257, 511, 512, 513, 2049])
def test_blocks_that_are_not_full(count) -> None:
    for width in (1, 5, 9, 18):
        check(random_places(count << width, count), count << width)


@pytest.mark.parametrize(
    ("density", "table_bits"), [(0.001, 11.50), (0.01, 8.11), (1 / 64, 7.53), (0.03, 6.59), (0.1, 4.76)]
)
def test_random_sets_cost_what_rice_codes_cost(density, table_bits) -> None:
    """The table holds the cost of one Rice parameter on random sets; less than the limit would be a mistake."""
    numel = 2_000_000
    count = round(density * numel)
    payload = check(random_places(numel, count), numel)
    bits = 8 * payload.numel()
    assert bits >= limit_bits(numel, count)
    assert bits / count <= table_bits + 0.05
    assert bits / count <= 1.015 * limit_bits(numel, count) / count


@pytest.mark.parametrize(("count", "most_bits"), [(64, 7.49), (32, 8.49)])
def test_a_fixed_count_in_each_chunk_costs_little_more_than_its_own_limit(count, most_bits) -> None:
    chunks = 500
    order = np.random.default_rng(0).random((chunks, 4096)).argpartition(count, axis=1)[:, :count]
    places = torch.from_numpy(np.sort(order + 4096 * np.arange(chunks)[:, None], axis=1).reshape(-1))
    bits = 8 * check(places, chunks * 4096).numel() / places.numel()
    assert limit_bits(4096, count) / count <= bits <= most_bits


def test_clustered_sets_cost_less_than_random_ones() -> None:
    """Each block has a divisor of its own: dense and empty stretches each get theirs."""
    chance = np.random.default_rng(0)
    wanted = np.repeat(chance.choice([0.0002, 0.2], 200, p=[0.9, 0.1]), 5000)
    places = torch.from_numpy(np.flatnonzero(chance.random(wanted.size) < wanted))
    assert 8 * check(places, wanted.size).numel() < 0.9 * limit_bits(wanted.size, places.numel())


@pytest.mark.parametrize("form", in_each_form())
def test_damaged_payloads_are_refused_or_give_ascending_indices(form, mutations) -> None:
    places, numel = in_each_form()[form]
    payload = encode_indices(places, numel)
    chance = np.random.default_rng(0)
    wrong_count = wrong_numel = 0
    for number, damaged in enumerate(mutations(payload)):
        count, size = places.numel(), numel
        if number % 3 == 1:
            count = wrong_count = int(chance.integers(0, 2 * count))
        elif number % 3 == 2:
            size = wrong_numel = int(chance.integers(1, 2 * size))
        if form != RICE and number % 5 == 0 and damaged.numel():
            damaged[0] = form  # beyond the first byte's check
        try:
            found, used = decode_indices(damaged, size, count)
        except PayloadError:
            continue
        assert found.dtype == torch.int64
        assert found.numel() == count
        assert 0 <= used <= damaged.numel()
        if count:
            assert int(found[0]) >= 0
            assert int(found[-1]) < size
            assert bool((found[1:] > found[:-1]).all())
    assert wrong_count
    assert wrong_numel


@pytest.mark.parametrize("form", in_each_form())
def test_every_truncation_is_refused(form) -> None:
    places, numel = in_each_form()[form]
    payload = encode_indices(places, numel)
    for size in {*range(0, payload.numel(), 7), payload.numel() - 1}:
        with pytest.raises(PayloadError):
            decode_indices(payload[:size], numel, places.numel())


@pytest.mark.parametrize("form", [RAW, BITMAP, ELIAS_FANO, RICE])
@pytest.mark.parametrize(("numel", "count"), [(1 << 62, (1 << 62) - 1), (1 << 62, 1 << 40), (1 << 40, 1 << 39)])
def test_enormous_claims_allocate_nothing(form, numel, count) -> None:
    for rest in (b"", b"\xff" * 20, b"\xff\xff\xff\xff\xff\xff\x7f" * 3, b"\x00" * 20, b"\x01\xff" * 10):
        with pytest.raises(PayloadError):
            decode_indices(torch.tensor([form, *rest], dtype=torch.uint8), numel, count)


@pytest.mark.parametrize(("numel", "count"), [(10, 11), (10, -1), (-1, 0), ((1 << 62) + 1, 1)])
def test_impossible_claims_are_refused(numel, count) -> None:
    with pytest.raises(PayloadError, match="indices among"):
        decode_indices(torch.zeros(100, dtype=torch.uint8), numel, count)


def test_forms_that_do_not_exist_are_refused() -> None:
    with pytest.raises(PayloadError, match="form 4"):
        decode_indices(torch.full((100,), 4, dtype=torch.uint8), 50, 5)
