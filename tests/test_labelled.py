"""Labelled texts: what is read, which side it is on, and what is wrong with a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from worlds import small_config

from thinwire.dist.config import ConfigError
from thinwire.dist.data import DataSettings
from thinwire.dist.labelled import Example, LabelledData, read_examples
from thinwire.dist.prompts import Prompt, Prompts

CPU = torch.device("cpu")


class Characters(Prompts):
    """A prompt of each text's characters: no pretrained model is needed to look at batches."""

    def __init__(self) -> None:
        self.cut = 0

    def encode(self, text: str) -> Prompt:
        return Prompt([ord(c) for c in text], len(text) - 1)


def test_both_formats_are_read(tmp_path: Path) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_bytes(b'\xef\xbb\xbf{"text": "one \\u00e9", "label": 1}\r\n\n{"label": "0", "text": "two", "idx": 3}\n')
    table = tmp_path / "b.tsv"
    table.write_text("1\tthree\tand a tab\n0\tfour")
    assert read_examples([lines, table], ["0", "1"]) == [
        Example("one é", "1"),
        Example("two", "0"),
        Example("three\tand a tab", "1"),
        Example("four", "0"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"text": "a", "label": 1}\n{"text": "a",\n', r"x.jsonl:2: not a JSON value \(.*character 14"),
        ("x.jsonl", b'{"text": "a"}\n', r'x.jsonl:1: expected an object such as {"text"'),
        ("x.jsonl", b"[1]\n", "x.jsonl:1: expected an object"),
        ("x.jsonl", b'{"text": " ", "label": 1}\n', "x.jsonl:1: text: ' ' is not a text"),
        ("x.jsonl", b'{"text": 5, "label": 1}\n', "x.jsonl:1: text: 5 is not a text"),
        ("x.jsonl", b'{"text": "a", "label": true}\n', "x.jsonl:1: label: True is neither"),
        ("x.jsonl", b'{"text": "a", "label": 1.5}\n', "x.jsonl:1: label: 1.5 is neither"),
        (
            "x.jsonl",
            b'\n{"text": "a", "label": "7"}\n',
            "x.jsonl:2: the label '7' has no word in data.labels, .*'0', '1'",
        ),
        ("x.tsv", b"1\ta\n1 b\n", "x.tsv:2: expected a label, a tab and a text"),
        ("x.tsv", b"1\ta\n1\t\n", "x.tsv:2: expected a label, a tab and a text"),
        ("x.tsv", b"1\ta\n\xff\tb\n", "x.tsv:2: .*utf-8"),
        ("x.csv", b"1,a\n", r"x.csv: a labelled file ends in .jsonl or .json .* or .tsv"),
    ],
)
def test_mistakes_are_told_with_file_and_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_examples([tmp_path / name], ["0", "1"])


def data(path: Path, seed: int = 0, fraction: float = 0.25) -> LabelledData:
    settings = DataSettings(
        corpus="labelled",
        files=(str(path),),
        template="{text} {label}",
        labels={"0": "bad", "1": "good"},
        validation_fraction=fraction,
    )
    return LabelledData(settings, [path], Characters(), "characters", seed)


def texts_of(inputs: dict[str, torch.Tensor]) -> list[str]:
    return ["".join(map(chr, ids[mask == 1].tolist())) for ids, mask in zip(inputs["ids"], inputs["mask"], strict=True)]


def test_batches_depend_on_seed_and_sample_numbers_alone_and_sides_on_the_text(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    lines = [f"{i % 2}\t{'x' * (i % 5)}{i}" for i in range(80)]
    path.write_text("\n".join(lines))
    whole = data(path)
    assert whole.training.count + whole.validation.count == 80
    assert 8 < whole.validation.count < 35
    epoch = whole.training_batch(range(whole.training.count), CPU)
    trained = texts_of(epoch.inputs)
    assert len(set(trained)) == whole.training.count
    assert [int(text.lstrip("x")) % 2 for text in trained] == epoch.targets.tolist()
    assert epoch.inputs["position"].tolist() == [len(text) - 1 for text in trained]
    assert texts_of(whole.training_batch([9, 4], CPU).inputs) == [trained[9], trained[4]]
    assert texts_of(data(path, seed=1).training_batch(range(20), CPU).inputs) != trained[:20]
    assert whole.tokens_per_sample == sum(map(len, trained)) / len(trained)
    # Other examples, and another order of them, leave each one on its side.
    (tmp_path / "b.tsv").write_text("\n".join(reversed(lines[:40])))
    fewer = data(tmp_path / "b.tsv")
    kept = texts_of(fewer.training_batch(range(fewer.training.count), CPU).inputs)
    assert set(kept) == set(trained) & {line.split("\t")[1] for line in lines[:40]}
    assert fewer.fingerprint != whole.fingerprint
    with pytest.raises(ValueError, match=r"no example is for validation, of 80 in all"):
        data(path, fraction=1e-6)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data={corpus: labelled}", "corpus: labelled needs data.files"),
        ("data={corpus: labelled, files: [a.tsv]}", "needs data.template, such as"),
        ("data={corpus: labelled, files: [a.tsv], template: '{label}', labels: {a: b}}", "words of two labels"),
        ("data.labels={a: b}", "data.template and data.labels are for corpus: labelled"),
        ("data={corpus: labelled, files: [a], template: x, labels: {a: b, c: d}, tokenizer: t.json}", "data.tokenizer"),
        ("model={kind: hff}", "model.kind: 'hff' is not known; allowed: gpt, moe, hf"),
        ("model={kind: hf}", "model.path: missing"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small_config(tmp_path, override)
