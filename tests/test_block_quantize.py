"""block_quantize: tiles on a CPU, the interpreted kernel, the compiled kernel and a real GPU against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_planes import Guarded, GuardedPlanes, assert_same_bits, floats, reference
from triton_aot import TARGETS, compile_ahead, needs_compiler
from triton_interpreter import interpreted

from thinwire.kernels import code_planes, quantize_on_gpu
from thinwire.kernels.all_finite import all_finite
from thinwire.kernels.block_quantize import BITS, dequantize, quantize, quantize_with_feedback
from thinwire.kernels.code_planes import decode_reference, tiles, unpack_reference

LEVELS = {8: 127, 4: 7, 2: 1}


@settings(max_examples=150, deadline=None)
@given(
    numel=st.integers(0, 1500),
    bits=st.sampled_from(BITS),
    block=st.sampled_from([8, 24, 64, 256, 1024]),
    rounding=st.sampled_from(["nearest", "stochastic"]),
    key=st.integers(0, 2**64 - 1),
    offset=st.integers(0, 2**40),
    seed=st.integers(0, 2**32),
)
def test_tiles_equal_the_reference(numel, bits, block, rounding, key, offset, seed) -> None:
    options = {"bits": bits, "block": block, "rounding": rounding, "key": key, "offset": offset}
    x, memory = floats(numel, seed), floats(numel, seed + 1) * 0.5
    before = x.clone()
    planes = GuardedPlanes(numel, bits, block)
    codes, scales = quantize(x, codes=planes.codes, scales=planes.scales, **options)
    planes.check(reference(x, **options))
    assert_same_bits(x, before, "the input was changed")
    decoded = Guarded(numel, torch.float32)
    dequantize(codes, scales, bits=bits, block=block, numel=numel, out=decoded.plane)
    decoded.check(decode_reference(codes, scales, bits=bits, block=block, numel=numel), "decoded")

    total = x + memory
    planes, error = GuardedPlanes(numel, bits, block), Guarded(numel, torch.float32)
    codes, scales = quantize_with_feedback(x, memory, error.plane, codes=planes.codes, scales=planes.scales, **options)
    planes.check(reference(total, **options))
    error.check(total - dequantize(codes, scales, bits=bits, block=block, numel=numel), "error")
    quantize_with_feedback(x, memory, memory, **options)
    assert_same_bits(memory, error.plane, "in place")


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_many_tiles_and_cutting_at_any_block_give_the_same_bits(rounding: str) -> None:
    x = floats(100_003, 1)
    options = {"bits": 4, "block": 64, "rounding": rounding, "key": 77}
    codes, scales = quantize(x, offset=5, **options)
    expected = reference(x, offset=5, **options)
    assert_same_bits(codes, expected[0])
    assert_same_bits(scales, expected[1])
    rest = quantize(x[64 * 700 :], offset=5 + 64 * 700, **options)
    assert_same_bits(rest[0], codes[32 * 700 :])
    assert_same_bits(rest[1], scales[700:])


def test_tiles_cover_everything_once() -> None:
    for numel, block, step in [(0, 8, 64), (7, 8, 64), (1000, 8, 64), (1000, 256, 256), (1024, 256, 512)]:
        spans = list(tiles(numel, block, step))
        assert [start for start, _ in spans] + [numel] == [0] * (numel > 0) + [stop for _, stop in spans] + [0] * (
            numel == 0
        )
        assert all(start % block == 0 and (stop - start) % block == 0 for start, stop in spans[:-1])


@settings(max_examples=60, deadline=None)
@given(bits=st.sampled_from(BITS), seed=st.integers(0, 2**32), numel=st.integers(1, 700))
def test_error_is_at_most_half_a_step_and_the_range_symmetric(bits: int, seed: int, numel: int) -> None:
    x = torch.randn(numel, generator=torch.Generator().manual_seed(seed))
    codes, scales = quantize(x, bits=bits)
    step = scales.repeat_interleave(256)[:numel]
    assert ((x - dequantize(codes, scales, bits=bits, numel=numel)).abs() <= step * (0.5 + 1e-5)).all()
    plain = unpack_reference(codes, bits, numel)
    assert plain.abs().max() == LEVELS[bits]  # the largest is a full code, whatever its sign
    mirrored, same = quantize(-x, bits=bits)
    assert torch.equal(unpack_reference(mirrored, bits, numel), -plain)
    assert torch.equal(same, scales)
    again, _ = quantize(dequantize(codes, scales, bits=bits, numel=numel), bits=bits)
    assert torch.equal(again, codes)


def test_layout_of_bits() -> None:
    x = torch.tensor([1.0, -1.0, 0.0, 1.0, -1.0])
    assert quantize(x, bits=8)[0].tolist() == [127, 129, 0, 127, 129]
    assert quantize(x, bits=4)[0].tolist() == [0x97, 0x70, 0x09]
    assert quantize(x, bits=2)[0].tolist() == [0b01_00_11_01, 0b11]
    assert dequantize(torch.tensor([0x80], dtype=torch.uint8), torch.ones(1), bits=8, numel=1).item() == -128
    ties = torch.tensor([7.0, 0.5, 1.5, 2.5, -0.5, -1.5])
    assert unpack_reference(quantize(ties, bits=4)[0], 4, 6).tolist() == [7, 0, 2, 2, 0, -2]


def test_relative_error_on_gaussian_numbers_and_no_shrinking() -> None:
    x = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    for block, expected in [(64, 0.00593), (256, 0.00697), (1024, 0.00789)]:
        decoded = dequantize(*quantize(x, bits=8, block=block), bits=8, block=block, numel=x.numel())
        assert abs((decoded - x).norm() / x.norm() / expected - 1) < 0.02
        assert abs(torch.dot(decoded, x) / torch.dot(x, x) - 1) < 1e-4  # truncation gives 0.99


@pytest.mark.parametrize("bits", BITS)
def test_stochastic_rounding_is_unbiased_and_fresh_for_each_key(bits: int) -> None:
    x = torch.linspace(-1, 1, 64)
    runs = 1000
    options = {"bits": bits, "block": 64, "rounding": "stochastic"}
    decoded = [dequantize(*quantize(x, key=key, **options), bits=bits, block=64, numel=64) for key in range(runs)]
    deviation = (torch.stack(decoded).double().mean(0) - x.double()).abs() * LEVELS[bits]  # in steps
    assert deviation.max() < 4.5 * 0.5 / runs**0.5
    assert not torch.equal(decoded[0], decoded[1])


@pytest.mark.parametrize("bits", BITS)
def test_feedback_loses_nothing(bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    memory, sent, total = (
        torch.zeros(1000),
        torch.zeros(1000, dtype=torch.double),
        torch.zeros(1000, dtype=torch.double),
    )
    for _ in range(30):
        gradient = torch.randn(1000, generator=generator)
        codes, scales = quantize_with_feedback(gradient, memory, memory, bits=bits)
        sent += dequantize(codes, scales, bits=bits, numel=1000)
        total += gradient
    assert (sent + memory - total).abs().max() < 1e-4


def test_the_largest_floats_stay_finite_and_tiny_blocks_are_zero() -> None:
    largest = torch.tensor([torch.finfo(torch.float32).max, -1.0] * 8)
    for bits in BITS:
        error = torch.empty(16)
        codes, scales = quantize_with_feedback(largest, torch.zeros(16), error, bits=bits, block=8)
        assert all_finite(dequantize(codes, scales, bits=bits, block=8, numel=16))
        assert all_finite(error)
        tiny = torch.tensor([2.0**-101, -1e-45] * 8)
        codes, scales = quantize_with_feedback(tiny, torch.zeros(16), error, bits=bits, block=8)
        assert not codes.any()
        assert not scales.any()
        assert torch.equal(error, tiny)


@pytest.mark.parametrize("poison", [torch.inf, -torch.inf, torch.nan])
def test_a_block_that_is_not_finite_shows_in_its_scale_alone(poison: float) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    x[300] = poison
    assert not all_finite(x)
    error = torch.empty(1000)
    _, scales = quantize_with_feedback(x, torch.zeros(1000), error, bits=4, block=256)
    assert scales.isfinite().tolist() == [True, False, True, True]
    assert error.isfinite().view(-1, 8).all(1).tolist() == [i // 32 != 1 for i in range(125)]
    assert all_finite(torch.empty(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "bits is 3"),
        ({"block": 12}, "block is 12"),
        ({"rounding": "up"}, "rounding is 'up'"),
        ({"rounding": "stochastic", "key": -1}, "key is -1"),
        ({"x": torch.zeros(5, dtype=torch.float64)}, "x is contiguous, torch.float64"),
        ({"x": torch.zeros(10)[::2]}, "x is not contiguous"),
        ({"codes": torch.zeros(4, dtype=torch.uint8)}, r"codes is .* of shape \(4,\)"),
        ({"scales": torch.zeros(1, device="meta")}, "scales is on meta"),
    ],
)
def test_refuses(change: dict, message: str) -> None:
    arguments = {"x": torch.zeros(5), "bits": 8, **change}
    with pytest.raises(ValueError, match=message):
        quantize(arguments.pop("x"), **arguments)


@interpreted
def test_interpreted_kernel_equals_the_reference() -> None:
    cases = [  # bits, block, rounding, feedback, numel
        (8, 256, "nearest", False, 2048),
        (8, 256, "nearest", True, 2049),
        (8, 4096, "stochastic", True, 5001),
        (4, 64, "stochastic", True, 2300),
        (4, 256, "nearest", False, 1),
        (2, 16, "stochastic", False, 2047),
        (2, 256, "nearest", True, 777),
    ]
    for seed, (bits, block, rounding, feedback, numel) in enumerate(cases):
        x, memory = floats(numel, seed), floats(numel, seed + 100) * 0.5
        planes, error = GuardedPlanes(numel, bits, block), Guarded(numel, torch.float32)
        random = {"key": 2**63 + seed, "offset": 2**33 + seed}
        quantize_on_gpu.launch_quantize(
            x,
            (memory, error.plane) if feedback else None,
            planes.codes,
            planes.scales,
            bits=bits,
            block=block,
            stochastic=rounding == "stochastic",
            **random,
        )
        total = x + memory if feedback else x
        expected = reference(total, bits=bits, block=block, rounding=rounding, **random)
        planes.check(expected)
        if feedback:
            error.check(total - decode_reference(*expected, bits=bits, block=block, numel=numel), "error")


@needs_compiler
@pytest.mark.parametrize(
    ("target", "bits", "stochastic"), [*((target, 8, False) for target in TARGETS), ("sm_90", 4, True)]
)
def test_compiles_wide_and_without_spills(target: str, bits: int, stochastic: bool) -> None:
    kernel = quantize_on_gpu.quantize_kernel
    compiled = compile_ahead(
        kernel,
        target,
        tensors={
            "x": torch.float32,
            "memory": torch.float32,
            "next_memory": torch.float32,
            "codes": torch.uint8,
            "scales": torch.float32,
        },
        constants=quantize_on_gpu.quantize_constants(bits, 256, stochastic=stochastic, feedback=True),
        multiples_of_16=["x", "memory", "next_memory", "codes", "scales"],
    )
    assert compiled.spilled == compiled.local_accesses == 0
    assert compiled.registers <= 64, "fewer than all lanes of a processor could be resident"
    assert compiled.wide_loads >= 4  # 2048 elements of two inputs, 256 lanes
    assert compiled.wide_stores >= 2
    assert len(compiled.fused) == 5 * compiled.assembly.count("v_div_fixup_f32")  # AMD divides correctly by them
    assert compiled.keeps_subnormals


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")


@needs_gpu
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_gpu_equals_the_reference(bits: int, rounding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for numel, block in [(1, 256), (2048, 16), (100_003, 256), (1 << 20, 4096)]:
        x, memory = floats(numel, numel), floats(numel, numel + 1)
        options = {"bits": bits, "block": block, "rounding": rounding, "key": 3, "offset": 11}
        expected = reference(x + memory, **options)
        for triton in (True, False):
            monkeypatch.setattr(code_planes, "triton_is_installed", lambda triton=triton: triton)
            error = torch.empty(numel, device="cuda")
            codes, scales = quantize_with_feedback(x.cuda(), memory.cuda(), error, **options)
            assert_same_bits(codes.cpu(), expected[0])
            assert_same_bits(scales.cpu(), expected[1])
            decoded = dequantize(codes, scales, bits=bits, block=block, numel=numel).cpu()
            assert_same_bits(error.cpu(), x + memory - decoded)


@needs_gpu
def test_gpu_reaches_beyond_32_bit_offsets() -> None:
    numel = 2**31 + 300
    if torch.cuda.mem_get_info()[0] < 10 * numel:
        pytest.skip("needs 22 GB of free GPU memory")
    x = torch.ones(numel, device="cuda")
    codes, scales = quantize(x, bits=8)
    assert (codes[-400:] == 127).all()
    assert torch.equal(dequantize(codes, scales, bits=8, numel=numel, out=x)[-400:], 127 * scales[-1:].expand(400))
