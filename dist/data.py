"""Token windows for training and validation, found from the step alone."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from thinwire.comm.settings import Settings
from thinwire.dist import corpus
from thinwire.dist.order import window_of_sample
from thinwire.dist.tokenizer import Tokenizer, Tokens, load_tokenizer


class DataSettings(Settings):
    """What to train on.

    corpus: "stdlib", the running Python's standard library; "domains", text of several domains that this machine has
      anyway (domains.py); "files"; or "labelled", one text and its label per line.
    files: paths or globs of the files; labelled: .jsonl ({"text": ..., "label": ...}) or .tsv (label, tab, text).
    template, labels: for corpus: labelled, what stands around each {text}, with {label} where its class's word belongs,
      and the word of each label.
    samples_per_domain: for corpus: domains, so many samples in a row are of one domain. train.micro_batch makes each
      micro-batch one of a single domain; 1 mixes them.
    tokenizer: "bytes", or the path of a Hugging Face tokenizer.json; a pretrained model has its own.
    validation_fraction: share of the files, or of labelled texts, that is kept for validation.
    cache: folder for the tokens of a tokenizer file, which take long to make; bytes need none.
    """

    corpus: Literal["stdlib", "domains", "files", "labelled"] = "stdlib"
    files: tuple[str, ...] = ()
    template: str = ""
    labels: dict[str, str] = Field(default_factory=dict)
    samples_per_domain: int = Field(1, gt=0)
    tokenizer: str = "bytes"
    validation_fraction: float = Field(0.05, gt=0, lt=1)
    cache: str = "~/.cache/thinwire/tokens"

    @model_validator(mode="after")
    def _files_with_corpus(self) -> DataSettings:
        if self.corpus in ("files", "labelled") and not self.files:
            raise ValueError(f"corpus: {self.corpus} needs data.files: a list of paths or globs")
        if self.corpus in ("stdlib", "domains") and self.files:
            raise ValueError(
                f"data.files is given but corpus is {self.corpus}; set data.corpus=files, or remove the files"
            )
        if self.corpus != "domains" and self.samples_per_domain != 1:
            raise ValueError(
                f"data.samples_per_domain is {self.samples_per_domain} but corpus is {self.corpus}; set "
                "data.corpus=domains, or remove it"
            )
        if self.corpus == "labelled":
            if not self.template or len(self.labels) < 2:
                raise ValueError(
                    "corpus: labelled needs data.template, such as '{text} It was {label}', and data.labels with the "
                    "words of two labels at least, such as {neg: bad, pos: good}"
                )
            if self.tokenizer != "bytes":
                raise ValueError("corpus: labelled takes the pretrained model's own tokenizer; remove data.tokenizer")
        elif self.template or self.labels:
            raise ValueError(f"data.template and data.labels are for corpus: labelled, and corpus is {self.corpus}")
        return self


@dataclass(frozen=True)
class Batch:
    """inputs: what the model takes; for text (sequences, context) int64. targets: int64, numbers of the right scores.

    text_bytes: bytes of text that the targets stand for; None where they are classes.
    """

    inputs: Any
    targets: Tensor
    text_bytes: int | None


class Windows:
    """A token stream cut into windows of `context` tokens, each with the token that follows it as last target.

    Args:
        tokens: the stream.
        context: tokens per window.
    Raises:
        ValueError: the stream is too short for one window.
    """

    labelled = False

    def __init__(self, tokens: Tokens, context: int, what: str) -> None:
        self.tokens = tokens
        self.context = context
        self.count = (len(tokens) - 1) // context
        if self.count < 1:
            raise ValueError(
                f"data: the {what} text has {len(tokens)} tokens, too few for one window of model.context + 1 = "
                f"{context + 1}; give more text, another data.validation_fraction, or a shorter model.context"
            )

    def batch(self, windows: Sequence[int], device: torch.device) -> Batch:
        """The windows with these numbers, in this order."""
        positions = np.asarray(windows)[:, None] * self.context + np.arange(self.context + 1)
        ids = torch.from_numpy(self.tokens.ids[positions].astype(np.int64)).to(device)
        counts = self.tokens.byte_counts
        text_bytes = ids[:, 1:].numel() if counts is None else int(counts[positions[:, 1:]].sum())
        return Batch(ids[:, :-1], ids[:, 1:], text_bytes)


class Data:
    """The windows of a run, and which of them each rank sees when.

    Sample number i of the run (step * global_batch + position in the batch) is a function of the seed and i alone, and
    a global batch is a range of sample numbers. So the batches do not depend on how many ranks share them, and resuming
    needs only the step.
    """

    def __init__(self, settings: DataSettings, *, context: int, seed: int) -> None:
        self.tokenizer: Tokenizer = load_tokenizer(settings.tokenizer)
        paths = corpus.standard_library() if settings.corpus == "stdlib" else corpus.matching_files(settings.files)
        split = corpus.split(paths, settings.validation_fraction)
        cache = Path(settings.cache).expanduser()
        training = tokens_of(split.training, self.tokenizer, cache)
        validation = tokens_of(split.validation, self.tokenizer, cache)
        self.fingerprint = {
            f"{what} text": f"{len(side)} files, {sum(map(len, side))} bytes, SHA-256 {digest(side)}"
            for what, side in (("training", split.training), ("validation", split.validation))
        }
        self.training = Windows(training, context, "training")
        self.validation = Windows(validation, context, "validation")
        self.identity = self.tokenizer.identity
        self.tokens_per_sample = context
        self._seed = seed

    def describe(self) -> str:
        """How much there is."""
        return f"{len(self.training.tokens):,} training and {len(self.validation.tokens):,} validation tokens"

    def training_batch(self, samples: Sequence[int], device: torch.device) -> Batch:
        """The training windows of these sample numbers."""
        windows = [window_of_sample(sample, self.training.count, self._seed) for sample in samples]
        return self.training.batch(windows, device)


def shard(step: int, global_batch: int, rank: int, world_size: int) -> range:
    """Sample numbers that a rank sees in a step: its part of step * global_batch .. (step + 1) * global_batch - 1."""
    share = global_batch // world_size
    first = step * global_batch + rank * share
    return range(first, first + share)


def tokens_of(files: list[bytes], tokenizer: Tokenizer, cache: Path) -> Tokens:
    """Tokens of the files; those of a tokenizer file are kept on disk under the hash of all that they depend on."""
    if tokenizer.identity == "bytes":
        return tokenizer.encode(files)
    path = cache / f"{hashlib.sha256((tokenizer.identity + digest(files)).encode()).hexdigest()[:32]}.npz"
    if path.exists():
        with np.load(path, allow_pickle=False) as stored:
            return Tokens(stored["ids"], stored["byte_counts"])
    tokens = tokenizer.encode(files)
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.stem}.{os.getpid()}.tmp.npz")
    np.savez(unfinished, **_arrays(tokens))
    os.replace(unfinished, path)  # several ranks may make the same file: each one's is complete
    return tokens


def _arrays(tokens: Tokens) -> dict[str, Any]:
    return {"ids": tokens.ids, "byte_counts": tokens.byte_counts}


def digest(files: list[bytes]) -> str:
    """SHA-256 of the files and of where each ends."""
    whole = hashlib.sha256()
    for file in files:
        whole.update(len(file).to_bytes(8, "little"))
        whole.update(file)
    return whole.hexdigest()
