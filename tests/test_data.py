"""Corpus, tokenizers and windows: what is read, how it is split, and what a batch holds."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import small_text

from thinwire.dist import corpus
from thinwire.dist.data import Data, DataSettings, Windows
from thinwire.dist.tokenizer import ByteTokenizer, Tokens, _bytes_of_tokens, load_tokenizer

CPU = torch.device("cpu")


def test_the_standard_library_is_real_text_without_tests_and_vendored_code() -> None:
    paths = corpus.standard_library()
    names = [path.as_posix() for path in paths]
    assert any(name.endswith("/argparse.py") for name in names)
    assert any(name.endswith("/email/message.py") for name in names)
    assert not [name for name in names if "/test/" in name or "site-packages" in name or "/encodings/" in name]
    assert names == [path.as_posix() for path in corpus.standard_library()]
    assert sum(path.stat().st_size for path in paths) > 5_000_000


def test_no_content_is_on_both_sides(tmp_path: Path) -> None:
    for i in range(200):
        (tmp_path / f"{i}.txt").write_bytes(f"text {i // 2}".encode())  # each content twice
    (tmp_path / "empty.txt").touch()
    paths = corpus.matching_files([str(tmp_path / "*.txt")])
    split = corpus.split(paths, 0.3)
    assert len(split.training) + len(split.validation) == 200
    assert not set(split.training) & set(split.validation)
    assert 30 < len(split.validation) < 90


def test_the_side_of_a_file_depends_on_its_content_alone(tmp_path: Path) -> None:
    for i in range(50):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    before = corpus.split(corpus.matching_files([str(tmp_path / "*")]), 0.3)
    (tmp_path / "7.txt").rename(tmp_path / "another name.txt")
    (tmp_path / "new.txt").write_text("one more")
    after = corpus.split(corpus.matching_files([str(tmp_path / "*")]), 0.3)
    assert set(before.training) <= set(after.training)
    assert set(before.validation) <= set(after.validation)


def test_globs_find_files_below_once(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("a/x.md", "a/b/y.md"):
        (tmp_path / name).write_text("text")
    found = corpus.matching_files([str(tmp_path / "**" / "*.md"), str(tmp_path / "a" / "x.md")])
    assert [path.name for path in found] == ["y.md", "x.md"]
    with pytest.raises(ValueError, match=r"data\.files: .*none\.txt"):
        corpus.matching_files([str(tmp_path / "none.txt")])


def test_bytes_are_their_own_tokens() -> None:
    tokens = ByteTokenizer().encode(["é".encode(), b"ab"])
    assert tokens.ids.tolist() == [0xC3, 0xA9, 0, 97, 98, 0]
    assert tokens.byte_counts is None


def test_windows_hold_each_token_once_as_a_target() -> None:
    windows = Windows(Tokens(np.arange(23, dtype=np.uint8)), 5, "training")
    batch = windows.batch(range(windows.count), CPU)
    assert windows.count == 4
    assert batch.targets.flatten().tolist() == list(range(1, 21))
    assert torch.equal(batch.inputs + 1, batch.targets)
    assert batch.text_bytes == 20


def test_a_text_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match=r"validation text has 5 tokens.*model\.context \+ 1 = 6"):
        Windows(Tokens(np.arange(5, dtype=np.uint8)), 5, "validation")


def test_data_is_reproducible_and_seeded() -> None:
    data = [Data(_settings(), context=16, seed=seed) for seed in (0, 0, 1)]
    batches = [d.training_batch(range(8), CPU).inputs for d in data]
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])
    assert data[0].fingerprint == data[2].fingerprint
    assert data[0].fingerprint != Data(_settings(validation_fraction=0.3), context=16, seed=0).fingerprint


@given(text=st.text(max_size=40), data=st.data())
@settings(max_examples=100, deadline=None)
def test_token_bytes_add_up_to_the_text(text: str, data: st.DataObject) -> None:
    ends = sorted(data.draw(st.lists(st.integers(0, len(text)), min_size=1, max_size=8)))
    counts = _bytes_of_tokens(text, np.array(ends))
    assert counts.sum() == len(text.encode())
    assert (counts >= 0).all()
    for token in range(len(ends) - 1):
        assert counts[: token + 1].sum() == len(text[: ends[token]].encode())


def _tokenizer_file(folder: Path) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train(small_text()[:10], trainer)
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_a_tokenizer_file_counts_bytes_and_ends_files(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(_tokenizer_file(tmp_path)))
    texts = ["def f(x):\n    return 'é→𝄞'\n".encode(), b"import os\n"]
    tokens = tokenizer.encode(texts)
    assert tokens.byte_counts is not None
    assert int(tokens.byte_counts.sum()) == sum(map(len, texts))
    ends = np.flatnonzero(tokens.byte_counts == 0)
    assert tokens.ids[-1] == tokens.ids[ends[-1]] == 0
    assert len(tokens) < sum(map(len, texts))
    assert tokenizer.vocab == 400


def test_tokens_of_a_tokenizer_file_are_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(_tokenizer_file(tmp_path))
    made = Data(_settings(tokenizer=path, cache=str(tmp_path / "cache")), context=16, seed=0)
    assert len(list((tmp_path / "cache").iterdir())) == 2

    def refuse(self: object, files: list[bytes]) -> Tokens:
        raise AssertionError("encoded again")

    monkeypatch.setattr("thinwire.dist.tokenizer.FileTokenizer.encode", refuse)
    cached = Data(_settings(tokenizer=path, cache=str(tmp_path / "cache")), context=16, seed=0)
    assert np.array_equal(made.training.tokens.ids, cached.training.tokens.ids)
    assert made.training_batch(range(4), CPU).text_bytes == cached.training_batch(range(4), CPU).text_bytes > 64


@pytest.mark.parametrize(("content", "says"), [(None, "no file"), ("{}", "not a Hugging Face tokenizer")])
def test_a_bad_tokenizer_file_is_refused(tmp_path: Path, content: str | None, says: str) -> None:
    pytest.importorskip("tokenizers")
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=rf"data\.tokenizer: .*{says}"):
        load_tokenizer(str(path))


def test_a_missing_tokenizers_library_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"pip install 'thinwire\[tokenizers\]'"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


def _settings(**changes: object) -> DataSettings:
    return DataSettings(**{"corpus": "files", "files": small_text(), "validation_fraction": 0.2, **changes})
