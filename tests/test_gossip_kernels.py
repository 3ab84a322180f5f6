"""The kernels of gossip: PyTorch in tiles, the interpreted and the compiled kernels against their references."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_aot import TARGETS, compile_ahead, needs_compiler
from triton_interpreter import interpreted

from thinwire.kernels import swap_with_momentum as swap_module
from thinwire.kernels import weighted_sum as sum_module
from thinwire.kernels.swap_with_momentum import swap_with_momentum, swap_with_momentum_reference
from thinwire.kernels.weighted_sum import FUSED, weighted_sum, weighted_sum_reference

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
BITS = {FP32: torch.int32, FP64: torch.int64}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def same_bits(actual: Tensor, expected: Tensor) -> bool:
    assert actual.dtype == expected.dtype
    return torch.equal(actual.view(BITS[actual.dtype]), expected.view(BITS[actual.dtype]))


def draw(n: int, m: int, dtypes: tuple[torch.dtype, ...], seed: int) -> tuple[list[Tensor], list[float]]:
    generator = torch.Generator().manual_seed(seed)
    vectors = []
    for i in range(n):
        scale = torch.exp2(torch.randint(-20, 20, (m,), generator=generator).to(FP32))
        vectors.append((torch.randn(m, generator=generator) * scale).to(dtypes[i % len(dtypes)]))
    return vectors, torch.randn(n, generator=generator, dtype=FP64).tolist()


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 12),
    m=st.integers(0, 150),
    tile=st.integers(1, 70),
    dtypes=st.sampled_from([(FP32,), (BF16,), (FP32, BF16), (FP32, FP16, BF16), (FP64,)]),
    in_place=st.booleans(),
    seed=st.integers(0, 1 << 32),
)
def test_sum_in_tiles_equals_the_reference(n, m, tile, dtypes, in_place, seed) -> None:
    vectors, weights = draw(n, m, dtypes, seed)
    expected = weighted_sum_reference(vectors, weights)
    others = [v.clone() for v in vectors[1:]]
    assert same_bits(weighted_sum(vectors, weights), expected)
    out = vectors[0] if in_place and vectors[0].dtype in BITS else torch.empty_like(expected)
    sum_module._sum_in_tiles(vectors, weights, out, tile)
    assert same_bits(out, expected)
    assert all(torch.equal(v, o) for v, o in zip(vectors[1:], others, strict=True)), "a neighbour's vector was changed"


def test_sum_beyond_one_tile_and_in_place() -> None:
    vectors, weights = draw(3, (1 << 16) + 3, (FP32,), 0)
    expected = weighted_sum_reference(vectors, weights)
    assert weighted_sum(vectors, weights, out=vectors[0]) is vectors[0]
    assert same_bits(vectors[0], expected)


def test_two_machines_that_average_get_the_same_bits() -> None:
    (a, b), _ = draw(2, 1000, (FP32,), 1)
    assert same_bits(weighted_sum([a, b], [0.5, 0.5]), weighted_sum([b, a], [0.5, 0.5]))


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(0, 150),
    tile=st.integers(1, 70),
    dtype=st.sampled_from([FP32, FP64]),
    decay=st.floats(0, 1),
    seed=st.integers(0, 1 << 32),
)
def test_swap_in_tiles_equals_the_reference(m, tile, dtype, decay, seed) -> None:
    vectors, numbers = draw(4, m, (dtype,), seed)
    x, y, mine, theirs = vectors
    options = {"decay": decay, "step": numbers[0], "momentum_step": numbers[1]}
    expected = swap_with_momentum_reference(x, y, mine, theirs, **options)
    here = [v.clone() for v in vectors]
    swap_with_momentum(*here, **options)
    numbers_of_kernel = ((1 + decay) / 2, (1 - decay) / 2, numbers[0], numbers[1])
    swap_module._swap_in_tiles(*vectors, numbers_of_kernel, tile)
    for got in (here, vectors):
        assert same_bits(got[0], expected[0])
        assert same_bits(got[1], expected[1])


def test_a_swap_alone_leaves_the_sum_of_both_ends() -> None:
    (x, y), _ = draw(2, 500, (FP64,), 2)
    ends = [[x.clone(), x.clone()], [y.clone(), y.clone()]]
    swap_with_momentum(*ends[0], x, y, decay=1.0, step=0.5, momentum_step=7.25)
    swap_with_momentum(*ends[1], y, x, decay=1.0, step=0.5, momentum_step=7.25)
    for part in (0, 1):
        torch.testing.assert_close(
            ends[0][part] + ends[1][part], x + y, rtol=0, atol=1e-9 * float((x.abs() + y.abs()).max())
        )
    assert not torch.equal(ends[0][1], x)


V = torch.zeros(4)


@pytest.mark.parametrize(
    ("vectors", "weights", "out", "message"),
    [
        ([], [], None, "0 vectors"),
        ([V], [1.0, 2.0], None, "1 vectors and 2 weights"),
        ([V], [float("nan")], None, "all must be finite"),
        ([V, V.double()], [1, 1], None, r"vectors\[1\] has dtype torch.float64"),
        ([V, torch.zeros(5)], [1, 1], None, r"vectors\[1\] has shape \(5,\)"),
        ([V, torch.zeros(4, device="meta")], [1, 1], None, "on meta"),
        ([torch.zeros(8)[::2]], [1], None, "not contiguous"),
        ([V], [1], torch.zeros(4, dtype=BF16), "out has dtype"),
        ([torch.zeros(4), V], [1, 1], V, r"shares memory with vectors\[1\]"),
    ],
)
def test_sum_refuses(vectors, weights, out, message) -> None:
    with pytest.raises(ValueError, match=message):
        weighted_sum(vectors, weights, out=out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decay": 1.5}, "decay is 1.5"),
        ({"step": float("inf")}, "must be finite"),
        ({"y": V.double()}, "y has dtype"),
        ({"mine": torch.zeros(3)}, "mine has shape"),
        ({"theirs": V}, "x shares memory with theirs"),
        ({"mine": torch.zeros(8)[::2]}, "not contiguous"),
    ],
)
def test_swap_refuses(change, message) -> None:
    arguments = {name: torch.zeros(4) for name in ("y", "mine", "theirs")}
    numbers = {"decay": 1.0, "step": 0.5, "momentum_step": 1.0}
    with pytest.raises(ValueError, match=message):
        swap_with_momentum(**{"x": V, **arguments, **numbers, **change})


@interpreted
def test_interpreted_kernels_equal_the_references() -> None:
    for seed, (n, m, dtypes) in enumerate(
        [(n, m, d) for n in (1, 2, 3, FUSED, FUSED + 1, 9, 10) for m, d in ((2049, (FP32, BF16)), (77, (FP16, FP32)))]
    ):
        vectors, weights = draw(n, m, dtypes, seed)
        storage = torch.full((m + 64,), 3.0)
        sum_module.launch(vectors, weights, storage[32 : 32 + m])
        assert same_bits(storage[32 : 32 + m], weighted_sum_reference(vectors, weights))
        assert (storage[:32] == 3).all(), "wrote before the output"
        assert (storage[32 + m :] == 3).all(), "wrote past the output"
    for m in (1, 1024, 1500):
        (x, y, mine, theirs), _ = draw(4, m, (FP32,), m)
        expected = swap_with_momentum_reference(x, y, mine, theirs, decay=0.3, step=0.5, momentum_step=7.26)
        swap_module.launch(x, y, mine, theirs, (0.65, 0.35, 0.5, 7.26))
        assert same_bits(x, expected[0])
        assert same_bits(y, expected[1])


@needs_compiler
@pytest.mark.parametrize("target", TARGETS)
def test_compile_wide_and_without_spills(target: str) -> None:
    vectors = {"v0": FP32, **{f"v{i}": BF16 for i in range(1, FUSED)}, "out": FP32}
    mixing = compile_ahead(
        sum_module.kernel,
        target,
        tensors=vectors,
        constants={"N": FUSED, "BLOCK": sum_module.BLOCK},
        multiples_of_16=list(vectors),
    )
    states = dict.fromkeys(("x", "y", "mine", "theirs"), FP32)
    swapping = compile_ahead(
        swap_module.kernel,
        target,
        tensors=states,
        constants={"BLOCK": swap_module.BLOCK},
        multiples_of_16=list(states),
    )
    for compiled, loads, stores in ((mixing, FUSED + 1, 2), (swapping, 4, 2)):
        assert (compiled.spilled, compiled.local_accesses) == (0, 0)
        assert compiled.wide_loads >= loads
        assert compiled.wide_stores >= stores
        assert compiled.fused == ()
        assert compiled.keeps_subnormals


@needs_gpu
def test_gpu_equals_the_references() -> None:
    for n, m in ((1, 1), (3, 100_003), (5, 4096), (9, 1 << 20)):
        vectors, weights = draw(n, m, (FP32, BF16), n)
        expected = weighted_sum_reference(vectors, weights)
        assert same_bits(weighted_sum([v.cuda() for v in vectors], weights).cpu(), expected)
    (x, y, mine, theirs), _ = draw(4, 100_003, (FP32,), 5)
    expected = swap_with_momentum_reference(x, y, mine, theirs, decay=0.3, step=0.5, momentum_step=7.26)
    here = [v.cuda() for v in (x, y, mine, theirs)]
    swap_with_momentum(*here, decay=0.3, step=0.5, momentum_step=7.26)
    assert same_bits(here[0].cpu(), expected[0])
    assert same_bits(here[1].cpu(), expected[1])
