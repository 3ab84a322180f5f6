"""What a run learns: a model that gives scores, and the data that say which is right."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import nn

from thinwire.dist import corpus
from thinwire.dist.data import Batch, Data
from thinwire.dist.domain_data import DomainData
from thinwire.dist.evaluate import ValidationData, evaluate
from thinwire.dist.labelled import LabelledData
from thinwire.dist.models import build_model
from thinwire.dist.models.hf import HFSettings, load_pretrained
from thinwire.dist.preflight import (
    check_agreement,
    describe_config,
    describe_model,
    describe_versions,
    wait_for_all,
)
from thinwire.dist.prompts import Prompts
from thinwire.dist.world import World

if TYPE_CHECKING:
    from thinwire.dist.config import RunConfig
    from thinwire.dist.train import TrainSettings


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
        model = prompts.scoring(config.model.temperature).to(device)
        task = Task(model.eval(), pretrained.network, data)
    else:
        if labelled:
            raise ValueError(
                f"data.corpus: labelled needs a pretrained model with its tokenizer; model.kind is "
                f"{config.model.kind}, give model={{kind: hf, path: FOLDER}}"
            )
        reader = DomainData if config.data.corpus == "domains" else Data
        windows = reader(config.data, context=config.model.context, seed=config.seed)
        model = build_model(config.model, tokenizer_vocab=windows.tokenizer.vocab, seed=config.seed, device=device)
        task = Task(model, model, windows)
    choose_parameters(task.network, config.train.parameters)
    return task


def compare_with_others(task: Task, resolved: Mapping[str, Any], world: World) -> None:
    """Do all ranks have the same task, settings and versions? Collective: every rank raises, or none.

    Args:
        resolved: all settings.
    Raises:
        PreflightError: with what differs, by rank.
    """
    wait_for_all(world.queue, world.store, world.settings.rendezvous_timeout_s)
    check_agreement(
        {
            **describe_versions(),
            **describe_model(task.model),
            "config": describe_config(resolved),
            "tokenizer": {"data.tokenizer": task.data.identity},
            "data": task.data.fingerprint,
            "device": {"world.device": world.device.type},
        },
        queue=world.queue,
        store=world.store,
    )


def evaluate_task(
    settings: TrainSettings, model: nn.Module, data: TaskData, world: World, *, forward_is_collective: bool = False
) -> dict[str, float]:
    """What a step's record says of the validation data. Collective."""
    validation = data.validation
    wanted = validation.count if settings.eval_windows == "all" else settings.eval_windows
    result = evaluate(
        model,
        validation,
        count=min(wanted, validation.count),
        batch=settings.eval_batch,
        queue=world.queue,
        device=world.device,
        precision=computing(settings.precision, world.device),
        forward_is_collective=forward_is_collective,
    )
    return result.record()


def computing(precision: Literal["fp32", "bf16"], device: torch.device) -> AbstractContextManager[Any]:
    """The context in which a model computes at train.precision."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, dtype=torch.bfloat16)


def choose_parameters(network: nn.Module, patterns: Sequence[str]) -> None:
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
