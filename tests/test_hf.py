"""Pretrained models from a local folder: prompts, class words, and training on labelled texts."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from ranks import Rank, run_ranks
from safetensors.torch import load_file
from worlds import close_world, small_settings, thread_world

from thinwire.comm.onebyte.log import Log
from thinwire.comm.onebyte.manifest import Manifest
from thinwire.dist.config import RunConfig
from thinwire.dist.models.class_words import CausalWords
from thinwire.dist.models.hf import HFSettings, Pretrained, load_pretrained
from thinwire.dist.prompts import Prompts
from thinwire.dist.task import build_task
from thinwire.dist.train import Outcome, Trainer
from thinwire.dist.zeroth_order import ZerothOrderTrainer

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

CPU = torch.device("cpu")
WORDS = ["good", "bad", "it", "was", "film", "a", "the", "dull", "fine", "very", "."]
LABELS = {"pos": "good", "neg": "bad"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models of three kinds, with a word tokenizer that has [MASK], [CLS] and [SEP]."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = {word: i for i, word in enumerate([*special, *WORDS])}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    raw.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    raw.enable_truncation(4)  # as many published tokenizers have, for another use
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, mask_token="[MASK]", model_max_length=24, **names
    )
    bert = transformers.BertConfig(
        vocab_size=len(vocab), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32,
    )  # fmt: skip
    gpt2 = transformers.GPT2Config(vocab_size=len(vocab), n_embd=16, n_layer=1, n_head=2, n_positions=32)
    made = {}
    torch.manual_seed(3)
    for name, model in (
        ("encoder", transformers.BertModel(bert)),
        ("masked", transformers.BertForMaskedLM(bert)),
        ("causal", transformers.GPT2LMHeadModel(gpt2)),
    ):
        made[name] = tmp_path_factory.mktemp("hf") / name
        model.save_pretrained(made[name])
        tokenizer.save_pretrained(made[name])
    return made


def loaded(folder: Path, **settings: object) -> Pretrained:
    return load_pretrained(HFSettings(path=str(folder), **settings), CPU)


def scores(pretrained: Pretrained, prompts: Prompts, texts: list[str]) -> torch.Tensor:
    rows = [prompts.encode(text) for text in texts]
    longest = max(len(row.ids) for row in rows)
    with torch.no_grad():
        return prompts.scoring(0.05)(
            {
                "ids": torch.tensor([[*row.ids, *[0] * (longest - len(row.ids))] for row in rows]),
                "mask": torch.tensor([[1] * len(row.ids) + [0] * (longest - len(row.ids)) for row in rows]),
                "position": torch.tensor([row.position for row in rows]),
            }
        )


def test_a_masked_model_is_asked_at_its_mask_even_where_the_text_has_one(folders: dict[str, Path]) -> None:
    pretrained = loaded(folders["masked"])
    assert pretrained.head == "masked"
    prompts = Prompts(pretrained, "{text} . it was {label} .", LABELS)
    texts = ["a [MASK] film", "fine"]
    given = scores(pretrained, prompts, texts)
    for text, row in zip(texts, given, strict=True):
        ids = pretrained.tokenizer.encode(f"{text} . it was [MASK] .").ids
        asked = max(i for i, token in enumerate(ids) if token == 4)
        with torch.no_grad():
            logits = pretrained.network(torch.tensor([ids])).logits[0, asked]
        expected = logits[[pretrained.tokenizer.token_to_id(word) for word in LABELS.values()]]
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-6)


def test_a_causal_model_scores_words_of_one_and_of_several_tokens(folders: dict[str, Path]) -> None:
    pretrained = loaded(folders["causal"])
    labels = {"pos": "very good", "neg": "bad"}
    prompts = Prompts(pretrained, "{text} it was {label}", labels)
    texts = ["the film", "a very dull film"]
    given = scores(pretrained, prompts, texts)
    encode = pretrained.tokenizer.encode
    for text, row in zip(texts, given, strict=True):
        ids = encode(f"{text} it was").ids[:-1]  # [SEP] would stand before the word
        for score, word in zip(row, labels.values(), strict=True):
            tokens = encode(word, add_special_tokens=False).ids
            with torch.no_grad():
                logits = pretrained.network(torch.tensor([ids + tokens])).logits[0]
            logs = torch.log_softmax(logits[len(ids) - 1 : -1], -1)
            mean = sum(float(logs[i, token]) for i, token in enumerate(tokens)) / len(tokens)
            assert float(score) == pytest.approx(mean, rel=1e-4)
    single = Prompts(pretrained, "{text} it was {label}", LABELS)
    short = scores(pretrained, single, texts).softmax(-1)
    module = single.scoring(1.0)
    assert isinstance(module, CausalWords)
    module.tokens, module.present = (torch.nn.functional.pad(t, (0, 1)) for t in (module.tokens, module.present))
    single.scoring = lambda temperature: module  # type: ignore[method-assign]
    torch.testing.assert_close(scores(pretrained, single, texts).softmax(-1), short, rtol=1e-4, atol=1e-6)


def test_an_encoder_compares_the_text_with_the_prompt_of_each_class(folders: dict[str, Path]) -> None:
    pretrained = loaded(folders["encoder"])
    assert pretrained.head == "encoder"
    assert not [name for name, _ in pretrained.network.named_parameters() if "pooler" in name]
    prompts = Prompts(pretrained, "it was {label}", LABELS)

    def embedding(text: str) -> torch.Tensor:
        with torch.no_grad():
            states = pretrained.network(torch.tensor([pretrained.tokenizer.encode(text).ids])).last_hidden_state[0]
        return torch.nn.functional.normalize(states.mean(0), dim=0)

    texts = ["the film was dull", "fine"]
    expected = [[float(embedding(t) @ embedding(f"it was {w}")) / 0.05 for w in LABELS.values()] for t in texts]
    torch.testing.assert_close(scores(pretrained, prompts, texts), torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_long_texts_are_cut_and_the_template_is_not(folders: dict[str, Path]) -> None:
    prompts = Prompts(loaded(folders["masked"], context=10), "{text} it was {label} .", LABELS)
    assert len(prompts.encode("the film").ids) == 8
    assert prompts.cut == 0
    cut = prompts.encode("the very very very very dull film")
    assert prompts.cut == 1
    assert cut.ids == prompts.encode("the very very very").ids
    with pytest.raises(ValueError, match=r"model\.context: 5 tokens leave no room"):
        Prompts(loaded(folders["masked"], context=5), "{text} it was {label} .", LABELS).encode("the film")


@pytest.mark.parametrize(
    ("kind", "settings", "template", "labels", "message"),
    [
        ("masked", {"head": "encoder", "context": 999}, "", {}, r"model.context: 999 is more than .* 24 tokens"),
        ("encoder", {"head": "masked"}, "", {}, r"model.head: masked needs weights .* does not hold \(cls"),
        ("encoder", {}, "{text} {label}", LABELS, r"data.template: .* must have \{label\} once each, and no other"),
        ("masked", {}, "it was {label}", LABELS, r"must have \{text\} and \{label\} once each"),
        ("masked", {}, "{text} {label}", {"a": "very good", "b": "bad"}, "'very good' is 2 tokens"),
        ("causal", {}, "{label} {text}", LABELS, "put {text} first"),
        ("causal", {}, "{text} {label}", {"a": "odd", "b": "strange"}, "'a' and 'b' have the same word"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(
    folders: dict[str, Path],
    kind: str,
    settings: dict[str, object],
    template: str,
    labels: dict[str, str],
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        Prompts(loaded(folders[kind], **settings), template, labels)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model.path: .* holds no config.json; .* nothing is downloaded"):
        loaded(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"model.path: .* cannot be loaded"):
        loaded(tmp_path)


def labelled_config(folder: Path, model: Path, **changes: object) -> RunConfig:
    """40 texts whose class is told by one word."""
    lines = [
        {"text": f"{'a ' * (i % 4)}very {'fine' if i % 2 else 'dull'} film {'. ' * (i // 8)}", "label": i % 2}
        for i in range(40)
    ]
    file = folder / "films.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = small_settings(folder) | {
        "name": "films",
        "model": {"kind": "hf", "path": str(model), "temperature": 0.2},
        "data": {
            "corpus": "labelled",
            "files": [str(file)],
            "template": "it was {label}" if model.name == "encoder" else "{text} it was {label}",
            "labels": {"0": "bad", "1": "good"},
            "validation_fraction": 0.3,
        },
    }
    settings |= changes
    if settings["method"]["kind"] == "onebyte":
        del settings["optimizer"]
    return RunConfig.model_validate(json.loads(json.dumps(settings)))


@pytest.mark.parametrize("kind", ["encoder", "masked", "causal"])
def test_every_kind_learns_by_backprop(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    config = labelled_config(tmp_path, folders[kind], train={"steps": 30, "global_batch": 8, "eval_batch": 5})

    def work(rank: Rank) -> Outcome:
        world = thread_world(rank)
        try:
            return Trainer(config, world).run()
        finally:
            close_world(world)

    (outcome,) = run_ranks(1, work)
    assert outcome.last is not None
    assert outcome.last["val_accuracy"] == 1.0
    assert outcome.last["val_loss"] < 0.5 * math.log(2)
    assert "val_bits_per_byte" not in outcome.last


def test_only_the_named_parameters_learn(folders: dict[str, Path], tmp_path: Path) -> None:
    train = {"steps": 1, "global_batch": 8, "parameters": ["encoder.layer.0.attention.*", "*.word_embeddings.*"]}
    task = build_task(labelled_config(tmp_path, folders["encoder"], train=train), CPU)
    learning = {name for name, p in task.network.named_parameters() if p.requires_grad}
    assert len(learning) == 11
    assert "embeddings.word_embeddings.weight" in learning
    with pytest.raises(ValueError, match=r"train.parameters: 'encoder.layer.7.\*' names no parameter of the model"):
        build_task(
            labelled_config(tmp_path, folders["encoder"], train={**train, "parameters": ["encoder.layer.7.*"]}), CPU
        )


def test_a_run_by_forward_passes_has_the_names_of_the_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    config = labelled_config(
        tmp_path,
        folders["masked"],
        train={"steps": 3, "global_batch": 8, "eval_batch": 5, "parameters": ["bert.encoder.*"]},
        method={"kind": "onebyte", "lr": 1e-2, "samples": 2, "estimate": "one_sided", "step_size": "ema"},
    )

    def work(rank: Rank) -> Outcome:
        world = thread_world(rank)
        try:
            return ZerothOrderTrainer(config, world).run()
        finally:
            close_world(world)

    (outcome,) = run_ranks(1, work)
    assert outcome.last is not None
    assert "val_accuracy" in outcome.last
    stored = load_file(config.folder / "model.safetensors")
    original = load_file(folders["masked"] / "model.safetensors")
    assert set(stored) >= set(original)
    learnt = {name for name in original if not torch.equal(stored[name], original[name])}
    with Log.open(config.folder / "onebyte.log", read_only=True) as log:
        assert learnt == {tensor.name for tensor in Manifest.from_bytes(log.manifest).tensors}
    assert learnt == {name for name in original if name.startswith("bert.encoder.")}
