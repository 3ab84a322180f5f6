"""Compressors that send some entries: largest, random, above a threshold, clustered."""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import thinwire as tw
from thinwire.comm.compress.compressor import Compressor
from thinwire.comm.compress.compressors.rand_k import random_subset
from thinwire.comm.compress.decoded import Sparse, to_dense
from thinwire.comm.compress.draw import Draw
from thinwire.comm.wire import PayloadError

DRAW = Draw(seed=1, step=2, name="w", rank=0)


def through(compressor: Compressor, x: Tensor, draw: Draw = DRAW) -> Sparse:
    decoded = compressor.decode(compressor.encode(x, draw), x.shape, draw)
    assert isinstance(decoded, Sparse)
    return decoded


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 600), st.floats(0.001, 0.5), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_top_k_keeps_the_largest(numel: int, density: float, seed: int) -> None:
    x = normal(numel, seed=seed)
    kept = through(tw.TopK(density=density), x)
    count = min(max(round(density * numel), 1), numel)
    largest = x.abs().argsort(descending=True)[:count].sort().values
    assert torch.equal(kept.indices, largest)
    assert torch.equal(kept.values, x[largest])


def test_top_k_of_equal_magnitudes_takes_the_first_and_contracts_as_its_bound_says() -> None:
    x = torch.tensor([1.0, -1.0] * 50)
    compressor = tw.TopK(density=0.07)
    kept = through(compressor, x)
    assert kept.indices.tolist() == list(range(7))
    alpha = compressor.contraction(x)
    assert alpha is not None
    assert float((to_dense(kept) - x).square().sum()) == pytest.approx((1 - alpha) * 100)


def test_zeros_are_never_sent() -> None:
    x = torch.zeros(1000)
    x[[3, 500]] = torch.tensor([-2.0, 1.0])
    for compressor in (tw.TopK(density=0.5), tw.TopK(k=8, chunk=64), tw.Threshold(density=0.5), tw.TernaryCluster()):
        assert through(compressor, x).indices.tolist() == [3, 500]
        assert through(compressor, torch.zeros(1000)).indices.tolist() == []


@pytest.mark.parametrize("numel", [1, 63, 64, 65, 200, 640])
def test_top_k_of_each_chunk(numel: int) -> None:
    x = normal(numel)
    kept = through(tw.TopK(k=5, chunk=64), x)
    expected = [
        64 * chunk + place
        for chunk, part in enumerate(x.split(64))
        for place in sorted(part.abs().argsort(descending=True)[:5].tolist())
    ]
    assert kept.indices.tolist() == expected
    assert torch.equal(kept.values, x[expected])


def test_a_sparse_payload_that_would_exceed_the_tensor_is_dense_and_exact() -> None:
    x = normal(10, 10)
    x[0, :3] = 0.0
    payload = tw.TopK(density=1.0).encode(x, DRAW)
    assert payload.numel() == 404
    assert payload[:4].tolist() == [0xFF] * 4
    assert torch.equal(to_dense(through(tw.TopK(density=1.0), x)).view_as(x), x)
    assert tw.TopK(density=1.0, values="int8").encode(x, DRAW).numel() < 4 + 97 + 8 + 20


def test_chunks_of_sparse_loco_cost_at_most_77_bytes_each() -> None:
    """64 of 4096 with 2-bit values; to tell the sets apart takes 58.9 bytes, and the values 16."""
    chunks = 256
    payload = tw.TopK(k=64, chunk=4096, values="2bit").encode(normal(chunks, 4096), DRAW)
    assert payload.numel() / chunks <= 77


@pytest.mark.parametrize("compressor", [tw.TopK(density=0.01, values="int8"), tw.TernaryCluster(density=0.01)])
def test_expected_sizes_are_near_the_real_ones(compressor: Compressor) -> None:
    x = normal(300, 400)
    assert compressor.encode(x, DRAW).numel() == pytest.approx(compressor.payload_bytes(x.shape), rel=0.05)


def test_random_places_are_shared_by_ranks_and_differ_between_steps() -> None:
    x = normal(1000)
    compressor = tw.RandK(k=10)
    one, other = (through(compressor, x, Draw(0, 5, "w", rank)) for rank in (0, 3))
    assert torch.equal(one.indices, other.indices)
    for draw in (Draw(0, 6, "w", 0), Draw(1, 5, "w", 0), Draw(0, 5, "v", 0)):
        assert not torch.equal(one.indices, through(compressor, x, draw).indices)
    assert torch.equal(one.values, x[one.indices])


def test_random_k_is_unbiased_in_exact_expectation() -> None:
    """The mean over all 2-subsets of 5 places, each scaled by 5 / 2, is x itself."""
    x = normal(5).double()
    means = torch.zeros(5, dtype=torch.float64)
    for subset in combinations(range(5), 2):
        means[list(subset)] += x[list(subset)] * 5 / 2 / math.comb(5, 2)
    assert torch.allclose(means, x, atol=1e-15)
    kept = through(tw.RandK(k=2, unbiased=True), x.float())
    assert torch.equal(kept.values, x.float()[kept.indices] * 2.5)


@pytest.mark.parametrize(("numel", "count"), [(6, 2), (6, 4)])  # those in the set, those left out
def test_random_subsets_are_uniform(numel: int, count: int) -> None:
    """Each of the 15 subsets within five standard deviations of its share; the generator is fixed."""
    share = 200
    generator = torch.Generator().manual_seed(0)
    seen = Counter(tuple(random_subset(numel, count, generator).tolist()) for _ in range(15 * share))
    assert set(seen) == set(combinations(range(numel), count))
    assert all(abs(times - share) < 5 * math.sqrt(share) for times in seen.values())


@pytest.mark.parametrize("density", [0.001, 0.01, 0.3])
def test_a_threshold_keeps_about_as_many_as_asked_and_none_smaller_than_those_dropped(density: float) -> None:
    for x in (normal(20000), normal(20000).pow(5), torch.arange(20000.0)):
        kept = through(tw.Threshold(density=density), x)
        assert 0.8 * density * 20000 <= len(kept.indices) <= math.ceil(1.3 * density * 20000)
        dropped = x.clone()
        dropped[kept.indices] = 0
        assert float(kept.values.abs().min()) >= float(dropped.abs().max())


def test_a_threshold_amid_equal_magnitudes_stays_within_its_limit() -> None:
    assert len(through(tw.Threshold(density=0.1), torch.ones(1000)).indices) <= 130


def test_ternary_cluster_gives_the_means_of_its_clusters() -> None:
    x = torch.tensor([0.0, 5.0, 6.0, 7.0, -2.0, -4.0, 0.1, -0.1])
    kept = through(tw.TernaryCluster(density=5 / 8), x)
    assert kept.indices.tolist() == [1, 2, 3, 4, 5]
    assert kept.values.tolist() == [6.0, 6.0, 6.0, -3.0, -3.0]
    # 1 is nearer to zero than to the mean of what is left.
    assert through(tw.TernaryCluster(density=1.0), torch.tensor([1.0, *[10.0] * 9])).indices.tolist() == [*range(1, 10)]


def test_ternary_cluster_is_a_fixed_point_of_k_means() -> None:
    x = normal(2000) ** 3
    kept = through(tw.TernaryCluster(density=0.2), x)
    negative, positive = sorted(set(kept.values.tolist()))
    assert negative < 0 < positive
    for centre in (negative, positive):
        members = kept.indices[kept.values == centre]
        assert float(x[members].double().mean()) == pytest.approx(centre, rel=1e-6)
        assert bool((x[members].abs() >= abs(centre) / 2 * (1 - 1e-6)).all())


@pytest.mark.parametrize(
    ("x", "density", "form"),
    [
        (normal(3), 1.0, 0),
        (torch.tensor([1.0, 1.0, -1.0, 1.0, 0.0, 1.0, 1.0, 0.0, -1.0, 1.0] * 100), 1.0, 1),
        (torch.where(torch.arange(1000) % 2 > 0, 1.0, 0.0), 0.5, 1),
        (torch.nn.functional.one_hot(torch.tensor(9), 1000).float(), 0.01, 2),
        (normal(20000), 0.01, 3),
    ],
    ids=["dense", "huffman, positive most common", "huffman, zero most common", "positions", "gaps"],
)
def test_ternary_cluster_takes_the_shortest_form(x: Tensor, density: float, form: int) -> None:
    compressor = tw.TernaryCluster(density=density)
    payload = compressor.encode(x, DRAW)
    assert payload[0] == form
    kept = through(compressor, x)
    assert torch.equal(kept.values.sign(), x[kept.indices].sign())


def test_ternary_cluster_is_within_3_percent_of_the_limit() -> None:
    """At 1 %: 32 bits over the entropy of three symbols, 0.005, 0.005 and 0.99, is 352."""
    x = torch.zeros(1 << 20)
    places = random_subset(len(x), len(x) // 100, torch.Generator().manual_seed(0))
    x[places] = normal(len(places)).sign() * (1 + 0.1 * normal(len(places), seed=1).abs())
    payload = tw.TernaryCluster(density=0.01).encode(x, DRAW)
    assert len(through(tw.TernaryCluster(density=0.01), x).indices) == len(places)
    assert 4 * len(x) / payload.numel() >= 0.97 * 352.3


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ([4, 0, 0, 0], "begins with"),
        ([3, 1, 0, 0], "begins with"),
        ([1, 3, 0, 0], "begins with"),
        ([3, 0, 1, 0], "begins with"),
        ([3, 0, 0, 0, 255, 255, 255, 255], "entries"),
        ([3, 0, 0, 0, 9, 0, 0, 0, 0, 0, 128, 63], "entries"),
    ],
    ids=str,
)
def test_clusters_that_no_encoder_writes_are_refused(head: list[int], words: str) -> None:
    x = normal(3000)
    payload = tw.TernaryCluster(density=0.01).encode(x, DRAW)
    payload[: len(head)] = torch.tensor(head, dtype=torch.uint8)
    with pytest.raises(PayloadError, match=words):
        tw.TernaryCluster(density=0.01).decode(payload, x.shape, DRAW)


def test_more_entries_than_elements_are_refused() -> None:
    x = normal(100)
    payload = tw.TopK(density=0.1).encode(x, DRAW)
    payload[0] = 101
    with pytest.raises(PayloadError, match="101 entries of a tensor of 100"):
        tw.TopK(density=0.1).decode(payload, x.shape, DRAW)


def test_unbiased_places_refuse_biased_values() -> None:
    with pytest.raises(ValueError, match=r"values 'sign' are not; set unbiased to false"):
        tw.RandK(unbiased=True, values="sign")
