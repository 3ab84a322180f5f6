"""sign_quantize: tiles on a CPU, the interpreted kernel, the compiled kernel and a real GPU against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_planes import Guarded, GuardedPlanes, assert_same_bits, floats, reference
from triton_aot import compile_ahead, needs_compiler
from triton_interpreter import interpreted

from thinwire.kernels import quantize_on_gpu
from thinwire.kernels.code_planes import decode_reference
from thinwire.kernels.sign_quantize import dequantize_sign, quantize_sign, quantize_sign_with_feedback


@settings(max_examples=120, deadline=None)
@given(numel=st.integers(0, 1500), block=st.sampled_from([8, 24, 64, 256, 1024]), seed=st.integers(0, 2**32))
def test_tiles_equal_the_reference(numel: int, block: int, seed: int) -> None:
    x, memory = floats(numel, seed), floats(numel, seed + 1) * 0.5
    planes = GuardedPlanes(numel, 1, block)
    bits, scales = quantize_sign(x, block=block, bits=planes.codes, scales=planes.scales)
    planes.check(reference(x, bits=1, block=block))
    decoded = Guarded(numel, torch.float32)
    dequantize_sign(bits, scales, block=block, numel=numel, out=decoded.plane)
    decoded.check(decode_reference(bits, scales, bits=1, block=block, numel=numel), "decoded")

    total = x + memory
    planes, error = GuardedPlanes(numel, 1, block), Guarded(numel, torch.float32)
    quantize_sign_with_feedback(x, memory, error.plane, block=block, bits=planes.codes, scales=planes.scales)
    planes.check(reference(total, bits=1, block=block))
    error.check(total - dequantize_sign(planes.codes, planes.scales, block=block, numel=numel), "error")


def test_many_tiles() -> None:
    x = floats(100_003, 1)
    bits, scales = quantize_sign(x, block=64)
    expected = reference(x, bits=1, block=64)
    assert_same_bits(bits, expected[0])
    assert_same_bits(scales, expected[1])


def test_layout_zeros_and_the_mean_of_a_part_of_a_block() -> None:
    x = torch.tensor([1.0, -1.0, 0.0, -0.0, 2.0, -3.0, 4.0, -5.0, 6.0, -2.0])
    bits, scales = quantize_sign(x, block=8)
    assert bits.tolist() == [0b01011101, 0b01]
    assert scales.tolist() == [2.0, 4.0]
    assert dequantize_sign(bits, scales, block=8, numel=10).tolist() == [2, -2, 2, 2, 2, -2, 2, -2, 4, -4]
    zeros, scale = quantize_sign(torch.zeros(3), block=8)
    assert zeros.tolist() == [7]
    assert scale.tolist() == [0.0]
    values = np.random.default_rng(0).standard_normal(1001, dtype=np.float32)
    packed, _ = quantize_sign(torch.from_numpy(values))
    assert np.array_equal(np.unpackbits(packed.numpy(), bitorder="little")[:1001], values >= 0)


def test_squared_error_is_what_the_mean_magnitude_gives() -> None:
    x = torch.randn(256 * 50, generator=torch.Generator().manual_seed(0))
    decoded = dequantize_sign(*quantize_sign(x), numel=x.numel())
    rows = x.double().view(-1, 256)
    expected = (rows.square().sum(1) - rows.abs().sum(1) ** 2 / 256).sum()
    assert abs((decoded.double() - x.double()).square().sum() / expected - 1) < 1e-6


def test_feedback_loses_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    memory, sent, total = (
        torch.zeros(1000),
        torch.zeros(1000, dtype=torch.double),
        torch.zeros(1000, dtype=torch.double),
    )
    for _ in range(30):
        gradient = torch.randn(1000, generator=generator)
        bits, scales = quantize_sign_with_feedback(gradient, memory, memory)
        sent += dequantize_sign(bits, scales, numel=1000)
        total += gradient
    assert (sent + memory - total).abs().max() < 1e-4


@pytest.mark.parametrize("poison", [torch.inf, -torch.inf, torch.nan])
def test_a_block_that_is_not_finite_shows_in_its_scale_alone(poison: float) -> None:
    x = torch.ones(1000)
    x[300] = poison
    _, scales = quantize_sign(x)
    assert scales.isfinite().tolist() == [True, False, True, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": 0}, "block is 0"),
        ({"x": torch.zeros(5, dtype=torch.int32)}, "x is contiguous, torch.int32"),
        ({"bits": torch.zeros(2, dtype=torch.uint8)}, r"codes is .* of shape \(2,\)"),
    ],
)
def test_refuses(change: dict, message: str) -> None:
    arguments = {"x": torch.zeros(5), **change}
    with pytest.raises(ValueError, match=message):
        quantize_sign(arguments.pop("x"), **arguments)


@interpreted
def test_interpreted_kernel_equals_the_reference() -> None:
    for seed, (block, feedback, numel) in enumerate(
        [(256, False, 2048), (256, True, 2049), (16, True, 1999), (4096, False, 5001), (64, True, 3)]
    ):
        x, memory = floats(numel, seed), floats(numel, seed + 100) * 0.5
        planes, error = GuardedPlanes(numel, 1, block), Guarded(numel, torch.float32)
        quantize_on_gpu.launch_quantize(
            x, (memory, error.plane) if feedback else None, planes.codes, planes.scales, bits=1, block=block
        )
        total = x + memory if feedback else x
        expected = reference(total, bits=1, block=block)
        planes.check(expected)
        if feedback:
            error.check(total - decode_reference(*expected, bits=1, block=block, numel=numel), "error")


@needs_compiler
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])  # the same kernel with 8 bits is compiled for all
def test_compiles_wide_and_without_spills(target: str) -> None:
    compiled = compile_ahead(
        quantize_on_gpu.quantize_kernel,
        target,
        tensors={
            "x": torch.float32,
            "memory": torch.float32,
            "next_memory": torch.float32,
            "codes": torch.uint8,
            "scales": torch.float32,
        },
        constants=quantize_on_gpu.quantize_constants(1, 256, feedback=True),
        multiples_of_16=["x", "memory", "next_memory", "codes", "scales"],
    )
    assert compiled.spilled == compiled.local_accesses == 0
    assert compiled.registers <= 64, "fewer than all lanes of a processor could be resident"
    assert compiled.wide_loads >= 4
    assert compiled.wide_stores >= 2
    assert len(compiled.fused) == 5 * compiled.assembly.count("v_div_fixup_f32")  # AMD divides correctly by them
    assert compiled.keeps_subnormals


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")
def test_gpu_equals_the_reference() -> None:
    for numel, block in [(1, 256), (2048, 16), (100_003, 256), (1 << 20, 4096), (999, 24)]:
        x, memory = floats(numel, numel), floats(numel, numel + 1)
        expected = reference(x + memory, bits=1, block=block)
        error = torch.empty(numel, device="cuda")
        bits, scales = quantize_sign_with_feedback(x.cuda(), memory.cuda(), error, block=block)
        assert_same_bits(bits.cpu(), expected[0])
        assert_same_bits(scales.cpu(), expected[1])
        assert_same_bits(error.cpu(), x + memory - dequantize_sign(bits, scales, block=block, numel=numel).cpu())
