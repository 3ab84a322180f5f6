"""A plan of a pretrained model: its folder's config.json is enough, and its weights are not read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from thinwire.dist.config import RunConfig, load_config
from thinwire.dist.plan.cluster import load_cluster
from thinwire.dist.plan.prediction import predict, subject_of

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "It", "was", "."]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An encoder and a causal model without weights."""
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]", model_max_length=16
    )
    shape = {"vocab_size": 10, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    longest = {"intermediate_size": 32, "max_position_embeddings": 16}
    bert = transformers.BertConfig(**shape, **longest, architectures=["BertModel"])
    gpt2 = transformers.GPT2Config(
        vocab_size=10,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=0,
        architectures=["GPT2LMHeadModel"],
    )
    made = {}
    for name, model in (("encoder", bert), ("causal", gpt2)):
        made[name] = tmp_path_factory.mktemp("hf") / name
        model.save_pretrained(made[name])
        tokenizer.save_pretrained(made[name])
    return made


def run(folder: Path, template: str, *overrides: str) -> RunConfig:
    return load_config(
        CONFIGS / "onebyte_hf.yaml",
        [
            f"model={{kind: hf, path: {folder}, context: 8}}",
            f"data.template='{template}'",
            "data.labels={a: good, b: bad}",
            *overrides,
        ],
    )


def test_a_pretrained_model_is_planned_from_its_shape(folders: dict[str, Path]) -> None:
    encoder = run(folders["encoder"], "It was {label}.")
    subject = subject_of(encoder, 4)
    names = {p.name: p.trained for p in subject.parameters}
    assert all(p.is_meta for p in subject.model.parameters())
    assert names["encoder.layer.0.attention.output.LayerNorm.weight"]
    assert not names["encoder.layer.0.attention.self.query.weight"]
    # Per token 24 h^2 for each of two layers, with h = 16 and an MLP twice as wide in place of four times: 16 h^2. Four
    # texts of 8 tokens and the prompts of two classes, of 4; attention's products besides.
    dense = 2 * 16 * 16**2 * (4 * 8 + 2 * 4)
    scores = 2 * 2 * 2 * 16 * (4 * 8 * 8 + 2 * 4 * 4)
    similarities = 2 * 4 * 16 * 2
    assert subject.trace.forward_flops == dense + scores + similarities
    boxes = load_cluster(CONFIGS / "clusters" / "four_boxes_1gbit.yaml")
    found = predict(encoder, boxes, subject)
    assert found.sent_bytes == {"world": pytest.approx(3 * encoder.method.samples, rel=0.01)}  # and now and then a hash
    assert found.memory_bytes["params"] == 4 * sum(p.numel() for p in subject.model.parameters())

    causal = run(folders["causal"], "{text} It was {label}", 'train.parameters=["*"]', "train.precision=bf16")
    traced = subject_of(causal, 4)
    assert traced.trace.forward_flops > 0
    assert {name for name, _ in traced.trace.ready} == {name for name, _ in traced.model.named_parameters()}
    assert torch.float32 in {p.dtype for p in traced.parameters}
