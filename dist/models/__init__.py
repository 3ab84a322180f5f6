"""The models that a run can train, by the `kind` of their settings."""

from __future__ import annotations

from typing import TypeAlias

import torch

from thinwire.dist.models.gpt import GPT, GPTSettings

# A second model makes this Annotated[GPTSettings | OtherSettings, Field(discriminator="kind")].
ModelSettings: TypeAlias = GPTSettings


def build_model(settings: ModelSettings, *, tokenizer_vocab: int, seed: int, device: torch.device) -> GPT:
    """A model with fp32 weights drawn from the seed: the same on every rank and every device.

    Args:
        tokenizer_vocab: number of token ids that the tokenizer can give.
    Raises:
        ValueError: model.vocab is smaller than the tokenizer's.
    """
    if settings.vocab != "auto" and settings.vocab < tokenizer_vocab:
        raise ValueError(
            f"model.vocab: {settings.vocab} is less than the tokenizer's {tokenizer_vocab} token ids; "
            f"give at least {tokenizer_vocab}, or auto"
        )
    vocab = tokenizer_vocab if settings.vocab == "auto" else settings.vocab
    with torch.device("meta"):
        model = GPT(settings, vocab)
    if device.type == "meta":
        return model
    model.to_empty(device="cpu")
    model.initialise(seed)
    return model.to(device)


__all__ = ["GPT", "ModelSettings", "build_model"]
