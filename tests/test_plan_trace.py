"""The trace of a step: what a real step computes and keeps, in the order in which a real one's gradients come."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from thinwire.dist.models import build_model
from thinwire.dist.models.gpt import GPTSettings
from thinwire.dist.models.moe import MoESettings
from thinwire.dist.plan import trace as trace_module
from thinwire.dist.plan.trace import StepTrace, ddp_buckets, trace_step

GPT_SHAPE = GPTSettings(layers=5, heads=2, width=16, context=8, vocab=32)
MOE_SHAPE = MoESettings(layers=2, heads=2, width=16, context=8, vocab=32, experts=4, top_k=2, expert_width=24)
META = torch.device("meta")
BATCH = 3


def model_of(shape: GPTSettings, device: torch.device = META) -> torch.nn.Module:
    return build_model(shape, tokenizer_vocab=32, seed=0, device=device)


def traced(model: torch.nn.Module, **options) -> StepTrace:
    tokens = torch.zeros(BATCH, 8, dtype=torch.long, device=META)
    return trace_step(model, tokens, tokens, **options)


def really(model: torch.nn.Module, context=None) -> tuple[list[str], int]:
    """Order of the gradients and bytes kept for backward of a real step on the CPU."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}
    came: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: came.append(name))

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in own:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    tokens = torch.randint(32, (BATCH, 8))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), context or torch.enable_grad():
        loss = F.cross_entropy(model(tokens).flatten(0, -2).float(), tokens.flatten())
    count = sum(t.untyped_storage().nbytes() for t in kept.values())
    loss.backward()
    return came, count


def test_operations_are_those_of_the_products() -> None:
    """Of a GPT: 2 for each weight of a matrix and token forwards, 4 backwards; attention's two products, and five."""
    found = traced(model_of(GPT_SHAPE))
    weights = 5 * 12 * 16**2 + 32 * 16  # the output embedding multiplies, the input one does not
    scores = 5 * BATCH * 2 * 8 * 8 * 8  # layers, sequences, heads, length, length, width of a head
    assert found.forward_flops == 2 * weights * BATCH * 8 + 2 * 2 * scores
    assert found.backward_flops == 4 * weights * BATCH * 8 + 5 * 2 * scores


def test_experts_are_counted_as_their_products() -> None:
    found = traced(model_of(MOE_SHAPE))
    dense = 2 * (4 * 16**2 + 4 * 16) + 32 * 16  # attention and router of two layers, embedding
    rows = 2 * BATCH * 8  # top_k
    scores = 2 * BATCH * 2 * 8 * 8 * 8
    experts = 2 * rows * 2 * 16 * 24
    assert found.forward_flops == 2 * dense * BATCH * 8 + 2 * experts + 2 * 2 * scores
    assert found.backward_flops == 4 * dense * BATCH * 8 + 4 * experts + 5 * 2 * scores


@pytest.mark.parametrize("shape", [GPT_SHAPE, MOE_SHAPE], ids=["gpt", "moe"])
def test_a_real_step_has_the_same_order_and_keeps_as_much(shape: GPTSettings) -> None:
    found = traced(model_of(shape))
    came, kept = really(model_of(shape, torch.device("cpu")))
    assert [name for name, _ in found.ready] == came
    assert [share for _, share in found.ready] == sorted(share for _, share in found.ready)
    assert found.ready[-1] == ("embedding.weight", 1.0)
    assert found.activation_bytes == pytest.approx(kept, rel=0.02)  # a few numbers of the loss and the router


def test_precision_of_the_run_is_that_of_the_trace() -> None:
    def autocast() -> torch.autocast:
        return torch.autocast("cpu", dtype=torch.bfloat16)

    half, whole = traced(model_of(GPT_SHAPE), context=autocast), traced(model_of(GPT_SHAPE))
    _, kept = really(model_of(GPT_SHAPE, torch.device("cpu")), autocast())
    assert half.activation_bytes + half.cast_bytes == pytest.approx(kept, rel=0.02)
    assert half.activation_bytes < 0.95 * whole.activation_bytes
    # All matrices but the input embedding's, which is no product; it is the output's too.
    assert (half.cast_bytes, whole.cast_bytes) == (2 * (5 * 12 * 16**2 + 32 * 16), 0)
    assert half.forward_flops == whole.forward_flops


def test_equal_blocks_are_counted_once_and_give_the_whole_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(GPT_SHAPE)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("attention_norm" in name)  # the first block then needs no gradient of its input
    for one in (model, model_of(GPT_SHAPE)):
        short = traced(one)
        monkeypatch.setattr(trace_module, "has_equal_blocks", lambda _: False)
        whole = traced(one)
        monkeypatch.undo()
        assert short == whole
        assert len(whole.blocks) == 5
        assert [name for name, _ in whole.used][:2] == ["embedding.weight", "blocks.0.attention_norm.weight"]


def test_checkpointed_blocks_keep_their_input_and_compute_twice() -> None:
    whole = traced(model_of(GPT_SHAPE))
    thin = whole.checkpointed()
    block = whole.blocks[1]
    assert block.input_bytes == BATCH * 8 * 16 * 4
    assert thin.backward_flops - whole.backward_flops == 5 * block.forward_flops
    spared = sum(one.activation_bytes for one in whole.blocks)
    largest = max(one.activation_bytes for one in whole.blocks)
    assert thin.activation_bytes == whole.activation_bytes - spared + 5 * block.input_bytes + largest


def test_the_model_is_left_as_it_is() -> None:
    model = model_of(GPT_SHAPE)
    before = copy.deepcopy(model.state_dict())
    traced(model)
    assert all(p.is_meta and p.grad is None for p in model.parameters())
    assert list(model.state_dict()) == list(before)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_buckets_fill_in_the_order_of_the_gradients() -> None:
    tensors = [(name, torch.empty(n, device="meta")) for name, n in (("d", 10), ("c", 20), ("b", 30), ("a", 1))]
    assert ddp_buckets(tensors, 100) == [["d", "c"], ["b"], ["a"]]
