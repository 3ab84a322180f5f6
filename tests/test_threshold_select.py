"""threshold_select: NumPy, PyTorch, interpreted and compiled kernels and a real GPU against a stable sort."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_aot import TARGETS, compile_ahead, needs_compiler
from triton_interpreter import interpreted

from thinwire.kernels import select_on_cpu, select_on_gpu
from thinwire.kernels.threshold_select import (
    sampled_threshold,
    select_above,
    select_above_reference,
    select_with_feedback,
    top_k,
    top_k_reference,
)

KINDS = ("normal", "heavy", "tied", "sparse", "zero", "equal", "special", "one row large")


def numbers(kind: str, n: int, seed: int = 0) -> Tensor:
    """Tensors that are easy and hard to select from, both signs of zero among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator)
    chance = torch.rand(n, generator=generator)
    if kind == "special":
        values = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45, 3.4e38, -0.0, 1.0])
        return values[(chance * len(values)).long()]
    return {
        "normal": x,
        "heavy": x**5,
        "tied": (2 * x).round(),
        "sparse": x * (chance < 0.004),
        "zero": x * 0.0,
        "equal": x.sign() * 3,
        "one row large": x * (1 + 99 * (torch.arange(n) < n // 50)),  # a sample may well miss what matters
    }[kind]


def assert_same(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype
        bits = torch.int64 if ours.dtype == torch.int64 else torch.int32
        assert torch.equal(ours.cpu().view(bits), theirs.view(bits))


@settings(max_examples=120, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    n=st.one_of(st.integers(0, 300), st.sampled_from([8192, 8193, 32768, 32769, 70000])),
    share=st.sampled_from([0.0, 0.001, 0.01, 0.12, 0.5, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_top_k_equals_a_stable_sort_on_every_path(kind: str, n: int, share: float, seed: int) -> None:
    x = numbers(kind, n, seed)
    k = int(share * n)
    expected = top_k_reference(x, k)
    assert_same(top_k(x, k), expected)
    assert torch.equal(select_on_gpu.select_top(x, k), expected[0])
    assert (expected[1] != 0).all()
    assert len(expected[0]) == min(k, int((x != 0).sum()))


def test_top_k_finds_what_the_sample_misses() -> None:
    x = torch.zeros(1 << 17)
    k = 5000
    stride, rank = select_on_cpu.sample_plan(k, len(x))
    x[::stride] = 100.0  # the whole sample and little else, so that its bound leaves fewer than k
    x[1::stride] = torch.arange(1.0, len(x[1::stride]) + 1) / 100
    assert rank < len(x[::stride]) < k
    assert select_on_cpu.sample_pays(k, len(x))
    assert_same(top_k(x, k // 2), top_k_reference(x, k // 2))
    x = torch.rand(1 << 17)
    x[::stride] = 100.0
    assert_same(top_k(x, k), top_k_reference(x, k))
    assert torch.equal(select_on_gpu.select_top(x, k), top_k_reference(x, k)[0])


def test_of_equal_magnitudes_the_lower_indices_are_kept_whatever_their_signs() -> None:
    indices, values = top_k(torch.tensor([1.0, -2.0, 0.0, 2.0, -2.0, 3.0]), 3)
    assert indices.tolist() == [1, 3, 5]
    assert values.tolist() == [-2.0, 2.0, 3.0]


@settings(max_examples=80, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    n=st.one_of(st.integers(1, 300), st.just(40000)),
    threshold=st.sampled_from([0.0, 1e-45, 0.5, 1.0, 3.0, 1e9, 1e39, float("inf")]),
    share=st.sampled_from([None, 0.0, 0.02, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_select_above_equals_the_reference(kind, n, threshold, share, seed) -> None:
    x = numbers(kind, n, seed)
    capacity = None if share is None else int(share * n)
    expected = select_above_reference(x, threshold, capacity)
    assert_same(select_above(x, threshold, capacity), expected)
    lower = max(int(torch.tensor(threshold, dtype=torch.float32).view(torch.int32)), 1)
    assert torch.equal(select_on_gpu.select_reaching(x, lower, capacity), expected[0])


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from([kind for kind in KINDS if kind != "special"]),
    n=st.one_of(st.integers(1, 300), st.sampled_from([33000, 70000])),
    share=st.sampled_from([0.0, 0.01, 0.3]),
    threshold=st.sampled_from([None, 0.0, 2.0]),
    seed=st.integers(0, 2**32),
)
def test_feedback_equals_add_select_and_clear(kind, n, share, threshold, seed) -> None:
    gradient, memory = numbers(kind, n, seed), numbers("tied", n, seed + 1)
    before = gradient.clone(), memory.clone()
    k = int(share * n)
    left = gradient + memory
    expected = select_above_reference(left, threshold or 0.0, k)
    left[expected[0]] = 0.0
    next_memory = torch.full((n,), torch.nan)
    assert_same(select_with_feedback(gradient, memory, next_memory, k=k, threshold=threshold), expected)
    assert torch.equal(next_memory.view(torch.int32), left.view(torch.int32))
    assert torch.equal(gradient, before[0])
    assert torch.equal(memory, before[1])
    sums = torch.full((n,), torch.nan)
    chosen = select_on_gpu.select_top(sums, k, (gradient, memory))
    assert torch.equal(chosen, top_k_reference(gradient + memory, k)[0])
    assert torch.equal(sums.view(torch.int32), (gradient + memory).view(torch.int32))


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["normal", "heavy", "sparse", "one row large", "zero"]),
    n=st.sampled_from([10, 1000, 20000, 200_003]),
    share=st.sampled_from([0.001, 0.01, 0.3]),
    seed=st.integers(0, 2**32),
    key=st.integers(0, 2**63 - 1),
)
def test_sampled_threshold_is_reached_by_about_k(kind, n, share, seed, key) -> None:
    x = numbers(kind, n, seed)
    k = max(1, int(share * n))
    threshold = sampled_threshold(x, k, key)
    count = len(select_above(x, threshold)[0])
    nonzero = int((x != 0).sum())
    assert count <= 1.3 * k
    assert count >= min(0.8 * k, nonzero)
    assert threshold == sampled_threshold(x, k, key)


def test_parameters_leave_no_graph() -> None:
    x = torch.nn.Parameter(torch.randn(50))
    assert not top_k(x, 5)[1].requires_grad
    next_memory = torch.empty(50)
    assert not select_with_feedback(x, torch.zeros(50), next_memory, k=5)[1].requires_grad


FLAT = torch.zeros(4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: top_k(FLAT.double(), 1), "torch.float64.*must be fp32"),
        (lambda: top_k(FLAT.view(2, 2), 1), r"shape \(2, 2\)"),
        (lambda: top_k(torch.zeros(8)[::2], 1), r"stride \(2,\)"),
        (lambda: top_k(FLAT, 5), "k is 5; for 4 elements it must be 0 to 4"),
        (lambda: top_k(FLAT, -1), "k is -1"),
        (lambda: sampled_threshold(FLAT, 0, 1), "k is 0; for 4 elements it must be 1 to 4"),
        (lambda: select_above(FLAT, -1.0), "threshold is -1.0; it must be 0 or more"),
        (lambda: select_above(FLAT, float("nan")), "threshold is nan"),
        (lambda: select_above(FLAT, 1.0, 9), "k is 9"),
        (lambda: select_with_feedback(FLAT, FLAT, torch.zeros(4)), "neither k nor threshold"),
        (lambda: select_with_feedback(FLAT, torch.zeros(3), torch.zeros(4), k=1), "must have one shape and device"),
        (lambda: select_with_feedback(FLAT, FLAT.to("meta"), torch.zeros(4), k=1), "must have one shape and device"),
    ],
)
def test_refuses(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@interpreted
def test_interpreted_kernels_equal_the_reference() -> None:
    block = select_on_gpu.BLOCK
    with mock.patch.object(select_on_gpu, "reaching", select_on_gpu.launch):
        for seed, n in enumerate((1, block - 1, block, block + 1, 3 * block + 7)):
            for kind in ("tied", "sparse", "special", "zero"):
                x = numbers(kind, n, seed)
                k = -(-n // 50)
                assert torch.equal(select_on_gpu.select_top(x, k), top_k_reference(x, k)[0])
            gradient, memory = numbers("heavy", n, seed), numbers("tied", n, seed + 1)
            sums = torch.full((n + 64,), torch.nan)
            expected, _ = top_k_reference(gradient + memory, k)
            assert torch.equal(select_on_gpu.select_top(sums[:n], k, (gradient, memory)), expected)
            assert torch.equal(sums[:n], gradient + memory)
            assert sums[n:].isnan().all(), "wrote past the sums"


@needs_compiler
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("add", [False, True])
def test_counting_compiles_wide_and_without_spills(target: str, add: bool) -> None:
    floats = ("first", "second", "sums")
    compiled = compile_ahead(
        select_on_gpu.count_kernel,
        target,
        tensors={**dict.fromkeys(floats, torch.float32), "lower": torch.int32, "counts": torch.int32},
        constants={"ADD": int(add), "BLOCK": select_on_gpu.BLOCK},
        multiples_of_16=[*floats, "lower", "counts"],
    )
    per_lane = select_on_gpu.BLOCK // (4 * 32 * select_on_gpu.count_kernel.warps)  # of 16 bytes
    assert compiled.spilled == compiled.local_accesses == 0
    assert compiled.registers <= 64
    assert compiled.keeps_subnormals
    assert compiled.wide_loads >= (2 if add else 1) * per_lane
    assert compiled.wide_stores >= per_lane * add


@needs_compiler
@pytest.mark.parametrize("target", TARGETS)
def test_writing_compiles_wide_and_without_spills(target: str) -> None:
    types = {"values": torch.float32, "lower": torch.int32, "stops": torch.int64, "counts": torch.int32}
    types |= {"indices": torch.int64, "magnitudes": torch.int32}
    compiled = compile_ahead(
        select_on_gpu.write_kernel,
        target,
        tensors=types,
        constants={"BLOCK": select_on_gpu.BLOCK},
        multiples_of_16=list(types),
    )
    assert compiled.spilled == compiled.local_accesses == 0
    assert compiled.registers <= 128
    assert compiled.wide_loads >= select_on_gpu.BLOCK // (4 * 32 * select_on_gpu.write_kernel.warps)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")
def test_gpu_equals_the_reference() -> None:
    for seed, n in enumerate((1, 4096, 4097, 100_003, 1 << 20)):
        for kind in KINDS:
            x = numbers(kind, n, seed)
            for k in {1, n // 100, n // 3}:
                assert_same(top_k(x.cuda(), k), top_k_reference(x, k))
                next_memory = torch.empty(n, device="cuda")
                selected = select_with_feedback(x.cuda(), torch.zeros(n, device="cuda"), next_memory, k=k)
                assert_same(selected, top_k_reference(x + 0.0, k))
                assert (next_memory[selected[0]] == 0).all()
