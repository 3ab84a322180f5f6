"""Optimizer states of a checkpoint by the parameter's name, whichever engine wrote them: each keeps its own form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

Groups = Sequence[Sequence[str]]
"""The names of the parameters of each group of an optimizer."""


def group_names(network: nn.Module, groups: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The names of the parameters in an optimizer's groups."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in groups]


def states_by_name(saved: Mapping[str, Any], groups: Groups) -> dict[str, Any]:
    """{"state": {name: ...}, "param_groups": [...]}, of what engine ddp, fsdp2 or deepspeed wrote.

    Args:
        saved: a checkpoint's "optimizer". ddp's counts parameters through all groups; deepspeed's has no groups.
        groups: of the optimizer that will take the states.
    Raises:
        ValueError: there are no states in common to all ranks, or they belong to other parameters.
    """
    if {"states", "numbers"} <= saved.keys():
        states = {name: {**saved["numbers"], **tensors} for name, tensors in saved["states"].items()}
        return _checked(states, [{"params": list(names)} for names in groups], groups)
    if "param_groups" not in saved:
        raise ValueError(
            "checkpoint: it holds no optimizer states in common to all ranks: under the method that wrote it each rank "
            "has its own; begin from its weights alone: export them, and give model.weights"
        )
    options = [{key: value for key, value in group.items() if key != "params"} for group in saved["param_groups"]]
    if all(isinstance(key, str) for key in saved["state"]):
        members = [list(group["params"]) for group in saved["param_groups"]]
        return _checked(saved["state"], [{**o, "params": m} for o, m in zip(options, members, strict=True)], groups)
    names = {number: name for number, name in enumerate(name for group in groups for name in group)}
    if sorted(number for group in saved["param_groups"] for number in group["params"]) != sorted(names):
        raise ValueError(
            "checkpoint: its optimizer had other parameters; give the model and the train.parameters that wrote it"
        )
    members = [[names[number] for number in group["params"]] for group in saved["param_groups"]]
    states = {names[number]: state for number, state in saved["state"].items()}
    return _checked(states, [{**o, "params": m} for o, m in zip(options, members, strict=True)], groups)


def states_by_number(named: Mapping[str, Any], groups: Groups) -> dict[str, Any]:
    """The inverse, as torch's optimizers keep them."""
    numbers = {name: number for number, name in enumerate(name for group in groups for name in group)}
    return {
        "state": {numbers[name]: state for name, state in named["state"].items()},
        "param_groups": [
            {**group, "params": [numbers[name] for name in group["params"]]} for group in named["param_groups"]
        ],
    }


def _checked(states: Mapping[str, Any], saved: list[dict[str, Any]], groups: Groups) -> dict[str, Any]:
    if [sorted(group["params"]) for group in saved] != [sorted(names) for names in groups]:
        had, have = (sum(map(len, g)) for g in ([group["params"] for group in saved], groups))
        raise ValueError(
            f"checkpoint: its optimizer had {had} parameters in {len(saved)} groups, this one has {have} in "
            f"{len(groups)}, or others; give the model and the train.parameters that wrote it"
        )
    return {"state": dict(states), "param_groups": saved}
