"""cast_reduce: PyTorch in tiles, the interpreted kernel, the compiled kernel and a real GPU against the reference."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_aot import TARGETS, compile_ahead, needs_compiler
from triton_interpreter import interpreted

from thinwire.kernels import cast_reduce as module
from thinwire.kernels.cast_reduce import DTYPES, cast_reduce, cast_reduce_reference

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
FP32, BF16, FP16 = DTYPES


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal to the last bit, the sign of zero included; where one is NaN so is the other, whatever its bits."""
    assert actual.dtype == expected.dtype
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    bits = BITS[actual.dtype]
    wrong = (actual.view(bits) != expected.view(bits)) & ~nan
    where = wrong.nonzero().flatten()[:5]
    assert not wrong.any(), f"at {where.tolist()}: {actual[where].tolist()}, expected {expected[where].tolist()}"


def any_floats(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A third ordinary numbers, a third random bits (NaN, infinite and subnormal ones too), a third special values."""
    info = torch.finfo(dtype)
    limits = [info.max, -info.max, info.tiny, -info.tiny, info.tiny / 4, 1 + info.eps, torch.inf, -torch.inf, torch.nan]
    ties = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 2**-24, 65504.0]  # between two bf16 or two fp16 numbers
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, *limits, *ties], dtype=dtype)
    ordinary = torch.randn(shape, generator=generator).to(dtype)
    size = info.bits - 1
    random = torch.randint(-(2**size), 2**size, shape, generator=generator).to(BITS[dtype]).view(dtype)
    chosen = special[torch.randint(len(special), shape, generator=generator)]
    kind = torch.randint(3, shape, generator=generator)
    return torch.where(kind == 0, ordinary, torch.where(kind == 1, random, chosen))


def rows(n: int, m: int, dtype: torch.dtype, *, gap: int = 0, seed: int = 0) -> Tensor:
    """(n, m) payloads whose rows are m + gap apart, NaN in between."""
    storage = torch.full((n, m + gap), torch.nan, dtype=dtype)
    storage[:, :m] = any_floats((n, m), dtype, torch.Generator().manual_seed(seed))
    return storage[:, :m]


class Guarded:
    """An output with known numbers on both sides, to see whether anything else was written."""

    def __init__(self, m: int, dtype: torch.dtype) -> None:
        self.storage = torch.full((m + 64,), 3.0, dtype=dtype)
        self.out = self.storage[32 : 32 + m]

    def check(self, expected: Tensor) -> None:
        assert_same_bits(self.out, expected)
        assert (self.storage[:32] == 3).all(), "wrote before the output"
        assert (self.storage[32 + len(expected) :] == 3).all(), "wrote past the output"


def test_sums_in_rank_order_in_fp32_and_rounds_once() -> None:
    out = torch.empty(1)
    ordered = torch.tensor([[1e8], [1.0], [-1e8]])
    assert cast_reduce(ordered, out=out).item() == 0.0  # any other order gives 1
    large = torch.full((4, 1), 60000.0, dtype=FP16)
    half = torch.empty(1, dtype=FP16)
    assert cast_reduce(large, scale=0.25, out=half).item() == 60000.0  # a sum in fp16 would be infinite
    ties = torch.tensor([[1.0, 1.0, 1.0], [2**-8, 3 * 2**-8, 2**-8 + 2**-20]])
    rounded = cast_reduce(ties, out=torch.empty(3, dtype=BF16))
    assert rounded.tolist() == [1.0, 1 + 2**-6, 1 + 2**-7]  # to even, to even, up
    thirds = cast_reduce(torch.ones(3, 1), scale=1 / 3, out=out).item()
    assert thirds == torch.tensor(3.0).mul(torch.tensor(1 / 3)).item()


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(1, 20),
    m=st.integers(0, 200),
    gap=st.integers(0, 3),
    tile=st.integers(1, 70),
    source=st.sampled_from(DTYPES),
    target=st.sampled_from(DTYPES),
    scale=st.sampled_from([1.0, 0.5, 1 / 3, 1 / 7, -2.0, 0.0, 1e-30, 1e30]),
    seed=st.integers(0, 2**32),
)
def test_tiles_equal_the_reference(n, m, gap, tile, source, target, scale, seed) -> None:
    payloads = rows(n, m, source, gap=gap, seed=seed)
    before = payloads.clone()
    expected = cast_reduce_reference(payloads, scale=scale, dtype=target)
    public, tiled = Guarded(m, target), Guarded(m, target)
    assert cast_reduce(payloads, scale=scale, out=public.out) is public.out
    module._reduce_in_tiles(payloads, module._checked_scale(scale), tiled.out, tile)
    public.check(expected)
    tiled.check(expected)
    assert torch.equal(payloads.view(BITS[source]), before.view(BITS[source])), "the payloads were changed"


def test_more_than_one_tile_of_the_public_function() -> None:
    payloads = rows(3, (1 << 19) + 5, BF16)
    guarded = Guarded(payloads.shape[1], BF16)
    cast_reduce(payloads, scale=1 / 3, out=guarded.out)
    guarded.check(cast_reduce_reference(payloads, scale=1 / 3, dtype=BF16))


def test_parameters_leave_no_graph() -> None:
    payloads = torch.nn.Parameter(torch.randn(2, 5))
    assert not cast_reduce(payloads, out=torch.empty(5)).requires_grad


@pytest.mark.parametrize(
    ("payloads", "out", "scale", "message"),
    [
        (torch.zeros(2, 4, dtype=torch.float64), torch.zeros(4), 1.0, "payloads has dtype torch.float64"),
        (torch.zeros(2, 4), torch.zeros(4, dtype=torch.int32), 1.0, "out has dtype torch.int32"),
        (torch.zeros(4), torch.zeros(4), 1.0, r"payloads has shape \(4,\)"),
        (torch.zeros(0, 4), torch.zeros(4), 1.0, r"payloads has shape \(0, 4\).*n >= 1"),
        (torch.zeros(2, 4), torch.zeros(5), 1.0, r"out has shape \(5,\).*must be \(4,\)"),
        (torch.zeros(2, 4), torch.zeros(4, device="meta"), 1.0, "payloads is on cpu but out is on meta"),
        (torch.zeros(4, 2).T, torch.zeros(4), 1.0, "payloads has stride 2 within a row"),
        (torch.zeros(4).expand(2, 4), torch.zeros(4), 1.0, "rows of 4 elements with stride 0"),
        (torch.zeros(2, 4), torch.zeros(8)[::2], 1.0, "out has stride 2"),
        (torch.zeros(2, 4), torch.zeros(4), float("nan"), "scale is nan"),
        (torch.zeros(2, 4), torch.zeros(4), 1e39, "scale is 1e[+]39.*finite fp32"),
    ],
)
def test_refuses(payloads: Tensor, out: Tensor, scale: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cast_reduce(payloads, scale=scale, out=out)


@given(offset=st.integers(0, 36), m=st.integers(1, 5), gap=st.integers(0, 5), first=st.integers(0, 10))
@settings(deadline=None)
def test_out_may_lie_between_the_payloads_but_not_on_them(offset: int, m: int, gap: int, first: int) -> None:
    storage = torch.zeros(48)
    payloads = storage[first:].as_strided((3, m), (m + gap, 1), first)
    out = storage[offset : offset + m]
    touched = torch.zeros(48, dtype=torch.bool)
    touched.as_strided((3, m), (m + gap, 1), first).fill_(True)
    if touched[offset : offset + m].any():
        with pytest.raises(ValueError, match="shares memory"):
            cast_reduce(payloads, out=out)
    else:
        cast_reduce(payloads, out=out)


def test_needs_no_triton_on_a_cpu() -> None:
    program = (
        "import sys; sys.modules['triton'] = None; import torch\n"
        "from thinwire.kernels.cast_reduce import cast_reduce\n"
        "assert cast_reduce(torch.ones(2, 3), out=torch.empty(3)).tolist() == [2, 2, 2]"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@interpreted
def test_interpreted_kernel_equals_the_reference() -> None:
    every_dtype = [(3, 2051, *pair) for pair in itertools.product(DTYPES, DTYPES)]
    every_size = [(2, m, BF16, BF16) for m in (1, 2047, 2048, 2049, 4096)]
    every_count = [(n, 77, BF16, FP32) for n in (1, 2, 15, 16, 17, 40)] + [(n, 2048, FP16, FP32) for n in (1, 16, 19)]
    for seed, (n, m, source, target) in enumerate(every_dtype + every_size + every_count):
        payloads = rows(n, m, source, gap=seed % 3, seed=seed)
        guarded = Guarded(m, target)
        module.launch(payloads, module._checked_scale(1 / 3), guarded.out)
        guarded.check(cast_reduce_reference(payloads, scale=1 / 3, dtype=target))


@needs_compiler
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("n", "source", "out"), [(4, BF16, BF16), (16, FP16, FP32), (17, FP32, FP32)], ids=str)
def test_compiles_wide_and_without_spills(target: str, n: int, source: torch.dtype, out: torch.dtype) -> None:
    constants = module.compile_time(n)
    compiled = compile_ahead(
        module.kernel,
        target,
        tensors={"payloads": source, "out": out},
        constants=constants,
        multiples_of_16=["payloads", "out", "row_stride"],
    )
    lanes = 32 * module.kernel.warps
    assert compiled.spilled == compiled.local_accesses == 0
    assert compiled.registers <= 128, "fewer than half of the lanes of a processor could be resident"
    # Lanes hold 16 bytes of what they load and of what they store: elements change lanes where the sizes differ.
    assert compiled.shared_bytes == (0 if source.itemsize == out.itemsize else module.BLOCK * out.itemsize)
    assert compiled.fused == ()
    assert compiled.keeps_subnormals
    assert compiled.wide_loads >= constants["UNROLLED"] * module.BLOCK * source.itemsize // (16 * lanes)
    assert compiled.wide_stores >= module.BLOCK * out.itemsize // (16 * lanes)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")


@needs_gpu
def test_gpu_equals_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(1, 1), (2, 2047), (3, 2048), (4, 100_003), (16, 4096), (17, 4099), (40, 33)]
    for seed, ((n, m), source, target) in enumerate(itertools.product(shapes, DTYPES, DTYPES)):
        payloads = rows(n, m, source, gap=seed % 17, seed=seed)
        expected = cast_reduce_reference(payloads, scale=1 / 3, dtype=target)
        on_gpu = payloads.cuda()
        assert_same_bits(
            cast_reduce(on_gpu, scale=1 / 3, out=torch.empty(m, dtype=target, device="cuda")).cpu(), expected
        )
    monkeypatch.setattr(module, "triton_is_installed", lambda: False)
    with pytest.warns(RuntimeWarning, match="Triton is not installed"):
        without = cast_reduce(on_gpu, scale=1 / 3, out=torch.empty(m, dtype=target, device="cuda"))
    assert_same_bits(without.cpu(), expected)


@needs_gpu
def test_gpu_reaches_beyond_32_bit_offsets() -> None:
    m = 2**31 + 5
    if torch.cuda.mem_get_info()[0] < 3 * 2 * m:
        pytest.skip("needs 13 GB of free GPU memory")
    payloads = torch.ones(1, m, dtype=BF16, device="cuda")
    out = torch.zeros(m, dtype=BF16, device="cuda")
    cast_reduce(payloads, scale=2.0, out=out)
    assert (out[-100:] == 2).all()
    apart = payloads.view(-1).as_strided((2, 5), (2**31, 1))
    assert (cast_reduce(apart, out=out[:5]) == 2).all()
