"""LoadBalance.route() against the separate door: the same selections, counts, weights and gradients of everything."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from thinwire.comm.balance.balance import LoadBalance
from thinwire.comm.balance.fused import route_experts
from thinwire.kernels.router_gradient import Score

EXPERTS, TOP_K, WIDTH = 6, 2, 5


class Layer(nn.Module):
    """A router whose experts are matrices, all of them computed."""

    def __init__(self, name: str, score: Score, renormalise: bool) -> None:
        super().__init__()
        self.name, self.score, self.renormalise = name, score, renormalise
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) * 0.4)
        self.balance: LoadBalance | None = None
        self.fused = True
        self.bias: Tensor | None = None

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        logits = self.gate(x)
        if self.balance is None or self.fused:
            if self.balance is None:
                how = {"score": self.score, "renormalise": self.renormalise}
                selected, weights = route_experts(logits, TOP_K, valid_mask=valid, bias=self.bias, **how)
            else:
                selected, weights = self.balance.route(
                    self.name, logits, valid, bias=self.bias, renormalise=self.renormalise
                )
        else:
            bias = self.balance.bias(self.name, logits) if self.bias is None else self.bias
            scores = logits.softmax(-1) if self.score == "softmax" else logits.sigmoid()
            ranked = logits if bias is None else scores + bias
            selected = ranked.detach().argsort(dim=-1, descending=True, stable=True)[..., :TOP_K]
            logits = self.balance(self.name, logits, selected, valid)
            scores = logits.softmax(-1) if self.score == "softmax" else logits.sigmoid()
            weights = scores.gather(-1, selected)
            if self.renormalise:
                weights = weights / weights.sum(-1, keepdim=True)
        out = torch.tanh(torch.einsum("...d,edh->...eh", x, self.experts))
        return x + (weights[..., None] * out.gather(-2, selected[..., None].expand(*selected.shape, WIDTH))).sum(-2)


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype, score: Score, renormalise: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(f"layer {n}", score, renormalise) for n in range(2)).to(dtype)
        self.reentrant: bool | None = None

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        for layer in self.layers:
            plain = self.reentrant is None
            x = layer(x, valid) if plain else checkpoint(layer, x, valid, use_reentrant=self.reentrant)
        return x

    def use(self, balance: LoadBalance | None, *, fused: bool) -> None:
        for layer in self.layers:
            layer.balance, layer.fused = balance, fused


def batches(dtype: torch.dtype) -> list[tuple[Tensor, Tensor | None]]:
    """Two micro-batches: whole; and of another shape, with padding."""
    generator = torch.Generator().manual_seed(5)
    first, second = (torch.randn(*shape, WIDTH, generator=generator, dtype=dtype) for shape in ((30,), (3, 8)))
    return [(first, None), (second, torch.rand(3, 8, generator=generator) > 0.3)]


@pytest.mark.parametrize(
    ("score", "renormalise", "settings"),
    [
        ("softmax", True, {"mode": "late", "z_coef": 0.05, "micro_coef": 0.1}),
        ("softmax", False, {"mode": "stale"}),
        ("sigmoid", True, {"mode": "stale", "bias": {"kind": "sign", "rate": 0.1}}),
        ("sigmoid", False, {"mode": "sync", "bias": {"kind": "quantile"}, "z_coef": 0.05}),
    ],
    ids=str,
)
def test_equals_the_separate_door(score: Score, renormalise: bool, settings: dict[str, Any]) -> None:
    def work(rank: Any) -> None:
        for dtype, near in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
            of_door = {}
            for fused, reentrant in itertools.product((True, False), (None, False, True)):
                if reentrant is not None and not (fused and dtype == torch.float64):
                    continue
                net = Net(dtype, score, renormalise)
                net.reentrant = reentrant
                queue = rank.queue(name=f"{fused}{reentrant}{dtype}")
                balance = LoadBalance(
                    num_experts=EXPERTS, top_k=TOP_K, coef=0.3, score=score, micro_batches=2, queue=queue, **settings
                )
                net.use(balance, fused=fused)
                for _ in range(3):
                    net.zero_grad()
                    outs = [net(x.clone().requires_grad_(), valid) for x, valid in batches(dtype)]
                    for out in outs[::-1]:
                        out.square().sum().backward()
                    balance.finish()
                gradients = [parameter.grad for parameter in net.parameters()]
                of_door[fused, reentrant] = gradients, balance.metrics(), balance.state_dict()
                queue.close()
            expected, metrics, state = of_door[False, None]
            for gradients, measured, held in of_door.values():
                torch.testing.assert_close(gradients, expected, rtol=near, atol=near)
                assert measured == pytest.approx(metrics)
                assert str(held) == str(state)

    with torch.random.fork_rng():
        run_ranks(1, work)


def test_balances_nothing_in_eval_mode_and_learns_all_the_same() -> None:
    def work(rank: Any) -> None:
        queue = rank.queue()
        net = Net(torch.float32, "softmax", True)
        balance = LoadBalance(num_experts=EXPERTS, top_k=TOP_K, coef=0.3, queue=queue)
        net.use(balance, fused=True)
        balance.watch(net)
        (x, _), _ = batches(torch.float32)
        net.eval()
        evaluated = net(x, None)
        with torch.no_grad():
            net.train()
            assert torch.equal(net(x, None), evaluated)
        assert balance.metrics()["messages"] == 0
        net.use(None, fused=True)
        alone = net(x, None)
        assert torch.equal(alone, evaluated)
        gradients = [torch.autograd.grad(out.sum(), list(net.parameters())) for out in (evaluated, alone)]
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
        queue.close()

    run_ranks(1, work)


def test_is_one_operator_to_the_compiler() -> None:
    def work(rank: Any) -> None:
        (x, _), _ = batches(torch.float32)
        made = []
        for compiled in (False, True):
            queue = rank.queue(name=str(compiled))
            net = Net(torch.float32, "softmax", True)
            net.use(LoadBalance(num_experts=EXPERTS, top_k=TOP_K, coef=0.3, mode="late", queue=queue), fused=True)
            run = torch.compile(net, backend="aot_eager", fullgraph=True) if compiled else net
            run(x, None).square().sum().backward()
            made.append([parameter.grad for parameter in net.parameters()])
            queue.close()
        torch.testing.assert_close(*made, rtol=1e-6, atol=1e-6)

    run_ranks(1, work)


def test_refuses_a_second_bias_and_wrong_shapes() -> None:
    def work(rank: Any) -> None:
        queue = rank.queue()
        bias = torch.zeros(EXPERTS)
        own = LoadBalance(num_experts=EXPERTS, top_k=TOP_K, coef=0.3, bias={"kind": "sign"}, queue=queue)
        with pytest.raises(ValueError, match="LoadBalance has its own"):
            own.route("a", torch.zeros(3, EXPERTS), bias=bias)
        with pytest.raises(ValueError, match=r"logits are torch.float32 of shape \(3, 5\)"):
            own.route("a", torch.zeros(3, EXPERTS - 1))
        with pytest.raises(ValueError, match="valid_mask is torch"):
            own.route("a", torch.zeros(3, EXPERTS), torch.zeros(3))
        queue.close()

    run_ranks(1, work)
