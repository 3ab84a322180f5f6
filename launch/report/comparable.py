"""May these runs be compared? What differs between them besides what somebody wanted to compare."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from thinwire.launch.report.run import Run

_NOTHING = "-"

# Under other ones of these a loss means something else: no number of these runs belongs beside another's.
_LOSS = {
    "data.corpus": "they learn other text",
    "data.template": "the examples are put into other words",
    "data.labels": "the classes have other words",
    "data.tokenizer": "a loss per token is of other tokens",
    "data.validation_fraction": "other text is kept for validation",
    "train.eval_windows": "they are scored on other parts of the validation text",
    "model.context": "the validation text is cut into other windows",
}

# With other ones of these losses may be compared, but they differ for more than one reason.
_NOTED = {
    "seed": "other first weights and another order of the samples: part of any difference in loss is chance",
    "train.global_batch": "a step is not the same work: compare them by sequences, not by steps",
    "train.parameters": "other parameters learn",
    "train.precision": "they compute in other precisions",
    "train.clip_norm": "gradients are clipped otherwise",
    "train.steps": "they end at other steps, and a schedule that falls to its end falls otherwise",
    "data.samples_per_domain": "the domains are mixed otherwise",
    "checkpoint.resume": "they may begin with other weights",
}
_NOTED_GROUPS = {
    "model": "they are other models",
    "optimizer": "they have other optimizers",
    "schedule": "their learning rates go other ways",
}
_FACTS = {
    "ranks": "bytes and seconds are those of other clusters",
    "device": "seconds are those of other machines",
    "torch": "other kernels and roundings",
    "thinwire": "other versions of thinwire",
    "threads": "each rank computes with another number of CPU threads",
}
# What is compared on purpose, or changes no number worth a note.
_IGNORED = ("name", "output", "checkpoint", "world", "data.cache", "data.files", "train.eval_every", "train.eval_batch")


@dataclass(frozen=True)
class Difference:
    """Something in which runs differ.

    values: what each run has, as text, in the order of the runs. forbids: whether their losses mean other things.
    why: what that does to a comparison.
    """

    what: str
    values: tuple[str, ...]
    forbids: bool
    why: str

    def sentence(self, labels: Sequence[str]) -> str:
        """One line that names every run, those with the same together."""
        by_value: dict[str, list[str]] = {}
        for label, value in zip(labels, self.values, strict=True):
            by_value.setdefault(value, []).append(label)
        told = "; ".join(f"{_short(value)} in {', '.join(names)}" for value, names in by_value.items())
        return f"{self.what}: {told}. So {self.why}"


def differences(runs: Sequence[Run]) -> list[Difference]:
    """What a reader of a comparison must know; those that forbid it first. Empty of a single run."""
    found = [
        *_of_losses(runs),
        *_of_settings(runs),
        *_of_facts(runs),
        *_of_links(runs),
    ]
    return sorted(found, key=lambda difference: not difference.forbids)


def settings_that_differ(runs: Sequence[Run]) -> list[tuple[str, tuple[str, ...]]]:
    """(path, value in each run) of every setting that they do not share, those of method and engine first."""
    trees = [dict(_flatten(run.config)) for run in runs]
    paths = dict.fromkeys(path for tree in trees for path in tree)
    rows = []
    for path in paths:
        values = tuple(_text(tree.get(path, _NOTHING)) for tree in trees)
        if len(set(values)) > 1 and path not in ("name",):
            rows.append((path, values))
    first = ("method", "engine")
    return sorted(rows, key=lambda row: row[0].partition(".")[0] not in first)


def _of_losses(runs: Sequence[Run]) -> Iterator[Difference]:
    for path, why in _LOSS.items():
        values = tuple(_text(run.setting(path)) for run in runs)
        scored = set(values) - {"0"} if path == "train.eval_windows" else set(values)
        if all(run.config for run in runs) and len(scored) > 1:
            yield Difference(path, values, True, why)
    told = [run.facts.get("data") for run in runs]
    if all(told):
        for entry in dict.fromkeys(name for facts in told for name in facts or {}):
            values = tuple(_text((facts or {}).get(entry, _NOTHING)) for facts in told)
            if len(set(values)) > 1:
                yield Difference(entry, values, True, "they do not learn, or are not scored on, the same text")
    elif all(run.config for run in runs):
        values = tuple(_text(run.setting("data.files")) for run in runs)
        if len(set(values)) > 1:
            yield Difference("data.files", values, True, "they may learn other text; run.json would tell")
    kinds = tuple(_kind_of_validation(run) for run in runs)
    known = {kind for kind in kinds if kind != _NOTHING}
    if len(known) > 1:
        yield Difference("validation", kinds, True, "one is scored by text, another by classes")


def _of_settings(runs: Sequence[Run]) -> Iterator[Difference]:
    without = [run.label for run in runs if not run.config]
    if without and len(runs) > 1:
        values = tuple("config.yaml" if run.config else "no config.yaml" for run in runs)
        yield Difference("settings", values, False, "nobody can tell whether these runs may be compared")
        return
    for path, why in _NOTED.items():
        values = tuple(_text(run.setting(path)) for run in runs)
        if path == "checkpoint.resume":
            values = tuple(value if value not in ("auto", "never") else "own start" for value in values)
        if len(set(values) - {"null"}) > 1:  # a method may have no use for one
            yield Difference(path, values, False, why)
    for group, why in _NOTED_GROUPS.items():
        trees = [
            {path: _text(value) for path, value in _flatten(run.config.get(group) or {}, f"{group}.")} for run in runs
        ]
        paths = [
            path
            for path in dict.fromkeys(path for tree in trees for path in tree)
            if path not in _LOSS and len({tree.get(path, _NOTHING) for tree in trees}) > 1
        ]
        if f"{group}.kind" in paths:
            paths = [f"{group}.kind"]  # one of another kind has other settings
        if paths:
            values = tuple(
                ", ".join(f"{path.removeprefix(f'{group}.')} {tree[path]}" for path in paths if path in tree) or "none"
                for tree in trees
            )
            yield Difference(group, values, False, why)


def _of_facts(runs: Sequence[Run]) -> Iterator[Difference]:
    if not all(run.starts for run in runs):
        return
    for key, why in _FACTS.items():
        values = tuple(_text(run.facts.get(key)) for run in runs)
        if len(set(values)) > 1:
            yield Difference(key, values, False, why)
    moved = tuple(
        "one place" if len({_text((s.get("ranks"), s.get("hosts"))) for s in run.starts}) == 1 else "several places"
        for run in runs
    )
    if "several places" in moved:
        yield Difference("started on", moved, False, "seconds and bytes before and after are of other clusters")


def _of_links(runs: Sequence[Run]) -> Iterator[Difference]:
    values = tuple("measured" if run.modelled_bps is None else f"modelled, {run.modelled_bps:g} bit/s" for run in runs)
    if len(set(values)) > 1:
        yield Difference("communication time", values, False, "some of these seconds were never measured")


def _kind_of_validation(run: Run) -> str:
    for record in run.records:
        if "val_loss" in record:
            return "classes" if "val_accuracy" in record else "text"
    return _NOTHING


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        elif not f"{prefix}{key}".startswith(_IGNORED):
            yield f"{prefix}{key}", value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def _short(value: str, most: int = 120) -> str:
    return value if len(value) <= most else f"{value[: most - 12]} ... {value[-8:]}"
