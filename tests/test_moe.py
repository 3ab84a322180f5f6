"""The mixture of experts: what each token gets, exactly; reproducible, balanced, sound in bf16 and compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from torch import Tensor, nn

from thinwire.comm.balance.balance import LoadBalance
from thinwire.comm.balance.fused import Routing
from thinwire.dist.models import MoEGPT, build_model
from thinwire.dist.models.experts import Experts
from thinwire.dist.models.grouped_product import grouped_product
from thinwire.dist.models.moe import MoE, MoESettings
from thinwire.dist.models.router import Router

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {"layers": 2, "heads": 2, "width": 16, "context": 8, "experts": 5, "top_k": 2}


def model_of(seed: int = 0, **changes: Any) -> MoEGPT:
    settings = MoESettings(**{**SHAPE, "expert_width": 6, **changes})
    model = build_model(settings, tokenizer_vocab=61, seed=seed, device=CPU)
    assert isinstance(model, MoEGPT)
    return model


def some_tokens(batch: int = 3, length: int = 8) -> Tensor:
    return torch.randint(61, (batch, length), generator=torch.Generator().manual_seed(1))


def drawn(module: nn.Module, std: float = 0.4) -> nn.Module:
    generator = torch.Generator().manual_seed(2)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std, generator=generator)
    return module.double()


def one_by_one(experts: Experts, x: Tensor, routing: Routing) -> Tensor:
    """Every expert on every token, and zero weights for those that were not selected."""
    dense = x.new_zeros(len(x), experts.experts).scatter(-1, routing.selected, routing.weights)
    hidden = torch.einsum("td,edh->teh", x, experts.input)
    if experts.gated:
        a, b = hidden.chunk(2, -1)
        hidden = F.silu(a) * b
    else:
        hidden = F.gelu(hidden)
    return torch.einsum("teh,ehd,te->td", hidden, experts.output, dense)


def gradients(out: Tensor, *wanted: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out.cos().sum(), wanted)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 37])
def test_result_and_gradients_are_those_of_every_expert_on_every_token(
    gated: bool, gate: Any, renormalise: bool, tokens: int
) -> None:
    router = drawn(Router(8, 6, 2, gate=gate, renormalise=renormalise))
    experts = drawn(Experts(6, 8, 5, gated=gated))
    assert isinstance(experts, Experts)
    x = torch.randn(tokens, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    wanted = (x, *router.parameters(), *experts.parameters())
    got = experts(x, router(x))
    expected = one_by_one(experts, x, router(x))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    for ours, theirs in zip(gradients(got, *wanted), gradients(expected, *wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_groups_may_be_empty() -> None:
    ends = torch.tensor([0, 3, 3, 7, 7], dtype=torch.int32)
    rows = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    matrices = torch.randn(5, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r, m: grouped_product(r, m, ends), (rows, matrices))
    (of_matrices,) = torch.autograd.grad(grouped_product(rows, matrices, ends).sum(), matrices)
    assert not of_matrices[[0, 2, 4]].any()


def test_torchs_grouped_kernel_is_asked_for_the_same_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is used on CUDA, in torch's own version for the CPU, which wants rows aligned alike."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(40, 16, generator=generator).requires_grad_()
    matrices = torch.randn(5, 16, 24, generator=generator).requires_grad_()
    ends = torch.tensor([0, 17, 17, 30, 40], dtype=torch.int32)
    ours = grouped_product(rows, matrices, ends)
    of_ours = gradients(ours, rows, matrices)
    monkeypatch.setattr("thinwire.dist.models.grouped_product.has_grouped_kernel", lambda rows, outer: True)
    theirs = grouped_product(rows, matrices, ends)
    of_theirs = gradients(theirs, rows, matrices)
    for one, other in zip((ours, *of_ours), (theirs, *of_theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        assert one.shape == other.shape


def test_equal_logits_select_the_lowest_experts() -> None:
    router = Router(1, 4, 2, gate="softmax", renormalise=False)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[1.0], [2.0], [1.0], [2.0]]))
    assert router(torch.tensor([[0.0], [1.0], [-1.0]])).selected.tolist() == [[0, 1], [1, 3], [0, 2]]


def test_router_decides_in_fp32_under_autocast_and_in_a_bf16_model() -> None:
    router = Router(8, 6, 2, gate="softmax", renormalise=True)
    drawn(router).float()
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(4)).bfloat16().float()
    exact = router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(router(x).weights, exact.weights)
        assert torch.equal(router(x.bfloat16()).selected, exact.selected)
    assert router.bfloat16()(x.bfloat16()).weights.dtype == torch.float32


def test_bf16_models_train() -> None:
    model, tokens = model_of(mlp="swiglu", shared_experts=1), some_tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(tokens)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.any() for p in model.parameters())
    whole = model_of().bfloat16()
    whole(tokens).float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in whole.parameters())


def test_layers_are_what_the_settings_say() -> None:
    model = model_of(layers=5, dense_every=2, shared_experts=3, mlp="gelu")
    assert [isinstance(block.mlp, MoE) for block in model.blocks] == [True, False, True, False, True]
    layer = model.moe_layers[0]
    assert (layer.experts.input.shape, layer.experts.output.shape) == ((5, 16, 6), (5, 6, 16))
    assert layer.shared is not None
    assert layer.shared.input.weight.shape == (18, 16)
    again, other = model_of(layers=5, dense_every=2, shared_experts=3), model_of(1, layers=5, dense_every=2)
    state, ours = again.state_dict(), dict(model.named_parameters())
    assert all(torch.equal(state[name], value) for name, value in ours.items())
    assert not torch.equal(ours["blocks.0.mlp.router.weight"], other.moe_layers[0].router.weight)
    narrow, wide = (float(weight.detach().std()) for weight in (layer.experts.output, layer.experts.input))
    assert [wide, narrow] == pytest.approx([0.02, 0.02 / 10**0.5], rel=0.15)


def test_a_token_changes_no_logits_before_it() -> None:
    model, tokens = model_of(), some_tokens()
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 61
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5], rtol=1e-5, atol=1e-7)
    assert not torch.allclose(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 6}, "top_k: 6 is more than the 5 experts"),
        ({"top_k": 1}, "renormalise: true .* give renormalise: false, or top_k: 2"),
        ({"dense_every": 1}, "dense_every: 1 leaves no layer with experts"),
        ({"experts": 1, "top_k": 1}, "experts"),
    ],
)
def test_shapes_without_sense_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_of(**changes)


def test_weights_come_back_from_a_file(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = model_of(3)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    again = model_of(0, weights=str(tmp_path / "model.safetensors"))
    assert torch.equal(model(some_tokens()), again(some_tokens()))
    with pytest.raises(ValueError, match=r"model\.weights: .* blocks\.0\.mlp\.experts\.input"):
        model_of(0, weights=str(tmp_path / "model.safetensors"), experts=6)


@pytest.mark.parametrize("compiled", [False, True])
def test_routers_call_balance_in_training_alone(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    """The injected gradient is that of the loss as a function of what the routers saw; alone and compiled."""
    coef, tokens = 0.5, some_tokens()

    def work(rank: Any) -> tuple[list[Tensor], list[Tensor], float]:
        model = model_of(layers=1 if compiled else 3).double()
        inputs: list[Tensor] = []
        seen: list[Routing] = []
        for layer in model.moe_layers:
            layer.router.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
            layer.router.register_forward_hook(lambda _, args, routing: seen.append(routing))
        out = model(tokens).square().sum()
        loss = out.new_zeros(())
        for layer, x, routing in zip(model.moe_layers, inputs, seen, strict=True):
            counts = torch.bincount(routing.selected.flatten(), minlength=5).double()
            p = F.linear(x, layer.router.weight).softmax(-1).mean(0)
            loss = loss + coef * 5 * (counts / counts.sum() * p).sum()
        expected = torch.autograd.grad(out + loss, list(model.parameters()))
        for layer in model.moe_layers:
            layer.router._forward_hooks.clear()
            layer.router._forward_pre_hooks.clear()
        queue = rank.queue()
        balance = LoadBalance(num_experts=5, top_k=2, coef=coef, mode="late", queue=queue)
        model.balance_with(balance)
        for layer in model.moe_layers if compiled else ():
            monkeypatch.setattr(layer, "forward", torch.compile(layer.forward, backend="aot_eager", fullgraph=True))
        got = torch.autograd.grad(model(tokens).square().sum(), list(model.parameters()))
        model.eval()
        model(tokens)
        messages = balance.metrics()["messages"]
        queue.close()
        return list(got), list(expected), messages

    got, expected, messages = run_ranks(1, work)[0]
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)
    assert messages == 1


def test_balance_of_other_experts_is_refused_and_can_be_taken_away() -> None:
    def work(rank: Any) -> None:
        queue = rank.queue()
        model = model_of()
        with pytest.raises(ValueError, match="num_experts: 4, but the routers of this model have 5"):
            model.balance_with(LoadBalance(num_experts=4, top_k=2, coef=0.1, queue=queue))
        with pytest.raises(ValueError, match="score: sigmoid, but the routers of this model have softmax"):
            model.balance_with(LoadBalance(num_experts=5, top_k=2, coef=0.1, score="sigmoid", queue=queue))
        balance = LoadBalance(num_experts=5, top_k=2, coef=0.1, queue=queue)
        model.balance_with(balance)
        assert [layer.router.name for layer in model.moe_layers] == ["blocks.0", "blocks.1"]
        model.balance_with(None)
        model(some_tokens()).sum().backward()
        assert balance.metrics()["messages"] == 0
        queue.close()

    run_ranks(1, work)


def test_biases_choose_in_eval_mode_too_and_weigh_nothing() -> None:
    def work(rank: Any) -> None:
        queue = rank.queue()
        model = model_of(layers=1, gate="sigmoid", renormalise=False)
        balance = LoadBalance(num_experts=5, top_k=2, coef=0.0, score="sigmoid", bias="sign", queue=queue)
        model.balance_with(balance)
        for _ in range(3):
            model(some_tokens()).sum().backward()
        router = model.moe_layers[0].router
        x = torch.randn(200, 16, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            learning = router(x)
            bias = balance.bias("blocks.0", x.new_zeros(1, 5))
            routing = router.eval()(x)
        assert bias is not None
        assert bias.any()
        scores = F.linear(x, router.weight).sigmoid()
        biased, plain = (z.sort(dim=-1, descending=True, stable=True).indices[:, :2] for z in (scores + bias, scores))
        assert torch.equal(routing.selected, biased)
        assert torch.equal(learning.selected, biased)
        assert not torch.equal(biased, plain)
        torch.testing.assert_close(routing.weights, scores.gather(-1, biased))
        queue.close()

    run_ranks(1, work)
