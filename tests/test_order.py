"""The order of the samples: a bijection per epoch, stateless, shared without overlap."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire.dist.data import shard
from thinwire.dist.order import Permutation, window_of_sample

keys = st.integers(min_value=0, max_value=2**63 - 1)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 700), seed=keys, epoch=st.integers(0, 50))
def test_a_permutation_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    permutation = Permutation(size, (seed, epoch))
    assert sorted(permutation(i) for i in range(size)) == list(range(size))


@settings(max_examples=30, deadline=None)
@given(size=st.integers(100, 10**12), seed=keys, index=st.integers(0, 99))
def test_a_permutation_of_any_size_stays_inside(size: int, seed: int, index: int) -> None:
    assert 0 <= Permutation(size, (seed,))(index) < size


def test_epochs_and_seeds_differ_and_look_random() -> None:
    orders = [tuple(Permutation(1000, key)(i) for i in range(1000)) for key in [(0, 0), (0, 1), (1, 0)]]
    assert len(set(orders)) == 3
    for order in orders:
        assert sum(a == b for a, b in enumerate(order)) < 10  # a random permutation has about 1 fixed point
        assert sum(b == a + 1 for a, b in itertools.pairwise(order)) < 10
        # Rank correlation of a random permutation of 1000 is within 0.15 of 0 far beyond four sigma.
        correlation = 1 - 6 * sum((a - b) ** 2 for a, b in enumerate(order)) / (1000 * (1000**2 - 1))
        assert abs(correlation) < 0.15


@settings(max_examples=40, deadline=None)
@given(
    world_size=st.sampled_from([1, 2, 3, 4, 8]),
    per_rank=st.integers(1, 6),
    windows=st.integers(1, 90),
    steps=st.integers(1, 12),
    seed=keys,
)
def test_shards_cover_each_epoch_once_whatever_the_world_size(
    world_size: int, per_rank: int, windows: int, steps: int, seed: int
) -> None:
    batch = world_size * per_rank
    seen: list[int] = []
    for step in range(steps):
        together = [s for rank in range(world_size) for s in shard(step, batch, rank, world_size)]
        assert together == list(shard(step, batch, 0, 1))
        seen += [window_of_sample(s, windows, seed) for s in together]
    for epoch in range(len(seen) // windows):
        assert sorted(seen[epoch * windows : (epoch + 1) * windows]) == list(range(windows))


@settings(max_examples=30, deadline=None)
@given(windows=st.integers(1, 200), seed=keys, start=st.integers(0, 500))
def test_resuming_equals_not_stopping(windows: int, seed: int, start: int) -> None:
    whole = [window_of_sample(s, windows, seed) for s in range(start + 20)]
    assert [window_of_sample(s, windows, seed) for s in range(start, start + 20)] == whole[start:]
