"""A partitioned optimizer's memory by the parameter's name, as DTensors that any number of ranks can load."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

_SHOWN = 3  # names in an error message


def name_states(inner: Optimizer, names: Mapping[int, str]) -> dict[str, Any]:
    """inner.state_dict() with names in place of numbers; tensors are not copied.

    Args:
        names: of the masters, by id().
    """
    groups = [
        {**{key: value for key, value in group.items() if key != "params"}, "params": [names[id(p)] for p in params]}
        for group in inner.param_groups
        for params in [group["params"]]
    ]
    return {"state": {names[id(p)]: dict(state) for p, state in inner.state.items()}, "param_groups": groups}


def take_states(
    inner: Optimizer,
    state: Mapping[str, Any],
    names: Mapping[int, str],
    rows: Mapping[str, tuple[int, int]],
) -> None:
    """The inverse of name_states(); nothing is shared with `state` afterwards.

    Args:
        rows: [start, stop) of each parameter that this rank owns.
    Raises:
        ValueError: states of other parameters, or of another mesh; nothing has been changed then.
    """
    masters = {names[id(p)]: p for group in inner.param_groups for p in group["params"]}
    present = [[names[id(p)] for p in group["params"]] for group in inner.param_groups]
    saved = [list(group["params"]) for group in state["param_groups"]]
    refuse_other_names([name for group in saved for name in group], masters)
    if [sorted(group) for group in saved] != [sorted(group) for group in present]:
        raise ValueError(
            f"load_state_dict: the checkpoint has {len(saved)} groups of {_sizes(saved)} parameters, this optimizer "
            f"{len(present)} of {_sizes(present)}, or they hold other parameters; give the same parameter_groups"
        )
    numbers = {name: number for number, name in enumerate(name for group in present for name in group)}
    groups, first = [], 0
    for group, members in zip(state["param_groups"], present, strict=True):
        groups.append({**group, "params": list(range(first, first + len(members)))})
        first += len(members)
    refuse_other_names(state["state"], masters, all_of_them=False)
    converted = {
        numbers[name]: {key: localize(value, f"{name}.{key}", masters[name], rows[name]) for key, value in own.items()}
        for name, own in state["state"].items()
    }
    inner.load_state_dict({"state": converted, "param_groups": groups})


def localize(value: Any, what: str, master: nn.Parameter, rows: tuple[int, int]) -> Any:
    """A state of one parameter as this rank keeps it: new memory.

    Args:
        what: for the message.
    Raises:
        ValueError: a tensor of another shape or mesh than its master's.
    """
    like = cast(DTensor, master)
    if not isinstance(value, Tensor):
        return value
    if isinstance(value, DTensor):
        if value.shape != like.shape:
            raise ValueError(
                f"load_state_dict: {what} has the shape {tuple(value.shape)}, and the parameter {tuple(like.shape)}; "
                "the checkpoint belongs to another model, or the optimizer keeps states that cannot be cut by rows"
            )
        if value.device_mesh != like.device_mesh or tuple(value.placements) != tuple(like.placements):
            raise ValueError(
                f"load_state_dict: {what} lies on another mesh than this optimizer's: {value.device_mesh}; read the "
                "checkpoint into optimizer.state_template(), which says how it must be cut here"
            )
        local = value.to_local().detach().clone()
    elif value.shape == like.shape:
        local = value[slice(*rows)].to(like.device, copy=True)
    elif value.ndim:
        raise ValueError(
            f"load_state_dict: {what} has the shape {tuple(value.shape)}, and the parameter {tuple(like.shape)}; the "
            "checkpoint belongs to another model, or the optimizer keeps states that cannot be cut by rows"
        )
    else:
        return value.detach().clone()
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def refuse_other_names(
    saved: Sequence[str] | Mapping[str, Any], present: Mapping[str, Any], *, all_of_them: bool = True
) -> None:
    """Compare the parameters of a checkpoint with those of the model.

    Raises:
        ValueError: names the first that only one of them has.
    """
    strange = [name for name in saved if name not in present]
    missing = [name for name in present if name not in saved] if all_of_them else []
    if strange or missing:
        only = [f"{name} is only in the checkpoint" for name in strange[:_SHOWN]]
        only += [f"{name} only in the model" for name in missing[:_SHOWN]]
        raise ValueError(
            f"load_state_dict: the checkpoint belongs to another model: {', '.join(only)} "
            f"({len(strange)} and {len(missing)} in all); load it into the model that wrote it, with the same "
            "parameters frozen"
        )


def stand_in(inner: Optimizer, groups: Sequence[Sequence[nn.Parameter]]) -> Optimizer:
    """An optimizer that has stepped once, with gradients of zero, on other parameters; `inner` is as before.

    Args:
        groups: parameters for each of inner's groups.
    """
    stand = object.__new__(type(inner))
    stand.__dict__.update(inner.__dict__)
    stand.state = defaultdict(dict)
    stand._optimizer_step_pre_hooks, stand._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    stand.param_groups = [{**group, "params": list(own)} for group, own in zip(inner.param_groups, groups, strict=True)]
    for parameter in (parameter for own in groups for parameter in own):
        parameter.grad = torch.zeros_like(parameter)
    type(inner).step(stand)
    return stand


def has_states(inner: Optimizer) -> bool:
    """Whether it keeps something for every parameter already: it has stepped, or began with it."""
    return all(parameter in inner.state for group in inner.param_groups for parameter in group["params"])


def _sizes(groups: Sequence[Sequence[str]]) -> str:
    return ", ".join(str(len(group)) for group in groups)
