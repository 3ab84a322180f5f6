"""dequantize_reduce: tiles on a CPU, the interpreted kernel, the compiled kernel and a real GPU against PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_planes import Guarded, GuardedPlanes, assert_same_bits, reference
from torch import Tensor
from triton_aot import TARGETS, compile_ahead, needs_compiler
from triton_interpreter import interpreted

from thinwire.kernels import quantize_on_gpu
from thinwire.kernels.code_planes import codes_bytes, decode_reference
from thinwire.kernels.dequantize_reduce import dequantize_reduce, dequantize_reduce_quantize

THIRD = torch.tensor(1 / 3).item()


def payloads(n: int, numel: int, bits: int, block: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [reference(torch.randn(numel, generator=generator), bits=bits, block=block) for _ in range(n)]
    return torch.stack([codes for codes, _ in made]), torch.stack([scales for _, scales in made])


def expected_sum(
    codes: Tensor, scales: Tensor, bits: int, block: int, numel: int, factor: float, weights: Sequence[float] | None
) -> Tensor:
    if weights is not None:
        scales = scales * torch.tensor(weights)[:, None]
    decoded = [
        decode_reference(row, of_row, bits=bits, block=block, numel=numel)
        for row, of_row in zip(codes, scales, strict=True)
    ]
    total = decoded[0]
    for other in decoded[1:]:
        total = total + other
    return total * factor


@settings(max_examples=120, deadline=None)
@given(
    n=st.integers(1, 9),
    numel=st.integers(0, 1200),
    bits=st.sampled_from([8, 4, 2, 1]),
    block=st.sampled_from([8, 64, 256, 1024]),
    weighted=st.booleans(),
    rounding=st.sampled_from(["nearest", "stochastic"]),
    seed=st.integers(0, 2**32),
)
def test_tiles_equal_the_sum_of_what_is_decoded(n, numel, bits, block, weighted, rounding, seed) -> None:
    codes, scales = payloads(n, numel, bits, block, seed)
    options = {"bits": bits, "block": block, "numel": numel, "scale": 1 / 3}
    options["weights"] = [0.5 + r / 7 for r in range(n)] if weighted else None
    total = expected_sum(codes, scales, bits, block, numel, THIRD, options["weights"])
    out = Guarded(numel, torch.float32)
    dequantize_reduce(codes, scales, out=out.plane, **options)
    out.check(total, "sum")
    planes, random = GuardedPlanes(numel, bits, block), {"rounding": rounding, "key": seed, "offset": 3}
    dequantize_reduce_quantize(codes, scales, out_codes=planes.codes, out_scales=planes.scales, **random, **options)
    planes.check(reference(total, bits=bits, block=block, **random))


@pytest.mark.parametrize("bits", [8, 1])
def test_many_tiles(bits: int) -> None:
    numel = 100_003
    codes, scales = payloads(3, numel, bits, 64, 0)
    total = dequantize_reduce(codes, scales, bits=bits, block=64, numel=numel, scale=1 / 3)
    assert_same_bits(total, expected_sum(codes, scales, bits, 64, numel, THIRD, None))
    again = dequantize_reduce_quantize(codes, scales, bits=bits, block=64, numel=numel, scale=1 / 3)
    for actual, expected in zip(again, reference(total, bits=bits, block=64), strict=True):
        assert_same_bits(actual, expected)


def test_adds_in_rank_order_in_fp32() -> None:
    codes = torch.tensor([[127], [127], [129]], dtype=torch.uint8)
    scales = torch.tensor([[1e8], [1.0], [1e8]]) / 127
    assert dequantize_reduce(codes, scales, bits=8, numel=1).item() == 0.0  # any other order gives 1
    assert dequantize_reduce(codes, scales, bits=8, numel=1, weights=[0, 1, 0]).item() == pytest.approx(1.0)


def test_equal_payloads_give_their_own_codes() -> None:
    for bits in (8, 4, 2, 1):
        codes, scales = payloads(1, 1000, bits, 256, 1)
        mean = dequantize_reduce_quantize(
            codes.expand(4, -1).contiguous(), scales.expand(4, -1).contiguous(), bits=bits, numel=1000, scale=0.25
        )
        assert torch.equal(mean[0], codes[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 16}, "bits is 16"),
        ({"codes": torch.zeros(8, dtype=torch.uint8)}, r"codes has shape \(8,\)"),
        ({"codes": torch.zeros(0, 8, dtype=torch.uint8)}, "n >= 1"),
        ({"numel": 9}, r"codes is .* of shape \(2, 9\)"),
        ({"scales": torch.zeros(1, 1)}, r"scales is .* of shape \(2, 1\)"),
        ({"scale": 1e39}, "scale is 1e[+]39"),
        ({"weights": [1.0]}, "must be 2 finite"),
        ({"weights": [1.0, float("nan")]}, "must be 2 finite"),
        ({"out": torch.zeros(7)}, "out is"),
    ],
)
def test_refuses(change: dict, message: str) -> None:
    arguments = {"codes": torch.zeros(2, 8, dtype=torch.uint8), "scales": torch.zeros(2, 1), "bits": 8, "numel": 8}
    with pytest.raises(ValueError, match=message):
        dequantize_reduce(**{**arguments, **change})


@interpreted
def test_interpreted_kernel_equals_the_reference() -> None:
    cases = [  # bits, block, n, stochastic, numel; each as a sum and, but for the first, quantised again
        (8, 256, 1, None, 4099),
        (8, 256, 5, True, 4500),
        (8, 16, 4, False, 4096),
        (4, 64, 7, True, 2300),
        (2, 256, 2, False, 1),
        (1, 256, 3, False, 2051),
        (1, 4096, 5, False, 4097),
    ]
    for seed, (bits, block, n, stochastic, numel) in enumerate(cases):
        codes, scales = payloads(n, numel, bits, block, seed)
        total = expected_sum(codes, scales, bits, block, numel, THIRD, None)
        options = {"numel": numel, "factor": THIRD, "bits": bits, "block": block}
        if stochastic is None or n == 7:
            out = Guarded(numel, torch.float32)
            quantize_on_gpu.launch_reduce(codes, scales, out.plane, None, **options)
            out.check(total, "sum")
        if stochastic is not None:
            planes = GuardedPlanes(numel, bits, block)
            quantize_on_gpu.launch_reduce(
                codes, scales, planes.codes, planes.scales, stochastic=stochastic, key=9, offset=7, **options
            )
            rounding = "stochastic" if stochastic else "nearest"
            planes.check(reference(total, bits=bits, block=block, rounding=rounding, key=9, offset=7))


@needs_compiler
@pytest.mark.parametrize(
    ("target", "bits", "n", "requantize"),
    [*((target, 8, 8, True) for target in TARGETS), ("sm_90", 4, 8, True)],
)
def test_compiles_wide_and_without_spills(target: str, bits: int, n: int, requantize: bool) -> None:
    constants = quantize_on_gpu.reduce_constants(bits, 256, n, requantize=requantize)
    compiled = compile_ahead(
        quantize_on_gpu.reduce_kernel,
        target,
        tensors={
            "codes": torch.uint8,
            "scales": torch.float32,
            "out": torch.uint8 if requantize else torch.float32,
            "out_scales": torch.float32,
        },
        constants=constants,
        multiples_of_16=["codes", "scales", "out", "out_scales", "codes_stride"],
    )
    assert compiled.spilled == compiled.local_accesses == 0
    assert compiled.registers <= 128, "fewer than half of the lanes of a processor could be resident"
    if bits == 8:
        assert compiled.wide_loads >= constants["UNROLLED"]  # 4096 bytes of a payload, 256 lanes
    assert len(compiled.fused) == 5 * compiled.assembly.count("v_div_fixup_f32")  # AMD divides correctly by them
    assert compiled.keeps_subnormals


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")
@pytest.mark.parametrize("bits", [8, 4, 2, 1])
def test_gpu_equals_the_reference(bits: int) -> None:
    for n, numel, block in [(1, 1, 256), (3, 100_003, 64), (17, 5000, 4096)]:
        codes, scales = payloads(n, numel, bits, block, n)
        assert codes.shape[1] == codes_bytes(numel, bits)
        options = {"bits": bits, "block": block, "numel": numel, "scale": 1 / 3}
        total = expected_sum(codes, scales, bits, block, numel, THIRD, None)
        assert_same_bits(dequantize_reduce(codes.cuda(), scales.cuda(), **options).cpu(), total)
        again = dequantize_reduce_quantize(codes.cuda(), scales.cuda(), **options)
        for actual, expected in zip(again, reference(total, bits=bits, block=block), strict=True):
            assert_same_bits(actual.cpu(), expected)
