"""What every compressor promises, held against each of them in several settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import thinwire as tw
from thinwire.comm.compress.compressor import Compressor
from thinwire.comm.compress.compressors import AnyCompressor
from thinwire.comm.compress.decoded import Decoded, Sparse, add_to, to_dense
from thinwire.comm.compress.draw import Draw
from thinwire.comm.settings import Settings
from thinwire.comm.wire import PayloadError

SPARSE_VALUES = ("fp32", "bf16", "fp16", "int8", "int4", "int4_stochastic", "2bit", "sign")
ALL: list[Compressor] = [
    tw.Dense(),
    tw.BF16(),
    tw.FP16(),
    *(
        cls(block=block, rounding=rounding)
        for cls in (tw.Int8, tw.Int4, tw.Ternary)
        for block in (32, 256)
        for rounding in ("nearest", "stochastic")
    ),
    tw.Sign(),
    tw.Sign(block=32),
    tw.Natural(bits=8),
    tw.Natural(bits=9),
    *(tw.TopK(density=0.1, values=values) for values in SPARSE_VALUES),
    tw.TopK(density=1.0),
    tw.TopK(density=1.0, values="int8"),
    tw.TopK(k=5),
    tw.TopK(k=4, chunk=64, values="2bit"),
    *(tw.RandK(density=0.1, values=values) for values in SPARSE_VALUES),
    tw.RandK(k=20, unbiased=True),
    tw.Threshold(density=0.1),
    tw.Threshold(density=0.02, values="int8"),
    tw.LowRank(rank=1),
    tw.LowRank(rank=4, dtype="bf16"),
    tw.TernaryCluster(density=0.1),
    tw.TernaryCluster(density=1.0),
]
SHAPES = [(), (1,), (2,), (7,), (255,), (256,), (257,), (3, 5, 7), (1, 300), (40, 33), (64, 64)]
DRAW = Draw(seed=5, step=3, name="layer.weight", rank=1)


def name_of(compressor: Compressor) -> str:
    return "-".join(str(value) for value in compressor.model_dump().values() if value is not None)


every_compressor = pytest.mark.parametrize("compressor", ALL, ids=name_of)


def gradient(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Numbers of very different magnitudes, as gradients have them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return x * torch.exp(2 * torch.randn(shape, generator=generator)) * 1e-2


def inputs(shape: tuple[int, ...]) -> Iterator[Tensor]:
    """A gradient, and tensors on which compressors divide by zero, find ties or run out of range."""
    yield gradient(shape)
    yield torch.zeros(shape)
    yield torch.ones(shape) * -3.0
    x = torch.zeros(shape)
    x.view(-1)[-1] = 1e-3
    yield x
    x = gradient(shape)
    x.view(-1)[::3] = 0.0
    yield x * 1e-38
    yield x.clamp(-1, 1) * 1e34


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def check_decoded(decoded: Decoded, numel: int) -> None:
    if isinstance(decoded, Sparse):
        assert decoded.numel == numel
        assert decoded.indices.dtype == torch.int64
        assert decoded.indices.shape == decoded.values.shape
        assert bool((decoded.indices[1:] > decoded.indices[:-1]).all())
        assert not len(decoded.indices) or 0 <= decoded.indices[0] <= decoded.indices[-1] < numel
        values = decoded.values
    else:
        assert decoded.shape == (numel,)
        values = decoded
    assert values.dtype == torch.float32
    assert bool(values.isfinite().all())


@every_compressor
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trip(compressor: Compressor, shape: tuple[int, ...]) -> None:
    for x in inputs(shape):
        before = x.clone()
        payload = compressor.encode(x, DRAW)
        assert same_bits(x, before)
        assert payload.dtype == torch.uint8
        assert payload.dim() == 1
        assert payload.numel() <= 4 * x.numel() + 4
        assert not compressor.fixed_size or payload.numel() == compressor.payload_bytes(x.shape)
        assert torch.equal(payload, compressor.encode(x, DRAW))
        decoded = compressor.decode(payload, x.shape, DRAW)
        check_decoded(decoded, x.numel())
        assert isinstance(decoded, Sparse) == compressor.sparse
        # A receiver finds payloads anywhere in its buffer.
        shifted = torch.cat([payload.new_zeros(3), payload])[3:]
        assert torch.equal(to_dense(compressor.decode(shifted, x.shape, DRAW)), to_dense(decoded))
        if compressor.elementwise:
            into = torch.full((x.numel(),), torch.nan)
            compressor.decode_into(shifted, into, DRAW)
            assert same_bits(into, to_dense(decoded))


@every_compressor
@pytest.mark.parametrize("shape", [(1,), (300,), (40, 33)], ids=str)
def test_feedback_is_what_its_definition_says_bit_for_bit(compressor: Compressor, shape: tuple[int, ...]) -> None:
    for x in inputs(shape):
        for memory in (torch.zeros(shape), gradient(shape, seed=1), -x):
            left, expected = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
            kept = memory.clone()
            payload = compressor.encode_with_feedback(x, memory, left, DRAW)
            assert same_bits(memory, kept)
            by_definition = Compressor.encode_with_feedback(compressor, x, memory, expected, DRAW)
            assert torch.equal(payload, by_definition)
            assert same_bits(left, expected)
            if compressor.elementwise:
                assert torch.equal(compressor.encode_with_feedback(x, kept, kept, DRAW), payload)
                assert same_bits(kept, expected)


@every_compressor
def test_error_feedback_loses_nothing(compressor: Compressor) -> None:
    """sum of what was sent + what is left = sum of what went in, up to the rounding of fp32."""
    if isinstance(compressor, tw.RandK) and compressor.unbiased:
        pytest.skip("an unbiased compressor is not contractive: its errors grow")
    shape, steps = (40, 33), 50
    memory, spare = torch.zeros(shape), torch.empty(shape)
    sent, given = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    for step in range(steps):
        x = gradient(shape, seed=step)
        draw = Draw(seed=0, step=step, name="w", rank=0)
        payload = compressor.encode_with_feedback(x, memory, spare, draw)
        add_to(sent, compressor.decode(payload, x.shape, draw))
        given += x.double()
        memory, spare = spare, memory
    assert float((sent + memory.double() - given).abs().max()) < 1e-7 * steps * float(given.abs().max())


@every_compressor
def test_contraction(compressor: Compressor) -> None:
    """||C(x) - x||^2 <= (1 - alpha) ||x||^2; for random compressors of the mean over draws, with what chance allows."""
    random = isinstance(compressor, tw.RandK | tw.Natural) or "stochastic" in name_of(compressor)
    for shape in [(1,), (50,), (40, 33)]:
        ramp = torch.arange(1, math.prod(shape) + 1, dtype=torch.float32).view(shape)
        for x in (gradient(shape), torch.ones(shape), ramp.sin()):
            alpha = compressor.contraction(x)
            if alpha is None:
                continue
            assert 0 < alpha <= 1
            draws = [Draw(seed=0, step=step, name="w", rank=0) for step in range(30 if random else 1)]
            errors = [
                to_dense(compressor.decode(compressor.encode(x, draw), x.shape, draw)).double() - x.view(-1).double()
                for draw in draws
            ]
            error = sum(float(e.square().sum()) for e in errors) / len(draws)
            squared = float(x.double().square().sum())
            assert error <= (1 - alpha) * squared * (1.25 if random else 1 + 1e-5) + 1e-12 * squared


@every_compressor
def test_powers_of_two_pass_through(compressor: Compressor) -> None:
    if not compressor.homogeneous or getattr(compressor, "values", "") == "fp16":
        pytest.skip("fp16 has too narrow a range")
    x = gradient((40, 33))
    once, scaled = (
        to_dense(compressor.decode(compressor.encode(t * x, DRAW), x.shape, DRAW)) * (1 / t) for t in (1.0, 2.0**-9)
    )
    assert torch.equal(once, scaled)


@every_compressor
def test_damaged_payloads_are_refused_or_valid(
    compressor: Compressor, mutations: Callable[[Tensor], Iterator[Tensor]]
) -> None:
    shape = torch.Size((21, 37))
    for damaged in mutations(compressor.encode(gradient(shape), DRAW)):
        try:
            decoded = compressor.decode(damaged, shape, DRAW)
        except PayloadError:
            continue
        check_decoded(decoded, shape.numel())


@every_compressor
def test_payloads_of_another_length_are_refused(compressor: Compressor) -> None:
    x = gradient((24, 33))
    payload = compressor.encode(x, DRAW)
    for wrong in (payload[:-1], payload[:0], payload[:3], torch.cat([payload, payload[:1]])):
        with pytest.raises(PayloadError):
            compressor.decode(wrong, x.shape, DRAW)


@every_compressor
def test_settings_survive_yaml(compressor: Compressor) -> None:
    class Holder(Settings):
        compressor: AnyCompressor

    assert Holder(compressor=compressor.model_dump()).compressor == compressor  # type: ignore[arg-type]


def test_a_name_means_the_defaults() -> None:
    class Holder(Settings):
        compressor: AnyCompressor

    assert Holder(compressor="int8").compressor == tw.Int8()  # type: ignore[arg-type]
    assert Holder(compressor="topk").compressor == tw.TopK(density=0.01)  # type: ignore[arg-type]
    assert Holder(compressor=tw.Sign(block=64)).compressor == tw.Sign(block=64)
    with pytest.raises(ValueError, match=r"'none', 'bf16', 'fp16', 'int8'"):
        Holder(compressor="zip")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: tw.TopK(density=0.1, k=3), "density is 0.1 and k is 3; give one of them"),
        (lambda: tw.TopK(chunk=64), "chunk is 64 but k is not given"),
        (lambda: tw.TopK(k=65, chunk=64), "k is 65, but a chunk has 64 elements"),
        (lambda: tw.RandK(density=0.1, k=3), "density is 0.1 and k is 3; give one of them"),
        (lambda: tw.TopK(density=0.0), "greater than 0"),
        (lambda: tw.Int8(block=12), "multiple of 8"),
        (lambda: tw.Int8(blocks=256), "blocks"),  # type: ignore[call-arg]
    ],
)
def test_settings_that_cannot_be(make: Callable[[], Compressor], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
