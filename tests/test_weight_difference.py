"""weight_difference: tiles on a CPU and a real GPU against the definition; test_payload_kernels.py has the kernels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_planes import Guarded, assert_same_bits
from torch import Tensor

from thinwire.kernels.block_payload import BlockFormat, Runs
from thinwire.kernels.encode_runs import encode_runs_reference
from thinwire.kernels.reduce_payloads import reduce_reference
from thinwire.kernels.weight_difference import apply_difference, encode_difference


def weights(numel: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    old = torch.randn(numel, generator=generator).to(dtype)
    return old.float() + 1e-3 * torch.randn(numel, generator=generator), old


def as_bits(x: Tensor) -> Tensor:
    return x.view(torch.uint8)


@settings(max_examples=50, deadline=None)
@given(
    numel=st.integers(1, 1500),
    form=st.builds(
        BlockFormat, bits=st.sampled_from([8, 4]), block=st.sampled_from([32, 96, 1024]), smooth=st.booleans()
    ),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    rounding=st.sampled_from(["nearest", "stochastic"]),
    seed=st.integers(0, 2**32),
)
def test_tiles_equal_the_definition(numel, form, dtype, rounding, seed) -> None:
    new, old = weights(numel, seed, dtype)
    options = {"rounding": rounding, "key": seed}
    payload = Guarded(form.payload_bytes(numel), torch.uint8)
    encode_difference(new, old, form, payload=payload.plane, **options)
    payload.check(encode_runs_reference(new - old, Runs([numel]), form, memory=None, **options), "payload")
    expected = (reduce_reference(payload.plane[None], form, numel, 1.0) + old.float()).to(dtype)
    assert_same_bits(as_bits(apply_difference(payload.plane, form, old)), as_bits(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_tiles(dtype: torch.dtype) -> None:
    form, (new, old) = BlockFormat(4, 2048), weights(100_003, 0, dtype)
    payload = encode_difference(new, old, form)
    assert len(payload) == 49 * 4 + 12 + 50_002 + 14
    assert_same_bits(
        payload, encode_runs_reference(new - old, Runs([100_003]), form, rounding="nearest", key=0, memory=None)
    )
    expected = (reduce_reference(payload[None], form, 100_003, 1.0) + old.float()).to(dtype)
    assert_same_bits(as_bits(apply_difference(payload, form, old)), as_bits(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changes_too_small_for_a_code_or_for_the_dtype_arrive_in_the_end(dtype: torch.dtype) -> None:
    form = BlockFormat(4, 64)
    master = torch.linspace(0.5, 2.0, 64)
    held = master.to(dtype)
    start = master.clone()
    for _ in range(200):
        master += 1e-4  # bf16 numbers near 1 are 2^-7 apart
        master[0] += 1e-2  # with this as the largest, a code is 1.4e-3
        apply_difference(encode_difference(master, held, form), form, held)
    apart = (held.float() - master).abs()[1:]
    assert (held.float() - start)[1:].min() > 0.01
    assert apart.max() < (2e-3 if dtype == torch.float32 else 2**-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"new": torch.zeros(64, dtype=torch.bfloat16)}, "new is"),
        ({"old": torch.zeros(63)}, "old has 63 values and new 64"),
        ({"old": torch.zeros(64, dtype=torch.float64)}, r"old is torch\.float64"),
    ],
)
def test_refuses(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_difference(**{"new": torch.zeros(64), "old": torch.zeros(64), **change}, form=BlockFormat(4, 64))
    with pytest.raises(ValueError, match="payloads is"):
        apply_difference(torch.zeros(47, dtype=torch.uint8), BlockFormat(4, 64), torch.zeros(64))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_equals_the_definition(dtype: torch.dtype) -> None:
    form, (new, old) = BlockFormat(4, 2048), weights(100_003, 0, dtype)
    payload = encode_difference(new, old, form)
    ours = old.cuda()
    assert_same_bits(encode_difference(new.cuda(), ours, form).cpu(), payload)
    assert_same_bits(
        as_bits(apply_difference(payload.cuda(), form, ours).cpu()), as_bits(apply_difference(payload, form, old))
    )
