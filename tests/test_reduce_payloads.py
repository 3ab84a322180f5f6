"""reduce_payloads: tiles on a CPU and a real GPU against the reference; test_payload_kernels.py has the kernels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_planes import Guarded, assert_same_bits
from torch import Tensor

from thinwire.kernels.block_payload import BlockFormat, Runs
from thinwire.kernels.encode_runs import encode_runs, encode_runs_reference
from thinwire.kernels.reduce_payloads import recode_payloads, reduce_payloads, reduce_reference

THIRD = torch.tensor(1 / 3).item()
FORMS = st.builds(BlockFormat, bits=st.sampled_from([8, 4]), block=st.sampled_from([32, 96, 256]), smooth=st.booleans())


def payloads(n: int, numel: int, form: BlockFormat, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([encode_runs(torch.randn(numel, generator=generator), Runs([numel]), form) for _ in range(n)])


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 6),
    counts=st.lists(st.integers(0, 400), min_size=1, max_size=4).filter(any),
    form=FORMS,
    into=FORMS,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    feedback=st.booleans(),
    rounding=st.sampled_from(["nearest", "stochastic"]),
    seed=st.integers(0, 2**32),
)
def test_tiles_equal_the_reference(n, counts, form, into, dtype, feedback, rounding, seed) -> None:
    runs = Runs(counts)
    sent = payloads(n, runs.numel, form, seed)
    total = reduce_reference(sent, form, runs.numel, THIRD)
    out = Guarded(runs.numel, torch.float32)
    reduce_payloads(sent, form, out.plane, scale=1 / 3)
    out.check(total, "sum")
    rounded = reduce_payloads(sent, form, torch.empty(runs.numel, dtype=dtype), scale=1 / 3)
    assert torch.equal(rounded, total.to(dtype))

    memory = Guarded(runs.numel, torch.float32)
    memory.plane.normal_(generator=torch.Generator().manual_seed(seed))
    kept = memory.plane.clone()
    payload, options = Guarded(runs.payload_bytes(into), torch.uint8), {"rounding": rounding, "key": seed}
    given_memory = memory.plane if feedback else None
    recode_payloads(sent, form, runs, into, scale=1 / 3, memory=given_memory, payload=payload.plane, **options)
    payload.check(encode_runs_reference(total, runs, into, memory=kept if feedback else None, **options), "payload")
    memory.check(kept, "memory")


def test_many_tiles_and_runs_that_begin_anywhere() -> None:
    form, into, runs = BlockFormat(8, 512, True), BlockFormat(4, 128, True), Runs([50_001, 70_000, 3])
    sent = payloads(3, runs.numel, form, 0)
    total = reduce_payloads(sent, form, torch.empty(runs.numel), scale=1 / 3)
    assert_same_bits(total, reduce_reference(sent, form, runs.numel, THIRD))
    options = {"rounding": "stochastic", "key": 4}
    made = recode_payloads(sent, form, runs, into, scale=1 / 3, **options)
    assert_same_bits(made, encode_runs_reference(total, runs, into, memory=None, **options))


def test_adds_in_order_in_fp32() -> None:
    form = BlockFormat(8, 32)
    sent = torch.stack([encode_runs(torch.full((32,), value), Runs([32]), form) for value in (1e8, 1.0, -1e8)])
    assert not reduce_payloads(sent, form, torch.empty(32)).any()  # any other order gives 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"payloads": torch.zeros(48, dtype=torch.uint8)}, r"payloads has shape \(48,\)"),
        ({"payloads": torch.zeros(0, 48, dtype=torch.uint8)}, "n >= 1"),
        ({"payloads": torch.zeros(2, 47, dtype=torch.uint8)}, "payloads is"),
        ({"payloads": torch.zeros(105, dtype=torch.uint8)[9:].view(2, 48)}, "payloads does not begin at"),
        ({"scale": 1e39}, "scale is 1e[+]39"),
        ({"runs": Runs([32], [(1, 32)])}, "runs has segments"),
        ({"memory": torch.zeros(31)}, "memory is"),
    ],
)
def test_refuses(change: dict, message: str) -> None:
    given = {"payloads": torch.zeros(2, 48, dtype=torch.uint8), "runs": Runs([32]), **change}
    form = BlockFormat(8, 32)
    with pytest.raises(ValueError, match=message):
        recode_payloads(given.pop("payloads"), form, given.pop("runs"), form, **given)
    with pytest.raises(ValueError, match=r"out is torch\.float64"):
        reduce_payloads(torch.zeros(2, 48, dtype=torch.uint8), form, torch.zeros(32, dtype=torch.float64))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")
@pytest.mark.parametrize("smooth", [False, True])
def test_gpu_equals_the_reference(smooth: bool) -> None:
    form, into = BlockFormat(8, 512, smooth), BlockFormat(4, 128, smooth)
    for counts in ([100_000, 90_016, 333], [50_001, 0, 70_000]):
        runs = Runs(counts)
        sent, memory = payloads(5, runs.numel, form, 0), torch.randn(runs.numel)
        total = reduce_reference(sent, form, runs.numel, THIRD)
        ours = memory.cuda()
        assert_same_bits(reduce_payloads(sent.cuda(), form, torch.empty_like(ours), scale=1 / 3).cpu(), total)
        made = recode_payloads(sent.cuda(), form, runs, into, scale=1 / 3, rounding="stochastic", key=5, memory=ours)
        expected = encode_runs_reference(total, runs, into, rounding="stochastic", key=5, memory=memory)
        assert_same_bits(made.cpu(), expected)
        assert_same_bits(ours.cpu(), memory)
