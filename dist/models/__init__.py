"""The models that a run can train, by the `kind` of their settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import torch
from pydantic import Field

from thinwire.dist.base_model import read_weights
from thinwire.dist.models.gpt import GPT, GPTSettings
from thinwire.dist.models.hf import HFSettings
from thinwire.dist.models.moe import MoEGPT, MoESettings

ModelSettings: TypeAlias = Annotated[GPTSettings | MoESettings | HFSettings, Field(discriminator="kind")]


def build_model(settings: GPTSettings, *, tokenizer_vocab: int, seed: int, device: torch.device) -> GPT:
    """A GPT, with experts where it is settings' kind, and fp32 weights from its file, or drawn from the seed.

    They are the same on every rank and every device.

    Args:
        tokenizer_vocab: number of token ids that the tokenizer can give.
    Raises:
        ValueError: model.vocab is smaller than the tokenizer's, or model.weights does not hold this model.
    """
    if settings.vocab != "auto" and settings.vocab < tokenizer_vocab:
        raise ValueError(
            f"model.vocab: {settings.vocab} is less than the tokenizer's {tokenizer_vocab} token ids; "
            f"give at least {tokenizer_vocab}, or auto"
        )
    vocab = tokenizer_vocab if settings.vocab == "auto" else settings.vocab
    with torch.device("meta"):
        model = MoEGPT(settings, vocab) if isinstance(settings, MoESettings) else GPT(settings, vocab)
    if device.type == "meta":
        return model
    model.to_empty(device="cpu")
    if settings.weights:
        _load_weights(model, Path(settings.weights).expanduser())
    else:
        model.initialise(seed)
    return model.to(device)


def _load_weights(model: GPT, path: Path) -> None:
    try:
        stored = read_weights(path)
    except ValueError as error:
        raise ValueError(f"model.weights: {error}") from None
    wanted = model.state_dict()
    wrong = [
        f"{name}: {list(stored[name].shape) if name in stored else 'nothing'} there, "
        f"{list(wanted[name].shape) if name in wanted else 'nothing'} in the model"
        for name in dict.fromkeys((*wanted, *stored))
        if name not in stored or name not in wanted or stored[name].shape != wanted[name].shape
    ]
    if wrong:
        raise ValueError(f"model.weights: {path} holds another model: {'; '.join(wrong[:3])}; set model to its shape")
    model.load_state_dict(stored)


__all__ = ["GPT", "MoEGPT", "ModelSettings", "build_model"]
