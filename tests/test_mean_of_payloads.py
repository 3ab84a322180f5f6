"""The owner's mean: what decoding and adding one by one gives, whichever kernel makes it, and no payload unchecked."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from thinwire.comm.compress.collectives.reduce import mean_of_payloads
from thinwire.comm.compress.compressor import Compressor
from thinwire.comm.compress.compressors.block_quantized import Int4, Int8
from thinwire.comm.compress.compressors.dense import BF16, FP16, Dense
from thinwire.comm.compress.compressors.natural import Natural
from thinwire.comm.compress.compressors.sign import Sign
from thinwire.comm.compress.decoded import to_dense
from thinwire.comm.compress.draw import Draw
from thinwire.comm.wire import PayloadError

NUMEL, SENDERS = 300, 3
CASTS = [Dense(), BF16(), FP16()]
DRAW = Draw(seed=0, step=0, name="w", rank=0)


def payloads_of(compressor: Compressor, tensors: list[Tensor]) -> list[Tensor | None]:
    return [compressor.encode(x, Draw(seed=0, step=0, name="w", rank=r)) for r, x in enumerate(tensors)]


def gradients() -> list[Tensor]:
    return [torch.randn(NUMEL, generator=torch.Generator().manual_seed(rank)) for rank in range(SENDERS)]


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, 1.0, 2.0]], ids=["alike", "weighted"])
@pytest.mark.parametrize("compressor", [*CASTS, Int8(), Int4(), Sign(), Natural()], ids=lambda c: c.kind)
def test_it_is_the_sum_in_rank_order(compressor: Compressor, weights: list[float]) -> None:
    payloads, out = payloads_of(compressor, gradients()), torch.full((NUMEL,), torch.nan)
    mean_of_payloads(compressor, payloads, out, DRAW, weights)
    expected = torch.zeros(NUMEL)
    for payload, weight in zip(payloads, weights, strict=True):
        assert payload is not None
        expected += to_dense(compressor.decode(payload, out.shape, DRAW)) * weight
    assert torch.equal(out, expected * (1 / SENDERS))


@pytest.mark.parametrize("compressor", CASTS, ids=lambda c: c.kind)
def test_an_infinite_element_is_no_payload(compressor: Dense) -> None:
    payloads = payloads_of(compressor, gradients())
    assert payloads[1] is not None
    compressor.values(payloads[1], NUMEL)[7] = torch.inf
    with pytest.raises(PayloadError, match="not finite"):
        mean_of_payloads(compressor, payloads, torch.empty(NUMEL), DRAW, [1.0] * SENDERS)
    cut = [payload[:-1] for payload in payloads if payload is not None]
    with pytest.raises(PayloadError, match="bytes"):
        mean_of_payloads(compressor, cut, torch.empty(NUMEL), DRAW, [1.0] * SENDERS)


def test_a_sum_beyond_fp32_is_infinite_and_nobodys_fault() -> None:
    out = torch.empty(NUMEL)
    mean_of_payloads(Dense(), payloads_of(Dense(), [torch.full((NUMEL,), 3e38)] * SENDERS), out, DRAW, [1.0] * SENDERS)
    assert bool(out.isinf().all())
