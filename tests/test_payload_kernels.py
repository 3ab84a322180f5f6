"""The Triton kernels of runs of block codes: interpreted against the references, and compiled for GPUs."""

from __future__ import annotations

import pytest
import torch
from quantized_planes import Guarded, assert_same_bits
from triton_aot import TARGETS, Compiled, compile_ahead, needs_compiler
from triton_interpreter import interpreted

from thinwire.kernels import encode_runs_on_gpu, reduce_payloads_on_gpu
from thinwire.kernels.block_payload import BlockFormat, Runs
from thinwire.kernels.encode_runs import encode_runs_reference
from thinwire.kernels.reduce_payloads import reduce_reference

THIRD = torch.tensor(1 / 3).item()
INT8, INT4, CHANGE = BlockFormat(8, 512, smooth=True), BlockFormat(4, 128, smooth=True), BlockFormat(4, 2048)


@interpreted
def test_interpreted_kernels_equal_the_references() -> None:
    torch.manual_seed(0)
    check_encoding()
    check_summing_and_recoding()
    check_differences()


def rounding(stochastic: bool) -> str:
    return "stochastic" if stochastic else "nearest"


def check_encoding() -> None:
    segments = [(4096, 4000), (32, 2048), (9000, 77)]  # of the first two, some tiles are whole and at 16 values
    cases = [  # format, stochastic, with a memory, counts
        (BlockFormat(8, 256), False, False, [2048, 2048, 2029]),
        (BlockFormat(8, 256, True), True, True, [6125]),
        (INT4, False, True, [4000, 2048, 77]),
        (CHANGE, True, False, [4001, 1, 2123]),
        (BlockFormat(8, 32), False, True, [0, 2065, 4060]),
    ]
    for form, stochastic, feedback, counts in cases:
        runs, source = Runs(counts, segments), torch.randn(9100) * torch.rand(9100) ** 8
        memory = torch.randn(6125) if feedback else None
        kept = None if memory is None else memory.clone()
        payload = Guarded(runs.payload_bytes(form), torch.uint8)
        encode_runs_on_gpu.launch_encode(
            source, runs, form, payload.plane, memory=memory, stochastic=stochastic, key=2**63
        )
        expected = encode_runs_reference(source, runs, form, rounding=rounding(stochastic), key=2**63, memory=kept)
        payload.check(expected, f"payload of {form}")
        if memory is not None and kept is not None:
            assert_same_bits(memory, kept, f"memory of {form}")


def check_summing_and_recoding() -> None:
    cases = [  # in, out, payloads, counts, with a memory, stochastic
        (BlockFormat(8, 256, True), INT4, 5, [2048, 2048, 77], True, False),
        (BlockFormat(4, 128), BlockFormat(8, 256), 2, [2051, 3000], False, True),
        (BlockFormat(8, 64), BlockFormat(4, 64, True), 3, [1, 0, 4098], True, True),
    ]
    for form, into, n, counts, feedback, stochastic in cases:
        runs = Runs(counts)
        options = {"rounding": "nearest", "key": 0, "memory": None}
        plain = Runs([runs.numel])
        sent = torch.stack([encode_runs_reference(torch.randn(runs.numel), plain, form, **options) for _ in range(n)])
        total = reduce_reference(sent, form, runs.numel, THIRD)
        out = Guarded(runs.numel, torch.float32)
        reduce_payloads_on_gpu.launch_sum(sent, form, out.plane, factor=THIRD)
        out.check(total, f"sum of {form}")
        memory = torch.randn(runs.numel) if feedback else None
        kept = None if memory is None else memory.clone()
        payload = Guarded(runs.payload_bytes(into), torch.uint8)
        reduce_payloads_on_gpu.launch_recode(
            sent, form, runs, into, payload.plane, factor=THIRD, memory=memory, stochastic=stochastic, key=9
        )
        expected = encode_runs_reference(total, runs, into, rounding=rounding(stochastic), key=9, memory=kept)
        payload.check(expected, f"{form} to {into}")
        if memory is not None and kept is not None:
            assert_same_bits(memory, kept, f"memory of {form} to {into}")


def check_differences() -> None:
    cases = [
        (CHANGE, torch.bfloat16, 4096 + 33),
        (BlockFormat(8, 256), torch.float32, 4096 + 1),
        (BlockFormat(4, 64, True), torch.bfloat16, 2048 + 70),
    ]
    for form, dtype, numel in cases:
        old = torch.randn(numel).to(dtype)
        new = old.float() + 1e-3 * torch.randn(numel)
        payload, runs = Guarded(form.payload_bytes(numel), torch.uint8), Runs([numel])
        encode_runs_on_gpu.launch_encode(new, runs, form, payload.plane, old=old)
        expected = encode_runs_reference(new - old, runs, form, rounding="nearest", key=0, memory=None)
        payload.check(expected, f"difference of {dtype}")
        changed = (reduce_reference(expected[None], form, numel, 1.0) + old.float()).to(dtype)
        reduce_payloads_on_gpu.launch_sum(expected[None], form, old, factor=1.0, add=True)
        assert_same_bits(old.view(torch.uint8), changed.view(torch.uint8), f"changed {dtype}")


def check_compiled(compiled: Compiled, *, wide_loads: int, wide_stores: int = 0) -> None:
    assert compiled.spilled == compiled.local_accesses == 0
    assert compiled.registers <= 128, "fewer than half of the lanes of a processor could be resident"
    assert compiled.wide_loads >= wide_loads
    assert compiled.wide_stores >= wide_stores
    assert len(compiled.fused) == 5 * compiled.assembly.count("v_div_fixup_f32")  # AMD divides correctly by them
    assert compiled.keeps_subnormals


def encoding(target: str, other: torch.dtype, constants: dict[str, int]) -> Compiled:
    types = {"source": torch.float32, "other": other, "payload": torch.uint8, "scales": torch.float32}
    types |= {"tiles": torch.int64, "segments": torch.int64}
    return compile_ahead(
        encode_runs_on_gpu.encode_kernel, target, tensors=types, constants=constants, multiples_of_16=types
    )


def summing(target: str, out: torch.dtype, constants: dict[str, int]) -> Compiled:
    types = {"codes": torch.uint8, "scales": torch.float32, "out": out}
    multiples = [*types, "codes_stride"]
    return compile_ahead(
        reduce_payloads_on_gpu.sum_kernel, target, tensors=types, constants=constants, multiples_of_16=multiples
    )


@needs_compiler
@pytest.mark.parametrize("target", TARGETS)
def test_compile_wide_and_without_spills(target: str) -> None:
    constants = encode_runs_on_gpu.encode_constants(INT4, feedback=True)
    # 2048 values of two inputs, 256 lanes
    check_compiled(encoding(target, torch.float32, constants), wide_loads=4, wide_stores=2)
    add = reduce_payloads_on_gpu.sum_constants(CHANGE, 1, add=True)
    check_compiled(summing(target, torch.bfloat16, add), wide_loads=1, wide_stores=1)  # 8 weights a lane
    types = {"codes": torch.uint8, "scales": torch.float32, "memory": torch.float32, "payload": torch.uint8}
    types |= {"payload_scales": torch.float32, "tiles": torch.int64}
    recoded = compile_ahead(
        reduce_payloads_on_gpu.recode_kernel,
        target,
        tensors=types,
        constants=reduce_payloads_on_gpu.recode_constants(INT8, INT4, 8, feedback=True),
        multiples_of_16=[*types, "codes_stride"],
    )
    check_compiled(recoded, wide_loads=2, wide_stores=2)  # of the memory: 8 codes a lane are 8 bytes


@needs_compiler
def test_other_variants_compile_too() -> None:
    difference = encode_runs_on_gpu.encode_constants(CHANGE, difference=True, stochastic=True)
    check_compiled(encoding("sm_90", torch.bfloat16, difference), wide_loads=3)
    # 4096 bytes of a payload, 256 lanes; four payloads one by one, more in a loop
    check_compiled(
        summing("sm_90", torch.float32, reduce_payloads_on_gpu.sum_constants(BlockFormat(8, 256), 8)),
        wide_loads=4,
        wide_stores=4,
    )
