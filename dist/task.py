"""What a run learns: a model that gives scores, and the data that say which is right."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from thinwire.dist import corpus
from thinwire.dist.data import Batch, Data
from thinwire.dist.evaluate import ValidationData
from thinwire.dist.labelled import LabelledData
from thinwire.dist.models import build_model
from thinwire.dist.models.hf import HFSettings, load_pretrained
from thinwire.dist.prompts import Prompts

if TYPE_CHECKING:
    from thinwire.dist.config import RunConfig


class TaskData(Protocol):
    """Batches by sample number. identity: of the tokenizer. fingerprint: what all ranks must have."""

    identity: str
    fingerprint: dict[str, str]

    @property
    def validation(self) -> ValidationData:
        """What is kept for validation."""
        ...

    @property
    def tokens_per_sample(self) -> float:
        """In the mean."""
        ...

    def describe(self) -> str:
        """How much there is."""
        ...

    def training_batch(self, samples: Sequence[int], device: torch.device) -> Batch:
        """The training data of these sample numbers."""
        ...


@dataclass(frozen=True)
class Task:
    """model: batch.inputs -> scores (..., classes), whose cross entropy with batch.targets is the loss.

    network: the part of it that learns, under the names that its own files use; often the model itself.
    """

    model: nn.Module
    network: nn.Module
    data: TaskData


def build_task(config: RunConfig, device: torch.device) -> Task:
    """Model and data of a run: a GPT on text, or a pretrained model on labelled texts.

    Raises:
        ValueError: they do not fit together, or one of them cannot be used.
    """
    labelled = config.data.corpus == "labelled"
    if isinstance(config.model, HFSettings):
        if not labelled:
            raise ValueError(
                f"data.corpus: {config.data.corpus}, but model.kind: hf learns labelled texts; give labelled"
            )
        paths = corpus.matching_files(config.data.files)
        pretrained = load_pretrained(config.model, device)
        prompts = Prompts(pretrained, config.data.template, config.data.labels)
        data: TaskData = LabelledData(config.data, paths, prompts, pretrained.identity, config.seed)
        task = Task(prompts.scoring(config.model.temperature).to(device), pretrained.network, data)
    else:
        if labelled:
            raise ValueError(
                f"data.corpus: labelled needs a pretrained model with its tokenizer; model.kind is "
                f"{config.model.kind}, give model={{kind: hf, path: FOLDER}}"
            )
        windows = Data(config.data, context=config.model.context, seed=config.seed)
        model = build_model(config.model, tokenizer_vocab=windows.tokenizer.vocab, seed=config.seed, device=device)
        task = Task(model, model, windows)
    _choose_parameters(task.network, config.train.parameters)
    return task


def _choose_parameters(network: nn.Module, patterns: Sequence[str]) -> None:
    """Leave requires_grad to the parameters that a pattern names."""
    named = dict(network.named_parameters())
    chosen: set[str] = set()
    for pattern in patterns:
        matches = fnmatch.filter(named, pattern)
        if not matches:
            some = ", ".join([*list(named)[:3], "...", *list(named)[-3:]])
            raise ValueError(f"train.parameters: {pattern!r} names no parameter of the model; it has {some}")
        chosen.update(matches)
    for name, parameter in named.items():
        parameter.requires_grad_(name in chosen)
