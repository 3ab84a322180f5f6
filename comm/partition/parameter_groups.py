"""Groups of parameters with options of their own, kept by name while fully_shard() replaces the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass(frozen=True)
class ParameterGroup:
    """names: of the parameters. options: the rest of the dict."""

    names: tuple[str, ...]
    options: Mapping[str, Any]


def name_groups(model: nn.Module, groups: Sequence[Mapping[str, Any]] | None) -> list[ParameterGroup] | None:
    """The groups by name; None stays None.

    Args:
        groups: as of torch.optim; each "params" is a parameter of the model, a name, a pattern with * or ?, or several
            of these. A parameter belongs to the first group that names it.
    Raises:
        ValueError: names the group: it has no params, names what the model does not have or what is not trained, or all
            groups together leave a parameter out.
    """
    if groups is None:
        return None
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    by_id = {id(p): name for name, p in model.named_parameters()}
    left = dict.fromkeys(trained)
    found = []
    for index, group in enumerate(groups):
        where = f"parameter_groups[{index}]"
        if not isinstance(group, Mapping) or "params" not in group:
            raise ValueError(
                f'{where}: {group!r} has no "params"; give a dict such as {{"params": "*.bias", "lr": 1e-3}}'
            )
        names: list[str] = []
        for entry in _entries(group["params"]):
            names += _take(entry, where, by_id, left, frozen)
        found.append(ParameterGroup(tuple(names), {key: value for key, value in group.items() if key != "params"}))
    if left:
        shown = ", ".join(list(left)[:3])
        raise ValueError(
            f"parameter_groups: no group holds {shown}{f' and {len(left) - 3} others' if len(left) > 3 else ''}; add a "
            'last group {"params": "*"}, or set requires_grad of what shall not be trained to False'
        )
    return found


def build_optimizer(
    factory: Callable[..., Optimizer],
    groups: Sequence[ParameterGroup] | None,
    options: Mapping[str, Any],
    parameters: Mapping[str, nn.Parameter],
) -> Optimizer:
    """The optimizer of some parameters by name: of all in one group, or of the groups."""
    if groups is None:
        return factory(list(parameters.values()), **options)
    return factory(
        [{**group.options, "params": [parameters[name] for name in group.names]} for group in groups], **options
    )


def _entries(params: Any) -> Iterable[Any]:
    if isinstance(params, Tensor | str):
        return [params]
    return [entry[1] if isinstance(entry, tuple) else entry for entry in params]  # tuples: named_parameters()


def _take(entry: Any, where: str, by_id: Mapping[int, str], left: dict[str, None], frozen: set[str]) -> list[str]:
    if isinstance(entry, str) and any(sign in entry for sign in "*?["):
        names = [name for name in left if fnmatchcase(name, entry)]
        if not names:
            raise ValueError(
                f"{where}.params: {entry!r} matches no trained parameter that the groups before it have left; see "
                "model.named_parameters()"
            )
    else:
        name = entry if isinstance(entry, str) else by_id.get(id(entry), "")
        if name in frozen:
            raise ValueError(f"{where}.params: {name} is not trained: its requires_grad is False; leave it out")
        if name not in by_id.values():
            what = repr(entry) if isinstance(entry, str) else f"a {type(entry).__name__}"
            raise ValueError(
                f"{where}.params: {what} is no parameter of the model; give some of model.named_parameters()"
            )
        if name not in left:
            raise ValueError(f"{where}.params: {name} is in an earlier group, or here twice; name it once")
        names = [name]
    for name in names:
        del left[name]
    return names
