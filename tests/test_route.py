"""route and router_gradient: tiles, the interpreted and the compiled kernels against the reference and autograd."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_aot import TARGETS, compile_ahead, needs_compiler
from triton_interpreter import interpreted

from thinwire.comm.balance.columns import Columns
from thinwire.comm.balance.functional import balance_loss, z_loss
from thinwire.kernels import route_on_cpu, route_on_gpu, router_gradient_on_gpu
from thinwire.kernels import router_gradient as gradient_module
from thinwire.kernels.route import Routed, route, route_reference
from thinwire.kernels.router_gradient import Gates, Score, router_gradient, router_gradient_reference

FP32, FP64, BF16 = torch.float32, torch.float64, torch.bfloat16
EXPERTS = (1, 2, 7, 8, 60, 64, 128, 160)
SCORES: tuple[Score, ...] = ("softmax", "sigmoid")


def some_logits(tokens: int, experts: int, kind: str = "normal", seed: int = 0, dtype: torch.dtype = FP32) -> Tensor:
    """Ordinary ones; of +-80; or so few different ones that most are tied, zeros of both signs among them."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(tokens, experts, generator=generator) * 3
    if kind == "large":
        z = torch.where(z > 0, 80.0, -80.0) + z / 4
    elif kind == "tied":
        z = torch.randint(-1, 2, (tokens, experts), generator=generator) * torch.tensor([-0.0, 0.5])[tokens % 2]
    return z.to(dtype)


def same(actual: Routed, expected: Routed) -> None:
    """Ids and counts equal, numbers to fp32's rounding."""
    assert torch.equal(actual.selected, expected.selected)
    assert torch.equal(actual.tally, expected.tally)
    for name in ("weights", "normaliser", "sums"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=2e-5, atol=1e-6, msg=name)


def some_gates(routed: Routed, renormalised: bool, seed: int = 0) -> Gates:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(routed.weights.shape, generator=generator, dtype=routed.weights.dtype)
    return Gates(routed.selected, routed.weights.detach(), drawn, renormalised)


@settings(max_examples=60, deadline=None)
@given(
    experts=st.sampled_from([*EXPERTS, 130, 512]),
    top_k=st.integers(1, 8),
    tokens=st.integers(0, 70),
    kind=st.sampled_from(["normal", "large", "tied"]),
    dtype=st.sampled_from([FP32, BF16, FP64]),
    score=st.sampled_from(SCORES),
    renormalise=st.booleans(),
    padding=st.sampled_from([None, 0.0, 0.4, 1.0]),
    tile=st.integers(1, 3000),
    seed=st.integers(0, 2**32),
)
def test_tiles_equal_the_reference(
    experts, top_k, tokens, kind, dtype, score, renormalise, padding, tile, seed
) -> None:
    top_k = min(top_k, experts)
    z = some_logits(tokens, experts, kind, seed, dtype)
    valid = None if padding is None else torch.rand(tokens, generator=torch.Generator().manual_seed(seed)) >= padding
    expected = route_reference(z, top_k, valid, score=score, renormalise=renormalise, sums=True)
    same(route(z, top_k, valid, score=score, renormalise=renormalise, sums=True), expected)
    counted = Columns(experts).row(z, expected.selected, valid)
    assert torch.equal(expected.tally, counted)
    wide = FP64 if dtype == FP64 else FP32
    gates = some_gates(expected, renormalise, seed)
    pull, z_scale = torch.linspace(-1, 2, experts, dtype=FP64), torch.tensor(0.3, dtype=FP64)
    whole = router_gradient_reference(z.to(FP64), pull, z_scale, valid, score=score, gates=gates)
    ours = router_gradient(z, pull, z_scale, valid, score=score, normaliser=expected.normaliser, gates=gates)
    near: dict[str, Any] = {"rtol": 1e-2, "atol": 1e-2} if dtype == BF16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(ours, whole.to(dtype), **near)
    if wide == FP32 and tokens:
        same(
            Routed(*route_on_cpu.route_on_cpu(z, top_k, valid, None, score == "sigmoid", renormalise, True, tile)),
            expected,
        )
        parts = gradient_module._in_tiles(z, pull, z_scale, valid, score, None, gates, tile)
        torch.testing.assert_close(parts, whole.to(dtype), **near)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("renormalise", [False, True])
def test_gradient_is_that_of_the_losses(score: Score, renormalise: bool) -> None:
    z = some_logits(50, 9, dtype=FP64).requires_grad_()
    valid = torch.rand(50, generator=torch.Generator().manual_seed(3)) > 0.3
    routed = route_reference(z, 3, valid, score=score, renormalise=renormalise)
    gates = some_gates(routed, renormalise)
    f = torch.softmax(torch.randn(9, generator=torch.Generator().manual_seed(1), dtype=FP64), 0)
    for balance, z_coef, by_gates in itertools.product((0.0, 0.7), (0.0, 0.2), (False, True)):
        loss = balance * balance_loss(z, f, valid, tokens=80, score=score) + z_coef * z_loss(z, valid, tokens=80)
        if by_gates:
            loss = loss + (gates.gradient * routed.weights).sum()
        (expected,) = torch.autograd.grad(loss, z, retain_graph=True)
        pull = balance * 9 / 80 * f if balance else None
        z_scale = torch.tensor(z_coef / 80, dtype=FP64) if z_coef else None
        parts = gates if by_gates else None
        ours = router_gradient(z.detach(), pull, z_scale, valid, score=score, gates=parts)
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-15)
        narrow = (
            None
            if parts is None
            else Gates(gates.selected, *(t.float() for t in (gates.weights, gates.gradient)), renormalise)
        )
        ours = router_gradient(z.detach().float(), pull, z_scale, valid, score=score, gates=narrow)
        torch.testing.assert_close(ours, expected.float(), rtol=1e-4, atol=1e-6)
        alone = router_gradient(z.detach(), pull, z_scale, valid, score="softmax")
        torch.testing.assert_close(
            alone.sum(-1), 2 * valid.double() * z_coef / 80 * z.detach().logsumexp(-1), atol=1e-12, rtol=1e-9
        )


def test_ties_go_to_the_lowest_expert_and_the_bias_only_selects() -> None:
    logits = torch.tensor([[0.0, -0.0, 1.0, 1.0], [-0.0, 0.0, -0.0, 0.0], [torch.inf, torch.nan, 0.0, -torch.inf]])
    routed = route(logits, 3)
    assert routed.selected.tolist() == [[2, 3, 0], [0, 1, 2], [1, 0, 2]]
    assert routed.tally.tolist() == [3, 2, 3, 1, 3, 0, 1]
    bias = torch.tensor([0.0, 0.9, 0.0, 0.0])
    for score in SCORES:
        biased = route(logits[:1], 2, None, bias, score=score)
        assert biased.selected.tolist() == [[1, 2]]
        plain = torch.softmax(logits[:1], -1) if score == "softmax" else torch.sigmoid(logits[:1])
        torch.testing.assert_close(biased.weights, plain.gather(1, biased.selected))


@pytest.mark.parametrize("score", SCORES)
def test_autocast_changes_nothing(score: Score) -> None:
    z, pull = some_logits(40, 9), torch.linspace(-1, 2, 9)
    made = []
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=BF16, enabled=autocast):
            routed = route(z, 3, score=score, renormalise=True, sums=True)
            gates = some_gates(routed, True)
            made.append([*routed, router_gradient(z, pull, torch.tensor(0.1), None, score=score, gates=gates)])
            made[-1].append(router_gradient_reference(z, pull, torch.tensor(0.1), None, score=score, gates=gates))
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


def test_padding_may_hold_anything() -> None:
    logits = torch.randn(6, 5)
    logits[[1, 4]] = torch.tensor([torch.nan, torch.inf, 0.0, 0.0, -torch.inf])
    valid = torch.tensor([True, False, True, True, False, True])
    pull, z_scale = torch.randn(5), torch.tensor(0.1)
    for score in SCORES:
        gradient = router_gradient(logits, pull, z_scale, valid, score=score)
        assert gradient.isfinite().all()
        assert not gradient[~valid].any()
        assert route(logits, 2, valid, score=score).tally[5:].tolist() == [4, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits": torch.zeros(3)}, r"logits are torch.float32 of shape \(3,\)"),
        ({"logits": torch.zeros(3, 4, dtype=torch.int32)}, "logits are torch.int32"),
        ({"top_k": 0}, "top_k is 0; for 4 experts it must be 1 to 4"),
        ({"top_k": 5}, "top_k is 5; for 4 experts it must be 1 to 4"),
        ({"valid": torch.ones(3)}, "valid is torch.float32"),
        ({"valid": torch.ones(2, dtype=torch.bool)}, r"valid is torch.bool of shape \(2,\); allowed: bool, \(3,\)"),
        ({"bias": torch.ones(3)}, r"bias is torch.float32 of shape \(3,\); allowed: floating, \(4,\)"),
        ({"bias": torch.ones(4, device="meta")}, "bias is on meta but logits on cpu"),
        ({"score": "tanh"}, "score is 'tanh'; allowed: softmax or sigmoid"),
    ],
)
def test_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        route(**{"logits": torch.zeros(3, 4), "top_k": 2, **arguments})


def test_needs_no_triton_on_a_cpu() -> None:
    program = (
        "import sys; sys.modules['triton'] = None; import torch\n"
        "from thinwire.kernels.route import route\n"
        "from thinwire.kernels.router_gradient import router_gradient\n"
        "assert route(torch.eye(3), 1).selected.tolist() == [[0], [1], [2]]\n"
        "assert not router_gradient(torch.eye(3), torch.ones(3), None, None).abs().gt(1e-7).any()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@interpreted
def test_interpreted_kernels_equal_the_reference() -> None:
    modes = itertools.cycle(itertools.product(SCORES, (True, False), (None, 0.4, 1.0), ("normal", "large", "tied")))
    tokens_of = {1: 300, 2: 5, 7: 9, 8: 130, 60: 19, 64: 16, 128: 9, 160: 4}  # one tile, or part of the last of two
    for seed, ((experts, tokens), turn) in enumerate(itertools.product(tokens_of.items(), range(2))):
        score, renormalise, padding, kind = next(modes)
        top_k, dtype = min(experts, 1 + (3 * seed) % 8), (FP32, BF16)[turn]
        bias = torch.linspace(-4, 4, experts) if kind == "normal" and turn else None
        z = some_logits(tokens, experts, kind, seed, dtype)
        drawn = torch.rand(tokens, generator=torch.Generator().manual_seed(seed))
        valid = None if padding is None else drawn >= padding
        sigmoid = score == "sigmoid"
        expected = route_reference(z, top_k, valid, bias, score=score, renormalise=renormalise, sums=True)
        same(Routed(*route_on_gpu.launch(z, top_k, valid, bias, sigmoid, renormalise, True)), expected)
        gates = some_gates(expected, renormalise, seed)
        pull, z_scale = torch.linspace(-1, 2, experts, dtype=FP64), torch.tensor(0.3, dtype=FP64)
        whole = (pull, z_scale, valid, expected.normaliser, gates)
        sparse = [(pull, None, valid, None, None), (None, z_scale, None, None, gates)][turn]
        for parts in (whole, sparse) if seed % 8 < 2 else (whole,):
            storage = torch.full((tokens + 2, experts), 7.0, dtype=dtype)
            router_gradient_on_gpu.launch(z, *parts, storage[1:-1], sigmoid=sigmoid)
            reference = router_gradient_reference(z, *parts[:3], score=score, gates=parts[4])
            near: dict[str, Any] = {"rtol": 1e-2, "atol": 1e-2} if turn else {"rtol": 1e-4, "atol": 1e-4}
            torch.testing.assert_close(storage[1:-1], reference, **near)
            assert (storage[0] == 7).all(), "wrote before the output"
            assert (storage[-1] == 7).all(), "wrote past the output"
    route_on_gpu.PROGRAMS = 2  # each takes turns
    z = some_logits(35, 128)
    routed, again = (Routed(*route_on_gpu.launch(z, 2, None, None, False, False, True)) for _ in "ab")
    same(routed, route_reference(z, 2, sums=True))
    assert all(torch.equal(a, b) for a, b in zip(routed, again, strict=True))


@needs_compiler
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_wide_and_without_spills(target: str) -> None:
    forward = {"logits": FP32, "valid": torch.uint8, "bias": FP32, "selected": torch.int64, "weights": FP32}
    forward |= {"normaliser": FP32, "tallies": torch.int32, "sums": FP32}
    everything = {"renormalise": True, "valid": True, "bias": True}
    backward = {name: FP32 for name in ("logits", "normaliser", "weights", "gate_gradient", "out")}
    backward |= {"pull": FP64, "z_scale": FP64, "valid": torch.uint8, "selected": torch.int64}
    variants = [
        (route_on_gpu.kernel, forward, route_on_gpu.compile_time(64, 8, **everything)),
        (router_gradient_on_gpu.kernel, backward, router_gradient_on_gpu.compile_time(64, 8, valid=True)),
    ]
    for kernel, tensors, constants in variants:
        compiled = compile_ahead(kernel, target, tensors=tensors, constants=constants, multiples_of_16=list(tensors))
        assert compiled.spilled == compiled.local_accesses == 0
        assert compiled.registers <= 128, "fewer than half of the lanes of a processor could be resident"
        wide = route_on_gpu.TILE * 4 // (16 * 32 * kernel.warps)
        assert compiled.wide_loads >= wide
        if kernel is router_gradient_on_gpu.kernel:
            assert compiled.wide_stores >= wide


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")


@needs_gpu
def test_gpu_equals_the_reference() -> None:
    for seed, (experts, score, renormalise) in enumerate(itertools.product((*EXPERTS, 512), SCORES, (False, True))):
        z = some_logits(3001, experts, "tied" if seed % 3 == 0 else "normal", seed)
        top_k = min(experts, 1 + seed % 8)
        valid = torch.rand(3001, generator=torch.Generator().manual_seed(seed)) > 0.2
        expected = route_reference(z, top_k, valid, score=score, renormalise=renormalise, sums=True)
        on_gpu = [route(z.cuda(), top_k, valid.cuda(), score=score, renormalise=renormalise, sums=True) for _ in "ab"]
        assert all(torch.equal(a, b) for a, b in zip(*on_gpu, strict=True)), "two calls gave different bits"
        same(Routed(*(part if part is None else part.cpu() for part in on_gpu[0])), expected)
        gates = some_gates(expected, renormalise, seed)
        pull, z_scale = torch.linspace(-1, 2, experts, dtype=FP64), torch.tensor(0.3, dtype=FP64)
        reference = router_gradient_reference(z, pull, z_scale, valid, score=score, gates=gates)
        ours = router_gradient(
            z.cuda(), pull.cuda(), z_scale.cuda(), valid.cuda(), score=score, gates=gates.map(Tensor.cuda)
        )
        torch.testing.assert_close(ours.cpu(), reference, rtol=1e-4, atol=1e-4)
