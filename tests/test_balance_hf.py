"""balance_hf: models of Hugging Face, tiny and with random weights, are balanced by the global batch."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from ranks import Rank, run_ranks
from torch import Tensor, nn

import thinwire as tw
from thinwire.comm.balance.functional import balance_loss, expert_counts
from thinwire.comm.balance.hugging_face import tie

transformers = pytest.importorskip("transformers")

EXPERTS, TOP_K, COEF, WORDS = 6, 2, 0.3, 32
SIZES: dict[str, int] = {
    "vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_experts_per_tok": TOP_K,
}  # fmt: skip
_building = threading.Lock()


def make_model(kind: str, layers: int = 2) -> Any:
    sizes = SIZES | {"num_hidden_layers": layers}
    with _building:
        torch.manual_seed(0)
        match kind:
            case "mixtral":
                config = transformers.MixtralConfig(**sizes, num_local_experts=EXPERTS)
                model = transformers.MixtralForCausalLM(config)
            case "qwen2_moe":  # its first layer is dense
                config = transformers.Qwen2MoeConfig(
                    **sizes, num_experts=EXPERTS, moe_intermediate_size=8, shared_expert_intermediate_size=8,
                    mlp_only_layers=[0] if layers > 1 else [],
                )  # fmt: skip
                model = transformers.Qwen2MoeForCausalLM(config)
            case "qwen3_moe":
                config = transformers.Qwen3MoeConfig(**sizes, num_experts=EXPERTS, moe_intermediate_size=8, head_dim=8)
                model = transformers.Qwen3MoeForCausalLM(config)
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):
                nn.init.normal_(parameter, std=0.5)
    model.set_experts_implementation("eager")  # the other ones know no fp64
    return model.train()


def padded_batches() -> list[list[tuple[Tensor, Tensor]]]:
    """For 2 ranks and 2 micro-batches each: tokens and attention masks, padded on one side or the other, or not."""
    generator = torch.Generator().manual_seed(1)
    words = lambda *shape: torch.randint(WORDS, shape, generator=generator)  # noqa: E731
    left, right, whole = torch.ones(2, 7).long(), torch.ones(2, 7).long(), torch.ones(1, 3).long()
    left[0, :4], right[1, 5:] = 0, 0
    return [[(words(2, 7), left), (words(2, 7), right)], [(words(1, 3), whole), (words(2, 7), 1 - left)]]


def one_process(model: Any, batches: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The gradient of the loss's definition, over all batches, from the logits that the model itself shows."""
    logits: dict[int, list[Tensor]] = {}
    for words, mask in batches:
        shown = model(words, attention_mask=mask, output_router_logits=True).router_logits
        for layer, z in enumerate(shown):
            logits.setdefault(layer, []).append(z[mask.flatten() > 0])
    loss = torch.zeros((), dtype=torch.float64)
    for parts in logits.values():
        z = torch.cat(parts)
        counts = expert_counts(z.topk(TOP_K).indices, EXPERTS).double()
        loss = loss + COEF * balance_loss(z, counts / counts.sum())
    loss.backward()
    return gradients(model)


def gradients(model: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def worst(ours: list[Tensor], theirs: list[Tensor]) -> float:
    largest = max(float(b.abs().max()) for b in theirs)
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) / largest


@pytest.mark.parametrize(
    ("kind", "reentrant"), [("mixtral", None), ("mixtral", True), ("qwen2_moe", False), ("qwen3_moe", True)]
)
def test_gradients_are_those_of_one_big_batch_whatever_is_padded_or_recomputed(kind: str, reentrant: Any) -> None:
    model, batches = make_model(kind).double(), padded_batches()

    def work(rank: Rank) -> list[Tensor]:
        with _building:
            own = copy.deepcopy(model)
        if reentrant is not None:
            own.activation_checkpointing_enable({"use_reentrant": reentrant})
        queue = rank.queue()
        balance = tw.LoadBalance(
            num_experts=EXPERTS, top_k=TOP_K, coef=COEF, mode="late", micro_batches=2, ranks="sum", queue=queue
        )
        tw.balance_hf(own, balance)
        # All forward passes first: a layer that is then recomputed must see the mask of its own micro-batch.
        outputs = [own(words, attention_mask=mask, use_cache=False).logits for words, mask in batches[rank.rank]]
        for output in outputs:
            (0.0 * output.sum()).backward()
        assert balance.metrics()["messages"] == 2.0
        queue.close()
        return gradients(own)

    first, second = run_ranks(2, work)
    expected = one_process(model, [*batches[0], *batches[1]])
    assert worst([a + b for a, b in zip(first, second, strict=True)], expected) < 1e-12


def test_scope_micro_with_a_converted_coefficient_is_their_own_loss() -> None:
    """On one layer; their loss is in their own gradients, ours enters beside the plain loss."""
    ours, theirs = make_model("mixtral", layers=1), make_model("mixtral", layers=1)
    words, mask = padded_batches()[0][0]
    theirs.router_aux_loss_coef = 0.25
    result = theirs(words, attention_mask=mask, labels=words, output_router_logits=True)
    result.loss.backward()

    def work(rank: Rank) -> None:
        queue = rank.queue()
        balance = tw.LoadBalance(num_experts=EXPERTS, top_k=TOP_K, coef=0.25 * TOP_K / 1, scope="micro", queue=queue)
        hooks = tw.balance_hf(ours, balance)
        again = ours(words, attention_mask=mask, labels=words, output_router_logits=True)
        again.loss.backward()
        assert again.aux_loss == result.aux_loss, "still shown"
        assert again.loss < result.loss, "but not added"
        hooks.remove()
        assert ours.router_aux_loss_coef == transformers.MixtralConfig().router_aux_loss_coef
        queue.close()

    run_ranks(1, work)
    plain = make_model("mixtral", layers=1)
    plain(words, attention_mask=mask, labels=words).loss.backward()
    assert worst(gradients(ours), gradients(theirs)) < 1e-6
    assert worst(gradients(plain), gradients(theirs)) > 1e-4, "the loss is large enough for this test to see it"


def test_their_loss_is_top_k_times_ours_and_pools_layers() -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    generator = torch.Generator().manual_seed(2)
    z = torch.randn(40, EXPERTS, generator=generator)
    mask = torch.rand(4, 10, generator=generator) < 0.7
    valid = mask.flatten()
    counts = expert_counts(z.topk(TOP_K).indices, EXPERTS, valid).float()
    ours = balance_loss(z, counts / counts.sum(), valid)
    theirs = load_balancing_loss_func((z,), EXPERTS, TOP_K, mask.long())
    torch.testing.assert_close(theirs, TOP_K * ours)
    # Three layers that route alike: each one's gradient is top_k / layers of what ours, summed over layers, gives it.
    layers = tuple(z.clone().requires_grad_() for _ in range(3))
    load_balancing_loss_func(layers, EXPERTS, TOP_K, mask.long()).backward()
    single = z.clone().requires_grad_()
    (TOP_K / 3 * balance_loss(single, counts / counts.sum(), valid)).backward()
    for layer in layers:
        torch.testing.assert_close(layer.grad, single.grad)


def test_what_cannot_be_balanced_is_refused() -> None:
    def work(rank: Rank) -> None:
        queue = rank.queue()
        balance = tw.LoadBalance(num_experts=EXPERTS, top_k=TOP_K, coef=0.1, queue=queue)
        with pytest.raises(ValueError, match="model: found no routers in Linear"):
            tw.balance_hf(nn.Linear(2, 2), balance)
        model = make_model("qwen3_moe", layers=1)
        words = torch.zeros(1, 4, dtype=torch.long)
        hooks = tw.balance_hf(model, balance)
        with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.gate is balanced already"):
            tw.balance_hf(nn.Sequential(model), balance)
        with pytest.raises(ValueError, match=r"attention_mask: of shape \(1, 1, 4, 4\) for 4 tokens"):
            model(words, attention_mask=torch.ones(1, 1, 4, 4))
        before = balance.metrics()
        model.eval()
        model(words).logits.sum().backward()
        assert balance.metrics() == before, "evaluation, with gradients on, counts nothing"
        model.train()
        hooks.remove()
        wrong = tw.LoadBalance(num_experts=EXPERTS + 2, top_k=TOP_K, coef=0.1, queue=queue)
        tw.balance_hf(model, wrong)
        with pytest.raises(ValueError, match=r"layer model.layers.0.mlp.gate: logits are .* num_experts = 8"):
            model(words)
        queue.close()

    run_ranks(1, work)


def test_compiled_routers_count_in_the_forward_pass_and_pull_in_the_backward_pass() -> None:
    """Their logits lead nowhere but to the weights, so a compiler is free to move or drop what is done to them."""

    def work(rank: Rank) -> None:
        queue = rank.queue()
        balance = tw.LoadBalance(
            num_experts=EXPERTS, top_k=TOP_K, coef=COEF, mode="late", layers=["router"], micro_batches=2, queue=queue
        )

        def route(x: Tensor, w: Tensor) -> Tensor:
            logits = x @ w
            weights, selected = logits.softmax(-1).topk(TOP_K)
            return tie(weights, balance("router", logits, selected)).sum()

        generator = torch.Generator().manual_seed(4)
        batches, w = torch.randn(2, 20, 4, generator=generator), torch.randn(4, EXPERTS, generator=generator)
        found = []
        for function in (route, torch.compile(route, backend="aot_eager", fullgraph=True)):
            leaf = w.clone().requires_grad_()
            outputs = [function(x, leaf) for x in batches]
            assert balance.metrics()["messages"] == 2 * (len(found) + 1), "both have counted"
            for output in outputs:  # a pull that came with its forward pass would not know the second batch
                output.backward()
            found.append((torch.stack(outputs), leaf.grad))
        torch.testing.assert_close(found[1], found[0])
        balance.remove()
        plain = w.clone().requires_grad_()
        (route(batches[0], plain) + route(batches[1], plain)).backward()
        assert not torch.allclose(found[0][1], plain.grad)
        queue.close()

    run_ranks(1, work, timeout_s=300.0)  # compiling is slow on a busy machine
