"""The GPT: causal, tied, reproducible from its seed, and sound in bf16."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from thinwire.dist.models import build_model
from thinwire.dist.models.gpt import GPT, GPTSettings, rotary_angles, rotate

CPU = torch.device("cpu")


def model_of(mlp: str = "gelu", seed: int = 0, **shape: int) -> GPT:
    settings = GPTSettings(**{"layers": 2, "heads": 4, "width": 32, "context": 16, **shape}, mlp=mlp)
    return build_model(settings, tokenizer_vocab=61, seed=seed, device=CPU)


def some_tokens(batch: int = 3, length: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randint(61, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_a_token_changes_no_logits_before_it(mlp: str) -> None:
    model, tokens = model_of(mlp), some_tokens()
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 61
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_attention_is_what_the_formula_says() -> None:
    model, x = model_of(layers=1), torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1))
    attention = model.blocks[0].attention
    turn = rotary_angles(16, 8, 10_000.0, CPU)
    q, k, v = attention.input(x).view(2, 16, 3, 4, 8).permute(2, 0, 3, 1, 4)
    scores = rotate(q, turn) @ rotate(k, turn).transpose(-1, -2) / 8**0.5
    scores = scores.masked_fill(torch.ones(16, 16, dtype=torch.bool).triu(1), -torch.inf)
    expected = attention.output((scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 16, 32))
    torch.testing.assert_close(attention(x, turn), expected, rtol=1e-5, atol=1e-6)


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    generator = torch.Generator().manual_seed(2)
    q, k = torch.randn(8, generator=generator), torch.randn(8, generator=generator)
    turn = rotary_angles(12, 8, 100.0, CPU)
    turned_q, turned_k = (rotate(x.expand(1, 1, 12, 8), turn)[0, 0] for x in (q, k))
    scores = turned_q @ turned_k.T
    for distance in range(4):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(scores[0, 0], scores[3, 0])


def test_the_embedding_is_tied() -> None:
    model = model_of()
    names = [name for name, _ in model.named_parameters()]
    assert "embedding.weight" in names
    assert not [name for name in names if "head" in name or "logit" in name]
    tokens = some_tokens() % 60  # token 60 is none of the inputs
    before = model(tokens)
    with torch.no_grad():
        model.embedding.weight[60] *= 2
    torch.testing.assert_close(model(tokens)[..., 60], 2 * before[..., 60])
    assert torch.equal(model(tokens)[..., :60], before[..., :60])


def test_the_seed_alone_decides_the_weights() -> None:
    torch.manual_seed(1)
    first = model_of(seed=5)
    torch.manual_seed(2)
    again, other = model_of(seed=5), model_of(seed=6)
    for (name, a), b, c in zip(first.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert a.dim() < 2 or not torch.equal(a, c), name


def test_building_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    model_of()
    assert torch.equal(before, torch.get_rng_state())


def test_weights_are_drawn_as_documented() -> None:
    model = model_of(width=128, layers=8)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            assert (parameter == 1).all(), name
        else:
            expected = 0.02 / 4 if name.endswith("output.weight") else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name


def test_bf16_stays_close_to_fp32() -> None:
    model, tokens = model_of(width=64), some_tokens(8)
    targets = some_tokens(8, seed=1)

    def loss_and_gradient() -> tuple[float, torch.Tensor]:
        model.zero_grad()
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    exact, exact_gradient = loss_and_gradient()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(tokens).dtype == torch.bfloat16
        rounded, rounded_gradient = loss_and_gradient()
    assert rounded_gradient.dtype == torch.float32
    assert rounded == pytest.approx(exact, rel=1e-2)
    assert rounded != exact
    assert F.cosine_similarity(exact_gradient, rounded_gradient, dim=0) > 0.995


def test_too_many_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.context: 17 tokens"):
        model_of()(some_tokens(length=17))


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused() -> None:
    settings = GPTSettings(layers=1, heads=1, width=8, context=4, vocab=60)
    with pytest.raises(ValueError, match=r"model\.vocab: 60 .* 61"):
        build_model(settings, tokenizer_vocab=61, seed=0, device=CPU)
    larger = settings.model_copy(update={"vocab": 64})
    assert build_model(larger, tokenizer_vocab=61, seed=0, device=CPU).embedding.num_embeddings == 64
