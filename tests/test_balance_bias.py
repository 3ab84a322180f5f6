"""Loss-free balancing: the bias follows its rule exactly, evens out the loads, and resumes bit for bit."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from ranks import Rank, run_ranks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from thinwire.comm.balance.balance import LoadBalance
from thinwire.comm.balance.functional import expert_counts
from thinwire.comm.balance.load_metrics import load_metrics
from thinwire.comm.balance.margins import bin_edges, cutoff_shift, margin_histogram
from thinwire.kernels.router_gradient import Score

EXPERTS, TOP_K, LAYERS, WIDTH = 8, 2, 2, 6


class Router(nn.Module):
    """A frozen router: its selection is by scores and bias, its weights would be by the scores alone."""

    def __init__(self, layer: int, balance: LoadBalance | None = None, score: Score = "softmax") -> None:
        super().__init__()
        seed = torch.Generator().manual_seed(layer)
        self.weight = nn.Parameter(torch.randn(WIDTH, EXPERTS, generator=seed))
        self.skew = torch.randn(EXPERTS, generator=seed)
        self.layer, self.balance, self.score = layer, balance, score

    def select(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        logits = x @ self.weight + self.skew
        scores = logits.detach().softmax(-1) if self.score == "softmax" else logits.detach().sigmoid()
        return logits, (scores if bias is None else scores + bias).topk(TOP_K, -1).indices

    def forward(self, x: Tensor) -> Tensor:
        assert self.balance is not None
        logits = x @ self.weight + self.skew
        _, selected = self.select(x, self.balance.bias(self.layer, logits))
        return self.balance(self.layer, logits, selected)


def batch(step: int, rank: int, unit: int, tokens: int = 64) -> Tensor:
    return torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(1000 * step + 10 * rank + unit))


def train(
    rank: Rank, steps: range, units: int, state: Any = None, reentrant: bool | None = None, **settings: Any
) -> tuple[list[Tensor], dict[str, Any], LoadBalance]:
    """Biases after each step, in fp32; the last state; and the balance."""
    queue = rank.queue(name=f"queue{steps.start}")
    balance = LoadBalance(num_experts=EXPERTS, top_k=TOP_K, coef=0.0, micro_batches=units, queue=queue, **settings)
    routers = [Router(layer, balance) for layer in range(LAYERS)]
    if state is not None:
        balance.load_state_dict(state)
    biases = []
    for step in steps:
        for unit in range(units):
            x = batch(step, rank.rank, unit).requires_grad_()
            runs = [r(x) if reentrant is None else checkpoint(r, x, use_reentrant=reentrant) for r in routers]
            sum(out.sum() for out in runs).backward()
        biases.append(balance.state_dict()["bias"]["values"].clone())
    return biases, balance.state_dict(), balance


@pytest.mark.parametrize("mode", ["carry", "stale"])
def test_sign_rule(mode: str) -> None:
    """b_i <- b_i + u sign(mean(c) - c_i) by the loads of all ranks and micro-batches, whose MaxVio then falls."""
    steps, rate = range(30), 0.01
    chosen: dict[str, Any] = {"mode": mode, "bias": {"kind": "sign", "rate": rate}}
    (first, _, _), (second, _, _) = run_ranks(2, lambda rank: train(rank, steps, 2, **chosen))
    expected, violations = torch.zeros(LAYERS, EXPERTS, dtype=torch.float64), []
    for step in steps:
        loads = []
        for layer in range(LAYERS):
            x = torch.cat([batch(step, rank, unit) for rank in range(2) for unit in range(2)])
            loads.append(expert_counts(Router(layer).select(x, expected[layer].float())[1], EXPERTS))
        c = torch.stack(loads).double()
        violations.append(load_metrics(c)["max_violation"])
        expected = expected + rate * (c.mean(-1, keepdim=True) - c).sign()
        expected = expected - expected.mean(-1, keepdim=True)
        assert torch.equal(first[step], second[step])
        torch.testing.assert_close(first[step], expected, rtol=0, atol=1e-12)
    assert sum(violations[-10:]) / 10 < violations[0] / 3


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_quantile_evens_out_in_a_few_steps(score: Score) -> None:
    def work(rank: Rank) -> tuple[list[float], Tensor]:
        balance = LoadBalance(
            num_experts=EXPERTS, top_k=TOP_K, coef=0.0, bias="quantile", score=score, queue=rank.queue()
        )
        router = Router(0, balance, score)
        violations = []
        for _ in range(10):
            router(batch(0, rank.rank, 0, tokens=512)).sum().backward()
            balance.finish()
            balance.begin_step()
            counts = balance._mode.last_step()
            assert counts is not None
            violations.append(load_metrics(counts[:, :EXPERTS])["max_violation"])
        return violations, balance.state_dict()["bias"]["values"]

    (violations, bias), (_, other) = run_ranks(2, work)
    assert violations[0] > 0.8
    assert violations[-1] < 0.06
    assert torch.equal(bias, other)


def test_shift_is_the_quantile_of_margins() -> None:
    """With each expert's shift added, and the cut-offs held, it would be selected by k/E of the tokens."""
    tokens, bins = 4096, 256
    logits = 2 * torch.randn(tokens, EXPERTS, generator=torch.Generator().manual_seed(1))
    bias = 0.1 * torch.randn(EXPERTS, generator=torch.Generator().manual_seed(2))
    valid = torch.arange(tokens) % 3 > 0
    counts = margin_histogram(logits, bias, TOP_K, valid, bins, "softmax").view(EXPERTS, bins)
    assert counts.sum(-1).tolist() == [int(valid.sum())] * EXPERTS
    shift = cutoff_shift(counts, TOP_K / EXPERTS)
    biased = logits[valid].softmax(-1) + bias
    margins = biased.sort(-1, descending=True).values[:, TOP_K, None] - biased
    # The bins below 0 hold the tokens that select the expert.
    assert torch.equal(counts[:, : bins // 2].sum(-1), (margins < 0).sum(0))
    exact = margins.double().quantile(TOP_K / EXPERTS, dim=0)
    edges = bin_edges(bins)
    place = torch.bucketize(exact, edges) - 1
    assert ((shift - exact).abs() <= (edges[place + 1] - edges[place])).all()
    assert cutoff_shift(torch.zeros(2, 3, bins), 0.25).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("bias", ["sign", "quantile"])
def test_resumes_bit_for_bit_also_with_other_ranks_and_under_recomputation(bias: str) -> None:
    whole = run_ranks(2, lambda rank: train(rank, range(6), 2, bias=bias)[0])
    for reentrant in (False, True):
        recomputed = run_ranks(2, partial(train, steps=range(4), units=2, bias=bias, reentrant=reentrant))
        assert torch.equal(recomputed[0][0][3], whole[0][3])
    states = [state for _, state, _ in recomputed]
    rest = run_ranks(2, lambda rank: train(rank, range(4, 6), 2, states[rank.rank], bias=bias)[0])
    assert torch.equal(rest[1][-1], whole[1][-1])
    alone, state, _ = run_ranks(1, lambda rank: train(rank, range(0, 1), 1, {"all_ranks": states}, bias=bias))[0]
    assert not torch.equal(alone[0], states[0]["bias"]["values"])
    assert state["layers"] == ["0", "1"]


def test_evaluation_changes_nothing() -> None:
    def work(rank: Rank) -> None:
        _, _, balance = train(rank, range(2), 1, bias="sign")
        router = Router(0, balance)
        x = batch(7, rank.rank, 0)
        with torch.no_grad():
            before = balance.bias(0, x @ router.weight)
            router(x)
            assert torch.equal(balance.bias(0, x @ router.weight), before)  # type: ignore[arg-type]
        assert balance.metrics()["messages"] == 2
        assert balance.metrics()["bias_range"] > 0

    run_ranks(1, work)


def test_compiled_code_asks_anew_in_every_step() -> None:
    def work(rank: Rank) -> None:
        biases = []
        for compiled in (False, True):
            queue = rank.queue(name=f"compiled {compiled}")
            balance = LoadBalance(num_experts=EXPERTS, top_k=TOP_K, coef=0.1, bias="quantile", queue=queue)
            router = Router(0, balance)
            run = torch.compile(router, backend="aot_eager", fullgraph=True) if compiled else router
            for step in range(3):
                run(batch(step, rank.rank, 0)).square().sum().backward()
            biases.append(balance.state_dict()["bias"]["values"])
        assert torch.equal(*biases)

    run_ranks(1, work)


def test_refusals() -> None:
    def work(rank: Rank) -> None:
        queue = rank.queue()

        def build(**settings: Any) -> LoadBalance:
            defaults: dict[str, Any] = {"num_experts": EXPERTS, "top_k": TOP_K, "coef": 0.0, "queue": queue}
            return LoadBalance(**defaults | settings)

        for settings, message in (
            ({"bias": "sign", "scope": "micro"}, r"bias: sign follows .* scope: micro"),
            ({"bias": "sign", "scope": "node"}, "scope: node"),
            ({"bias": {"kind": "quantile", "bins": 9}}, "multiple of 2"),
            ({"bias": "median"}, "quantile"),
            ({"bias": "quantile", "top_k": EXPERTS}, "all 8 experts"),
        ):
            with pytest.raises((ValueError, ValidationError), match=message):
                build(**settings)
        logits = torch.randn(4, EXPERTS, requires_grad=True)
        assert build().bias(0, logits) is None
        with pytest.raises(ValueError, match=r"layer 0 has not asked for it; let it select .* balance.bias"):
            build(bias="sign")(0, logits, logits.topk(TOP_K).indices)
        with pytest.raises(ValueError, match=r"balance.bias: the checkpoint has biases"):
            build().load_state_dict(build(bias="sign").state_dict())

    run_ranks(1, work)
