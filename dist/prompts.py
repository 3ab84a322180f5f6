"""Texts and class words as prompts for a pretrained model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from thinwire.dist.models.class_words import CausalWords, MaskedWords, SimilarPrompts
from thinwire.dist.models.hf import Pretrained

_TEXT, _LABEL = "{text}", "{label}"


class Prompt(NamedTuple):
    """position: of the last token (causal) or the mask token (masked); 0 for an encoder."""

    ids: list[int]
    position: int


class Prompts:
    """Makes a prompt of each text, and the module that scores the classes on it.

    A language model reads the template with the text in it and is asked for the word where {label} stands: at the end
    for a causal one, at a mask token for a masked one. An encoder compares the text with the template of each class,
    which therefore has {label} alone. Texts that would make a prompt longer than the context are cut at their end.

    Args:
        template: with {text} and {label}; for an encoder with {label}.
        labels: the word of each label; the classes are in this order.
    Attributes: cut, how many texts were cut so far.
    Raises:
        ValueError: the template or a word does not fit the model.
    """

    def __init__(self, pretrained: Pretrained, template: str, labels: Mapping[str, str]) -> None:
        self._pretrained = pretrained
        self.cut = 0
        wanted = [_LABEL] if pretrained.head == "encoder" else [_TEXT, _LABEL]
        if any(template.count(name) != (name in wanted) for name in (_TEXT, _LABEL)):
            raise ValueError(
                f"data.template: {template!r} must have {' and '.join(wanted)} once each, and no other, for a model "
                f"with head {pretrained.head}"
            )
        match pretrained.head:
            case "encoder":
                self._around = ("", "")
                self._words = [pretrained.tokenizer.encode(template.replace(_LABEL, w)).ids for w in labels.values()]
            case "masked":
                before, after = template.replace(_LABEL, pretrained.mask_token).split(_TEXT)
                self._around = (before, after)
                self._words = [self._word(f" {word}", word) for word in labels.values()]
            case "causal":
                before_label = template.partition(_LABEL)[0]
                if not template.endswith(_LABEL) or _TEXT not in before_label:
                    raise ValueError(
                        f"data.template: {template!r}: a causal model sees only what is before; put {_TEXT} first and "
                        f"end the template with {_LABEL}"
                    )
                stripped = before_label.rstrip()
                space = before_label[len(stripped) :]  # most tokenizers join it to the word
                before, after = stripped.split(_TEXT)
                self._around = (before, after)
                self._words = [self._word(space + word, word) for word in labels.values()]
        self._refuse_equal(labels)
        reserved = max(map(len, self._words)) if pretrained.head == "causal" else 0
        self._longest = pretrained.context - reserved

    def encode(self, text: str) -> Prompt:
        """The prompt of a text.

        Raises:
            ValueError: the template alone fills the context.
        """
        before, after = self._around
        whole = text
        while True:
            encoding = self._pretrained.tokenizer.encode(before + text + after)
            excess = len(encoding.ids) - self._longest
            if excess <= 0:
                break
            starts = [s for s, e in encoding.offsets if s < e and len(before) <= s < len(before) + len(text)]
            if len(starts) <= excess:
                raise ValueError(
                    f"model.context: {self._pretrained.context} tokens leave no room for a text beside the template; "
                    "give a longer one, or a shorter data.template"
                )
            text = text[: starts[-excess] - len(before)].rstrip()
        self.cut += text != whole
        match self._pretrained.head:
            case "encoder":
                return Prompt(encoding.ids, 0)
            case "causal":
                ids = self._without_end(encoding.ids)
                return Prompt(ids, len(ids) - 1)
            case "masked":
                return Prompt(encoding.ids, self._mask_position(before + text + after, encoding.offsets, len(text)))

    def scoring(self, temperature: float) -> nn.Module:
        """The module that gives the classes' scores on a batch of prompts; its part `network` is the model."""
        network = self._pretrained.network
        match self._pretrained.head:
            case "encoder":
                return SimilarPrompts(network, self._words, temperature)
            case "masked":
                return MaskedWords(network, [word[0] for word in self._words])
            case "causal":
                return CausalWords(network, self._words)

    def _word(self, text: str, word: str) -> list[int]:
        ids: list[int] = self._pretrained.tokenizer.encode(text, add_special_tokens=False).ids
        if not ids or (self._pretrained.head == "masked" and len(ids) != 1):
            raise ValueError(
                f"data.labels: {word!r} is {len(ids)} tokens for this model, and there is one mask token; give a word "
                "that is one token"
            )
        return ids

    def _refuse_equal(self, labels: Mapping[str, str]) -> None:
        first: dict[tuple[int, ...], str] = {}
        for label, ids in zip(labels, self._words, strict=True):
            if (other := first.setdefault(tuple(ids), label)) != label:
                raise ValueError(
                    f"data.labels: {other!r} and {label!r} have the same word for this model ({labels[label]!r}); give "
                    "each a word of its own"
                )

    def _without_end(self, ids: list[int]) -> list[int]:
        """What the tokenizer adds behind a text, such as an end-of-text token, would stand before the word."""
        bare: list[int] = self._pretrained.tokenizer.encode("", add_special_tokens=True).ids
        added_behind = len(bare) - _common_prefix(bare, ids)
        return ids[: len(ids) - added_behind] if added_behind else ids

    def _mask_position(self, prompt: str, offsets: list[tuple[int, int]], text_length: int) -> int:
        """Of the template's mask token: a text may hold the same characters."""
        before, after = self._around
        token = self._pretrained.mask_token
        start = before.index(token) if token in before else len(before) + text_length + after.index(token)
        return next(i for i, (s, e) in enumerate(offsets) if s <= start < e)


def _common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
