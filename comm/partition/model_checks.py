"""What partition() refuses in a model or an optimizer, before anything is sent or changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, Optimizer

from thinwire.comm.partition.ownership import Ownership

WEIGHTS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def check_model(model: nn.Module, weights: str) -> None:
    """Whether fully_shard() and a fp32 optimizer can take this model.

    Args:
        weights: the setting: what the shards are kept in.
    Raises:
        ValueError: names the module or parameter, and says what to do.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: a {type(model).__name__} is no torch.nn.Module")
    if isinstance(model, nn.ModuleList | nn.ModuleDict):
        raise ValueError(f"model: a {type(model).__name__} has no forward(); give the module whose forward you call")
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            "model: it is compiled already, and would be traced without its gathers; call partition() on the plain "
            "module, then model.compile()"
        )
    for name, module in model.named_modules():
        where = f"module {name}" if name else "the model"
        if isinstance(module, DistributedDataParallel):
            raise ValueError(
                f"model: {where} is in DistributedDataParallel, which keeps it whole on each rank; give the module "
                "that it wraps: partition() sums the gradients itself"
            )
        if isinstance(module, FSDPModule | FullyShardedDataParallel):
            raise ValueError(
                f"model: {where} is sharded already; give partition() the plain module: it calls fully_shard() itself, "
                "on the level that `params` names"
            )
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            raise ValueError(f"model: {where} makes sparse gradients, which cannot be sharded; give it sparse=False")
    _check_parameters(model, weights)


def check_compute_dtype(compute_dtype: torch.dtype | None) -> None:
    """Raises: ValueError for what neither trains without loss scaling nor saves anything."""
    if compute_dtype in (None, torch.float32, torch.bfloat16):
        return
    why = " (fp16 needs a loss scale, and partition() has none)" if compute_dtype == torch.float16 else ""
    raise ValueError(
        f"compute_dtype: {compute_dtype}{why}; allowed are torch.bfloat16, torch.float32 and None (the weights' own)"
    )


def check_factory(optimizer: object) -> None:
    """Raises: ValueError for what is no class or function that makes an optimizer."""
    if isinstance(optimizer, Optimizer):
        raise ValueError(
            f"optimizer: this {type(optimizer).__name__} holds the whole parameters already; give the class and its "
            f"options, such as partition(model, mesh, torch.optim.{type(optimizer).__name__}, ..., lr=3e-4)"
        )
    if not callable(optimizer):
        raise ValueError(f"optimizer: {optimizer!r} is no optimizer class or factory; give one, e.g. torch.optim.AdamW")


def try_optimizer(build: Callable[[dict[str, nn.Parameter]], Optimizer], stand_ins: dict[str, nn.Parameter]) -> None:
    """Let bad options fail while the model is still as it was.

    Args:
        build: makes the optimizer of parameters by name.
        stand_ins: one for every parameter that will be trained.
    Raises:
        ValueError: it does not train all of them, or others, or cannot train sharded ones.
    """
    made: Any = build(stand_ins)
    check_optimizer(made, stand_ins)
    for group in made.param_groups:
        if group.get("fused") and isinstance(made, SGD):
            raise ValueError("options: torch has no fused SGD for sharded parameters; give foreach=True, or neither")
        if group.get("fused") and not isinstance(made, Adam):
            raise ValueError(
                f"options: fused {type(made).__name__} is not known to work on sharded parameters; give foreach=True"
            )


def check_optimizer(made: object, masters: dict[str, nn.Parameter]) -> None:
    """Raises: ValueError unless it is an optimizer of exactly these parameters."""
    if not isinstance(made, Optimizer):
        raise ValueError(f"optimizer: it made a {type(made).__name__}, not a torch.optim.Optimizer")
    trained = {id(p) for group in made.param_groups for p in group["params"]}
    if lacking := [name for name, master in masters.items() if id(master) not in trained]:
        raise ValueError(
            f"optimizer: it does not train {_list(lacking)}; the factory must give its optimizer the parameters that "
            "it is called with, all of them: they are the fp32 rows that this rank owns, not the model's. Set "
            "requires_grad of what shall not be trained to False before partition()"
        )
    if trained - {id(master) for master in masters.values()}:
        raise ValueError(
            "optimizer: it also trains parameters that it was not called with; those of the model itself are gathered "
            "and freed as training goes, so build it only on the parameters that the factory is given"
        )


def placeholders(ownership: Ownership, owner: int, device_type: str) -> dict[str, nn.Parameter]:
    """Parameters with the rows that an owner will have, that take no memory, by name."""
    made = {}
    for name, shape in ownership.shapes.items():
        start, stop = ownership.rows(name, owner)
        made[name] = nn.Parameter(torch.zeros(1, device=device_type).expand(stop - start, *shape[1:]))
    return made


def _check_parameters(model: nn.Module, weights: str) -> None:
    kept = WEIGHTS[weights]
    allowed = {torch.float32} if kept == torch.float32 else {torch.float32, torch.bfloat16}
    dtypes: dict[torch.dtype, str] = {}
    devices: dict[torch.device, str] = {}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise ValueError(
                f"model: parameter {name} is a DTensor, so sharded already; give partition() plain parameters"
            )
        if parameter.dim() == 0:
            raise ValueError(f"model: parameter {name} is a scalar, which has no rows to share out; give it shape (1,)")
        if not parameter.is_contiguous():
            raise ValueError(
                f"model: parameter {name} is not contiguous in memory; assign parameter.contiguous() first"
            )
        if parameter.dtype not in allowed:
            fix = 'weights="bf16"' if parameter.dtype == torch.bfloat16 else "model.float()"
            raise ValueError(
                f"model: parameter {name} is {_short(parameter.dtype)}; with weights={weights!r} parameters are "
                f"{' or '.join(sorted(map(_short, allowed)))}; use {fix}"
            )
        dtypes.setdefault(parameter.dtype, name)
        devices.setdefault(parameter.device, name)
    for what, found in (("dtype", dtypes), ("device", devices)):
        if len(found) > 1:
            said = ", ".join(f"{name} is {_short(one)}" for one, name in found.items())
            raise ValueError(f"model: its parameters must have one {what}, but {said}; move or cast them first")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("model: no parameter has requires_grad, so there is nothing to train")


def _short(what: object) -> str:
    return str(what).removeprefix("torch.")


def _list(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} others' if len(names) > 3 else ''}"
