"""Labelled texts: read from files, split, and given out in an order that depends on seed and sample number alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thinwire.dist.corpus import on_validation_side
from thinwire.dist.data import Batch, DataSettings
from thinwire.dist.models.class_words import pad
from thinwire.dist.order import window_of_sample
from thinwire.dist.prompts import Prompt, Prompts

_FORMATS = '.jsonl or .json (a line: {"text": ..., "label": ...}) or .tsv (a line: label, tab, text)'


@dataclass(frozen=True)
class Example:
    """A text and the label that it has in its file."""

    text: str
    label: str


def read_examples(paths: Sequence[Path], labels: Sequence[str]) -> list[Example]:
    """The examples of all files, in order; empty lines are passed over. Other keys of a JSON line are not used.

    Args:
        labels: those that may occur.
    Raises:
        ValueError: with file and line.
    """
    known = set(labels)
    examples = []
    for path in paths:
        for number, example in _lines(path):
            if example.label not in known:
                allowed = ", ".join(map(repr, labels))
                raise ValueError(
                    f"{path}:{number}: the label {example.label!r} has no word in data.labels, which has {allowed}"
                )
            examples.append(example)
    return examples


class LabelledData:
    """The prompts of a run, and which of them each rank sees when.

    As for text windows (data.py), a batch is a function of the seed and the sample numbers alone; the side of an
    example depends on its text alone.

    Args:
        settings: files, template and labels.
        prompts: make the model's input of a text.
        identity: of the tokenizer.
    Raises:
        ValueError: a file cannot be used, or one side has no example.
    """

    def __init__(
        self, settings: DataSettings, paths: Sequence[Path], prompts: Prompts, identity: str, seed: int
    ) -> None:
        self.identity = identity
        self._seed = seed
        labels = {label: number for number, label in enumerate(settings.labels)}
        sides: tuple[list[Example], list[Example]] = ([], [])
        for example in read_examples(paths, list(labels)):
            sides[on_validation_side(example.text.encode(), settings.validation_fraction)].append(example)
        for side, what in zip(sides, ("training", "validation"), strict=True):
            if not side:
                raise ValueError(
                    f"data.files: no example is for {what}, of {sum(map(len, sides))} in all; give more, or another "
                    "data.validation_fraction"
                )
        self.training, self.validation = (Examples(side, labels, prompts) for side in sides)
        self.fingerprint = {
            f"{what} text": f"{len(side)} examples, SHA-256 {_digest(side)}"
            for what, side in (("training", sides[0]), ("validation", sides[1]))
        }
        self._cut = prompts.cut

    @property
    def tokens_per_sample(self) -> float:
        """Of the training prompts, in the mean."""
        return self.training.tokens / self.training.count

    def describe(self) -> str:
        """How much there is."""
        cut = f"; {self._cut} texts are cut to model.context" if self._cut else ""
        return f"{self.training.count:,} training and {self.validation.count:,} validation examples{cut}"

    def training_batch(self, samples: Sequence[int], device: torch.device) -> Batch:
        """The training examples of these sample numbers."""
        return self.training.batch([window_of_sample(s, self.training.count, self._seed) for s in samples], device)


class Examples:
    """Encoded prompts and the numbers of their classes.

    Attributes: count, of examples; tokens, of all prompts.
    """

    labelled = True

    def __init__(self, examples: Sequence[Example], labels: Mapping[str, int], prompts: Prompts) -> None:
        self._prompts: list[Prompt] = [prompts.encode(example.text) for example in examples]
        self._classes = [labels[example.label] for example in examples]
        self.count = len(examples)
        self.tokens = sum(len(prompt.ids) for prompt in self._prompts)

    def batch(self, chosen: Sequence[int], device: torch.device) -> Batch:
        """The examples with these numbers, in this order."""
        prompts = [self._prompts[i] for i in chosen]
        ids, mask = pad([prompt.ids for prompt in prompts])
        position = torch.tensor([prompt.position for prompt in prompts])
        inputs: dict[str, Tensor] = {"ids": ids, "mask": mask, "position": position}
        targets = torch.tensor([self._classes[i] for i in chosen])
        return Batch({name: tensor.to(device) for name, tensor in inputs.items()}, targets.to(device), None)


def _lines(path: Path) -> Iterator[tuple[int, Example]]:
    parse = {".jsonl": _from_json, ".json": _from_json, ".tsv": _from_tsv}.get(path.suffix)
    if parse is None:
        raise ValueError(f"data.files: {path}: a labelled file ends in {_FORMATS}")
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                if line.strip():
                    yield number, parse(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None


def _from_json(line: str) -> Example:
    try:
        content: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not a JSON value ({error.msg}, character {error.pos + 1})") from None
    if not isinstance(content, dict) or not {"text", "label"} <= content.keys():
        raise ValueError('expected an object such as {"text": "...", "label": "..."}')
    text, label = content["text"], content["label"]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"text: {text!r} is not a text with something in it")
    if isinstance(label, bool) or not isinstance(label, (str, int)):
        raise ValueError(f"label: {label!r} is neither a text nor a whole number")
    return Example(text, str(label))


def _from_tsv(line: str) -> Example:
    label, tab, text = line.partition("\t")
    if not tab or not text.strip():
        raise ValueError("expected a label, a tab and a text")
    return Example(text, label)


def _digest(examples: Sequence[Example]) -> str:
    whole = hashlib.sha256()
    for example in examples:
        for part in (example.text.encode(), example.label.encode()):
            whole.update(len(part).to_bytes(8, "little"))
            whole.update(part)
    return whole.hexdigest()
