"""bit_pack: NumPy, the interpreted kernels, the compiled kernels and a real GPU against the bit by bit reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_aot import TARGETS, compile_ahead, needs_compiler
from triton_interpreter import interpreted

from thinwire.kernels import bit_pack as module
from thinwire.kernels.bit_pack import (
    WIDEST,
    pack_bits,
    pack_bits_reference,
    packed_bytes,
    unpack_bits,
    unpack_bits_reference,
)

DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


def numbers(count: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """All bits random, so that signs and bits beyond the width are there too."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randint(-(2**62), 2**62, (count,), generator=generator)
    return wide > 0 if dtype == torch.bool else wide.to(dtype)


def cut(values: Tensor, width: int) -> Tensor:
    return (values.to(torch.int64) & ((1 << width) - 1)).to(torch.int32)


@settings(max_examples=300, deadline=None)
@given(
    count=st.integers(0, 70),
    width=st.integers(1, WIDEST),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
    more=st.integers(0, 9),
)
def test_equals_the_reference_and_returns(count: int, width: int, dtype: torch.dtype, seed: int, more: int) -> None:
    values = numbers(count, dtype, seed)
    packed = pack_bits(values, width)
    assert packed.dtype == torch.uint8
    assert len(packed) == packed_bytes(count, width) == (count * width + 7) // 8
    assert torch.equal(packed, pack_bits_reference(values, width))
    longer = torch.cat([packed, torch.full((more,), 255, dtype=torch.uint8)])
    expected = cut(values, width)
    assert torch.equal(unpack_bits(longer, width, count), expected)
    assert torch.equal(unpack_bits_reference(packed, width, count), expected)


def test_every_width_at_length() -> None:
    for width in range(1, WIDEST + 1):
        values = numbers(4099, torch.int32, width)
        assert torch.equal(unpack_bits(pack_bits(values, width), width, len(values)), cut(values, width))


def test_the_lowest_bits_come_first() -> None:
    assert pack_bits(torch.tensor([1, 2, 7]), 3).tolist() == [0b11_010_001, 0b1]
    assert pack_bits(torch.tensor([0xABC, 0x123]), 12).tolist() == [0xBC, 0x3A, 0x12]
    assert pack_bits(torch.tensor([True, False, True]), 1).tolist() == [5]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack_bits(torch.zeros(3), 4), "torch.float32"),
        (lambda: pack_bits(torch.zeros(3, 3, dtype=torch.int32), 4), r"shape \(3, 3\)"),
        (lambda: pack_bits(torch.zeros(3, dtype=torch.int32), 0), "width is 0 bits; it must be 1 to 25"),
        (lambda: pack_bits(torch.zeros(3, dtype=torch.int32), 26), "width is 26"),
        (lambda: unpack_bits(torch.zeros(3, dtype=torch.uint8), 26, 1), "width is 26"),
        (lambda: unpack_bits(torch.zeros(3, dtype=torch.int8), 4, 1), "torch.int8"),
        (lambda: unpack_bits(torch.zeros(6, dtype=torch.uint8)[::2], 4, 1), "contiguous"),
        (lambda: unpack_bits(torch.zeros(3, dtype=torch.uint8), 5, 5), "count is 5, but 3 bytes hold 0 to 4 numbers"),
        (lambda: unpack_bits(torch.zeros(3, dtype=torch.uint8), 5, -1), "count is -1"),
    ],
)
def test_refuses(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@interpreted
def test_interpreted_kernels_equal_the_reference() -> None:
    cases = [(width, 2 * module.BLOCK + 5, torch.int32) for width in (1, 2, 7, 12, 25)]
    cases += [(width, count, torch.int64) for width, count in itertools.product((3, 16, 24), (1, 31, module.BLOCK))]
    cases += [(9, 100, torch.int16), (5, 100, torch.uint8), (1, 100, torch.bool)]
    for width, count, dtype in cases:
        values = numbers(count, dtype, width)
        packed = pack_bits_reference(values, width)
        assert torch.equal(module.launch_pack(values, width), packed)
        assert torch.equal(module.launch_unpack(packed, width, count), cut(values, width))


@needs_compiler
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("width", [2, 12])
def test_compiles_without_spills_and_stores_wide(target: str, width: int) -> None:
    for kernel, tensors in (
        (module.pack_kernel, {"values": torch.int32, "words": torch.int32}),
        (module.unpack_kernel, {"data": torch.uint8, "values": torch.int32}),
    ):
        compiled = compile_ahead(
            kernel, target, tensors=tensors, constants=module.compile_time(width), multiples_of_16=list(tensors)
        )
        assert compiled.spilled == compiled.local_accesses == 0
        assert compiled.registers <= 128
        assert compiled.wide_stores >= module.BLOCK // (4 * 32 * kernel.warps)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")
def test_gpu_equals_the_reference() -> None:
    for width, count, dtype in itertools.product((1, 2, 5, 12, 17, 25), (0, 1, 1000, 100_003), DTYPES):
        values = numbers(count, dtype, width)
        packed = pack_bits(values.cuda(), width)
        assert torch.equal(packed.cpu(), pack_bits_reference(values, width))
        assert torch.equal(unpack_bits(packed, width, count).cpu(), cut(values, width))
