"""Expert use by domain: the numbers against hand cases, and what is gathered from a model."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from thinwire.comm.balance.load_metrics import load_metrics
from thinwire.comm.balance.specialisation import frequencies, overlap, own_experts, specialisation
from thinwire.dist.data import Windows
from thinwire.dist.expert_use import expert_use
from thinwire.dist.models.moe import MoEGPT, MoESettings
from thinwire.dist.models.router import Router
from thinwire.dist.tokenizer import ByteTokenizer

CPU = torch.device("cpu")


def test_load_metrics_of_a_hand_case() -> None:
    numbers = load_metrics(torch.tensor([[10, 20, 30, 40]]))
    assert numbers["max_violation"] == numbers["mean_max_violation"] == pytest.approx(0.6)
    assert numbers["load_cv"] == pytest.approx(math.sqrt(0.2), abs=1e-12)
    assert numbers["load_entropy"] == pytest.approx(0.9232, abs=5e-5)


def test_specialisation_of_hand_cases() -> None:
    apart = torch.diag(torch.tensor([5, 70, 900]))
    alike = torch.tensor([[1, 2, 3], [10, 20, 30], [2, 4, 6]])
    # Half of what a token selects tells its domain, and half tells nothing.
    half = torch.tensor([[4, 0, 4], [0, 4, 4]])
    assert specialisation(apart) == pytest.approx(1.0, abs=1e-12)
    assert specialisation(alike) == pytest.approx(0.0, abs=1e-12)
    assert specialisation(half) == pytest.approx(0.5, abs=1e-12)
    assert torch.allclose(specialisation(torch.stack([apart, alike])), torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert frequencies(half).tolist() == [[0.5, 0, 0.5], [0, 0.5, 0.5]]


counts = st.lists(st.lists(st.integers(0, 1000), min_size=5, max_size=5).filter(any), min_size=2, max_size=4)


@given(counts, st.permutations(range(5)), st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_specialisation_is_mutual_information_whatever_a_domains_size(
    rows: list[list[int]], order: list[int], times: int
) -> None:
    c = torch.tensor(rows)
    given_domain = c.double() / c.sum(-1, keepdim=True)
    conditional = sum(float(-(p[p > 0] * p[p > 0].log()).sum()) for p in given_domain) / len(rows)
    expert = given_domain.mean(0)
    entropy = float(-(expert[expert > 0] * expert[expert > 0].log()).sum())
    value = float(specialisation(c))
    assert value == pytest.approx((entropy - conditional) / math.log(len(rows)), abs=1e-9)
    assert -1e-12 <= value <= 1 + 1e-12
    c[0] *= times
    assert float(specialisation(c[:, order])) == pytest.approx(value, abs=1e-9)


def test_overlap_of_the_experts_that_domains_select_most() -> None:
    c = torch.zeros(3, 20, dtype=torch.int64)
    c[0, [3, 4]] = c[1, [4, 5]] = 9
    c[2, 19] = 1  # the second place is a tie of all others: the lowest number is first
    assert own_experts(c).nonzero().tolist() == [[0, 3], [0, 4], [1, 4], [1, 5], [2, 0], [2, 19]]
    third = pytest.approx(1 / 3)
    assert overlap(c).tolist() == [[1, third, 0], [third, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_expert_use_of_a_model(gate: str) -> None:
    shape = {"layers": 3, "heads": 2, "width": 16, "context": 8, "experts": 6, "top_k": 2, "expert_width": 8}
    model = MoEGPT(MoESettings.model_validate({"kind": "moe", "gate": gate, "dense_every": 3, **shape}), 256)
    model.initialise(0)
    texts = {"low": bytes(range(100)), "high": bytes(range(100, 250)), "short": bytes(40)}
    windows = {name: Windows(ByteTokenizer().encode([text]), 8, name) for name, text in texts.items()}

    whole = expert_use(model, windows, count=9, batch=2, device=CPU, precision=nullcontext())
    assert model.training
    assert whole.tokens.tolist() == [8 * 9, 8 * 9, 8 * 5]  # the last domain has 5 windows
    assert torch.equal(whole.counts.sum(-1), 2 * whole.tokens.expand(2, 3))
    everything = windows["high"].batch([i * 18 // 9 for i in range(9)], CPU)
    selected: list[Tensor] = []
    scores: list[float] = []
    for layer in model.moe_layers:
        layer.router.register_forward_hook(lambda _, given, routing: selected.append(routing.selected))
        layer.router.register_forward_hook(
            lambda router, given, _: scores.append(float(scores_of(router, given[0]).topk(2).values.sum()))
        )
    with torch.no_grad():
        logits = model(everything.inputs).flatten(0, 1)
    for layer, chosen in enumerate(selected):
        assert whole.counts[layer, 1].tolist() == torch.bincount(chosen.flatten(), minlength=6).tolist()
    assert whole.scores[:, 1].tolist() == pytest.approx(scores, rel=1e-5)
    nats = float(F.cross_entropy(logits, everything.targets.flatten()))
    assert whole.perplexities()["high"] == pytest.approx(math.exp(nats), rel=1e-5)
    metrics = whole.metrics()
    assert metrics["val_loss"] == pytest.approx(sum(math.log(p) for p in whole.perplexities().values()) / 3)
    assert metrics["specialisation"] == pytest.approx(float(specialisation(whole.counts).mean()))
    parts = [
        expert_use(model, windows, count=9, batch=2, device=CPU, precision=nullcontext(), part=(r, 2)) for r in (0, 1)
    ]
    both = parts[0] + parts[1]
    assert torch.equal(both.counts, whole.counts)
    assert both.nats.tolist() == pytest.approx(whole.nats.tolist(), rel=1e-12)


def scores_of(router: Router, x: Tensor) -> Tensor:
    logits = x @ router.weight.T
    return logits.softmax(-1) if router.gate == "softmax" else F.normalize(logits.sigmoid(), p=1, dim=-1)
