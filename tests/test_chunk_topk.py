"""chunk_topk: NumPy, PyTorch, the interpreted kernel, the compiled kernel and a real GPU against a stable sort."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_aot import TARGETS, compile_ahead, needs_compiler
from triton_interpreter import interpreted

from thinwire.kernels import chunk_topk as module
from thinwire.kernels.chunk_topk import chunk_top_k, chunk_top_k_reference


def numbers(kind: str, n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x, chance = torch.randn(n, generator=generator), torch.rand(n, generator=generator)
    if kind == "special":
        largest_nan = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32).item()
        values = torch.tensor([torch.inf, -torch.inf, torch.nan, largest_nan, 1e-45, -1e-45, 3.4e38, -0.0, 1.0])
        return values[(chance * len(values)).long()]
    return {
        "normal": x,
        "wide": x * 10 ** (60 * chance - 30),
        "tied": (2 * x).round(),
        "sparse": x * (chance < 0.01),
        "zero": x * 0.0,
        "equal": x.sign() * 3,
    }[kind]


KINDS = ("normal", "wide", "tied", "sparse", "zero", "equal", "special")


def assert_same(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        assert torch.equal(ours.cpu().view(torch.int32), theirs.view(torch.int32))


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    n=st.one_of(st.integers(0, 300), st.sampled_from([4096, 20000])),
    chunk=st.one_of(st.integers(1, 40), st.sampled_from([64, 4096, 5000])),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
def test_equals_a_stable_sort_on_every_path(kind: str, n: int, chunk: int, share: float, seed: int) -> None:
    x = numbers(kind, n, seed)
    k = max(1, int(share * chunk))
    expected = chunk_top_k_reference(x, k, chunk=chunk)
    assert expected[0].shape == (-(-n // chunk), k)
    assert_same(chunk_top_k(x, k, chunk=chunk), expected)
    whole = n // chunk
    if whole:
        in_torch = module._of_rows(x[: whole * chunk].view(whole, chunk), k)
        assert_same(in_torch, (expected[0][:whole], expected[1][:whole]))


def test_a_short_last_chunk_ends_with_zeros() -> None:
    places, values = chunk_top_k(torch.tensor([1.0, -5.0, 2.0, 0.0, 7.0]), 2, chunk=4)
    assert places.tolist() == [[1, 2], [0, 1]]
    assert values.tolist() == [[-5.0, 2.0], [7.0, 0.0]]
    assert not chunk_top_k(torch.nn.Parameter(torch.randn(9)), 2, chunk=4)[1].requires_grad


@pytest.mark.parametrize(
    ("x", "k", "chunk", "message"),
    [
        (torch.zeros(4, dtype=torch.float16), 1, 4, "torch.float16.*must be fp32"),
        (torch.zeros(2, 2), 1, 4, r"shape \(2, 2\)"),
        (torch.zeros(8)[::2], 1, 4, r"stride \(2,\)"),
        (torch.zeros(4), 0, 4, "k is 0; for chunks of 4 elements it must be 1 to 4"),
        (torch.zeros(4), 5, 4, "k is 5"),
        (torch.zeros(4), 1, 0, "chunk is 0"),
    ],
)
def test_refuses(x: Tensor, k: int, chunk: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chunk_top_k(x, k, chunk=chunk)


@interpreted
def test_interpreted_kernel_equals_the_reference() -> None:
    shapes = [(3 * 256 + 5, 8, 256), (100, 5, 33), (7, 3, 3), (2, 1, 1)]
    cases = [(kind, 5000, 64, 4096) for kind in KINDS]
    cases += [(kind, *shapes[i % len(shapes)]) for i, kind in enumerate(2 * KINDS)]
    for seed, (kind, n, k, chunk) in enumerate(cases):
        x = numbers(kind, n, seed)
        assert_same(module.launch(x, k, chunk), chunk_top_k_reference(x, k, chunk=chunk))


@needs_compiler
@pytest.mark.parametrize(
    ("target", "chunk"), [*((target, 4096) for target in TARGETS), ("sm_90", module.WIDEST), ("gfx942", module.WIDEST)]
)
def test_compiles_wide_and_without_spills(target: str, chunk: int) -> None:
    compiled = compile_ahead(
        module.kernel,
        target,
        tensors={"x": torch.float32, "places": torch.int32, "values": torch.float32},
        constants=module.compile_time(64, chunk),
        multiples_of_16=["x", "places", "values"],
    )
    assert compiled.spilled == compiled.local_accesses == 0
    assert compiled.registers <= 128
    assert compiled.wide_loads >= chunk // (4 * 32 * module.kernel.warps)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")
def test_gpu_equals_the_reference() -> None:
    for seed, kind in enumerate(KINDS):
        for n, k, chunk in ((3 * 256 + 5, 8, 256), (100_003, 64, 4096), (50_000, 100, 10_000), (70, 3, 3)):
            x = numbers(kind, n, seed)
            assert_same(chunk_top_k(x.cuda(), k, chunk=chunk), chunk_top_k_reference(x, k, chunk=chunk))
