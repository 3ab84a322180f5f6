"""The load-balancing loss itself: the hand case, the identities, and the pull against autograd of the definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import Rank, run_ranks
from torch import Tensor

from thinwire.comm.balance.balance import LoadBalance
from thinwire.comm.balance.functional import balance_loss, expert_counts, gate_scores, z_loss
from thinwire.comm.balance.settings import ModeName, Scope
from thinwire.kernels.router_gradient import Score, router_gradient

SCORES: tuple[Score, ...] = ("softmax", "sigmoid")


@pytest.mark.parametrize("scope", ["micro", "global"])
def test_two_specialised_ranks_that_are_balanced_together_feel_no_force(scope: Scope) -> None:
    """Rank 0 uses experts 0 and 1, rank 1 uses 2 and 3: micro pushes each token by 0.16 / N, global by nothing."""
    p = torch.tensor([[0.4, 0.4, 0.1, 0.1], [0.1, 0.1, 0.4, 0.4]], dtype=torch.float64)

    def work(rank: Rank) -> Tensor:
        mode: ModeName | None = "sync" if scope == "global" else None
        balance = LoadBalance(num_experts=4, top_k=1, coef=1.0, scope=scope, mode=mode, ranks="sum", queue=rank.queue())
        logits = p[rank.rank].log().repeat(6, 1).requires_grad_()
        selected = (torch.arange(6) % 2 + 2 * rank.rank)[:, None]
        balance("router", logits, selected).sum().backward()
        assert logits.grad is not None
        return logits.grad - 1

    even = torch.full((4,), 0.25, dtype=torch.float64)
    own = torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]], dtype=torch.float64)
    for rank, pulled in enumerate(run_ranks(2, work)):
        sign = torch.tensor([1.0, 1, -1, -1], dtype=torch.float64) * (1 - 2 * rank)
        force = 0.16 * sign / 12 if scope == "micro" else torch.zeros(4, dtype=torch.float64)
        torch.testing.assert_close(pulled, force.expand(6, 4), rtol=0, atol=1e-15)
        assert float(balance_loss(p[rank].log()[None], own[rank])) == pytest.approx(1.6, abs=1e-15)
        assert float(balance_loss(p[rank].log()[None], even)) == pytest.approx(1.0, abs=1e-15)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(0, 12), st.sampled_from(SCORES), st.booleans())
def test_the_pull_is_the_gradient_of_the_definition(
    seed: int, experts: int, tokens: int, score: Score, masked: bool
) -> None:
    """Of both losses; and what follows from it: no force along a shift of all logits, none where f is even."""
    generator = torch.Generator().manual_seed(seed)
    z = (3 * torch.randn(tokens, experts, generator=generator, dtype=torch.float64)).requires_grad_()
    f = torch.rand(experts, generator=generator, dtype=torch.float64) + 1e-3
    f = f / f.sum()
    valid = torch.rand(tokens, generator=generator) < 0.7 if masked else None
    count, a, b = 17.0, 0.3, 0.2

    loss = a * balance_loss(z, f, valid, tokens=count, score=score) + b * z_loss(z, valid, tokens=count)
    loss.backward()
    scale = torch.tensor(b / count, dtype=torch.float64)
    pulled = router_gradient(z.detach(), a * experts / count * f, scale, valid, score=score)
    torch.testing.assert_close(pulled, z.grad, rtol=1e-12, atol=1e-14)

    balanced = router_gradient(z.detach(), a * experts / count * f, None, valid, score=score)
    even = router_gradient(z.detach(), torch.ones_like(f), None, valid, score=score)
    torch.testing.assert_close(even, torch.zeros_like(z), rtol=0, atol=1e-14)
    if score == "softmax":
        zeros = torch.zeros(tokens, dtype=torch.float64)
        kept = zeros + 1 if valid is None else valid.double()
        torch.testing.assert_close(balanced.sum(-1), zeros, rtol=0, atol=1e-14)
        lse = 2 * b / count * torch.logsumexp(z.detach(), -1) * kept
        torch.testing.assert_close((pulled - balanced).sum(-1), lse, rtol=1e-12, atol=1e-14)
    order = torch.randperm(experts, generator=generator)
    permuted = router_gradient(z.detach()[:, order], a * experts / count * f[order], None, valid, score=score)
    torch.testing.assert_close(permuted, balanced[:, order], rtol=1e-12, atol=1e-14)


def test_an_even_router_or_even_shares_give_one() -> None:
    """And 1 is no lower bound where neither is even."""
    f = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    z = torch.randn(5, 3, dtype=torch.float64)
    assert float(balance_loss(torch.zeros(5, 3, dtype=torch.float64), f)) == pytest.approx(1.0, abs=1e-15)
    assert float(balance_loss(z, torch.full_like(f, 1 / 3))) == pytest.approx(1.0, abs=1e-15)
    assert float(balance_loss(torch.tensor([[-9.0, 0, 0]]), torch.tensor([1.0, 0, 0]))) < 0.01


def test_counts() -> None:
    """Padding is left out; scores of a gate sum to 1."""
    selected = torch.tensor([[0, 1], [1, 2], [3, 3]])
    assert expert_counts(selected, 5).tolist() == [1, 2, 1, 2, 0]
    assert expert_counts(selected, 5, torch.tensor([True, True, False])).tolist() == [1, 2, 1, 0, 0]
    for score in SCORES:
        torch.testing.assert_close(gate_scores(torch.randn(4, 6), score).sum(-1), torch.ones(4))
