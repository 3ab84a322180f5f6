"""Which modules are gathered one at a time, and how far ahead of the one that computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import nn
from torch.distributed.fsdp import FSDPModule


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The members of the outermost ModuleLists that have parameters, each once."""
    blocks: list[nn.Module] = []

    def visit(module: nn.Module, is_list: bool) -> None:
        for child in module.children():  # each module once, however often it is listed
            if isinstance(child, nn.ModuleList | nn.ModuleDict):
                visit(child, is_list or isinstance(child, nn.ModuleList))
            elif not is_list:
                visit(child, False)
            elif child not in blocks and any(True for _ in child.parameters()):
                blocks.append(child)

    visit(model, False)
    return blocks


def choose_blocks(model: nn.Module, units: Sequence[nn.Module] | None) -> list[nn.Module]:
    """The modules that become units beside the model itself.

    Raises:
        ValueError: units that are not in the model, overlap or share parameters with each other; names them.
    """
    names = {module: name or "the model" for name, module in model.named_modules()}
    blocks = find_blocks(model) if units is None else list(units)
    for index, block in enumerate(blocks):
        if not isinstance(block, nn.Module) or block not in names:
            raise ValueError(
                f"units[{index}]: {_describe(block)} is not a module of the model; give some of model.modules()"
            )
        if block is model:
            raise ValueError(f"units[{index}]: the model itself is always a unit, of what no other unit holds; drop it")
        if isinstance(block, nn.ModuleList | nn.ModuleDict):
            raise ValueError(
                f"units[{index}]: {names[block]} has no forward(); give its members, units=[*{names[block]}]"
            )
    held: dict[nn.Module, int] = {}
    for index, block in enumerate(blocks):
        for module in block.modules():
            if module in held:
                raise ValueError(
                    f"units[{index}]: {names[block]} overlaps units[{held[module]}], {names[blocks[held[module]]]}: "
                    f"both hold {names[module]}; each module can be gathered with one unit only"
                )
            held[module] = index
    _check_tied(model, held, [names[block] for block in blocks])
    return blocks


def prefetch_blocks(model: nn.Module, blocks: Sequence[nn.Module], ahead: int) -> None:
    """Gather `ahead` units before they are needed, in forward and in backward.

    Args:
        blocks: in the order in which forward runs them: in another order the copies only come early or late.
    """
    units = [cast(FSDPModule, module) for module in blocks]
    root = cast(FSDPModule, model)
    root.set_modules_to_forward_prefetch(units[:ahead])
    last_first = units[::-1]
    # FSDP2 gathers one unit ahead in backward unless it is told what; told itself, it gathers nothing.
    root.set_modules_to_backward_prefetch(last_first[:ahead] if ahead else [root])
    for index, unit in enumerate(units):
        unit.set_modules_to_forward_prefetch(units[index + 1 : index + 1 + ahead])
        before = last_first[len(units) - index :][:ahead]
        unit.set_modules_to_backward_prefetch(before or [unit])


def _check_tied(model: nn.Module, held: dict[nn.Module, int], names: Sequence[str]) -> None:
    """A parameter that two units hold would be gathered, changed and stored twice."""
    homes: dict[int, tuple[int, str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for own, parameter in module.named_parameters(recurse=False):
            home = held.get(module, -1)
            full = f"{name}.{own}" if name else own
            before, first = homes.setdefault(id(parameter), (home, full))
            if before != home:
                where = [names[unit] if unit >= 0 else "the model's own unit" for unit in (before, home)]
                raise ValueError(
                    f"units: {first} and {full} are one parameter, held by {where[0]} and by {where[1]}; leave the "
                    "modules that share it out of units, so that both are in the model's own unit"
                )


def _describe(block: object) -> str:
    return f"{type(block).__name__}" if isinstance(block, nn.Module) else repr(block)
