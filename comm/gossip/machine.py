"""The model of one machine: which tensors it exchanges, and what gossip cannot do with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from thinwire.comm.finite import are_finite
from thinwire.comm.gossip.replica import ModelReplica, local

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Machine:
    """This rank's part of a machine's model.

    Args:
        parameters: those that learn, by name, in an order that is the same on all machines.
        statistics: floating-point buffers of the model's state, if they are exchanged. buffers: all that it has.
        shard: (rank in the mesh that the model is sharded over, its size).
        group: the ranks of that mesh; None where this rank is the machine.
    """

    parameters: Mapping[str, Tensor]
    statistics: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    replica: ModelReplica
    shard: tuple[int, int] = (0, 1)
    group: ProcessGroup | None = None

    def is_spoilt(self) -> bool:
        """Whether another shard of this machine is not finite. Collective over the machine's ranks."""
        if self.group is None:
            return False
        own = not are_finite([self.replica.weights()])
        bad = torch.tensor([float(own)], device=self.replica.device)
        dist.all_reduce(bad, dist.ReduceOp.MAX, group=self.group)
        return bool(bad) and not own

    def tensors(self) -> dict[str, Tensor]:
        """What this rank has of all that is exchanged, by name."""
        return {name: local(tensor) for name, tensor in {**self.parameters, **self.statistics}.items()}

    def numels(self) -> list[int]:
        """Elements of each of them."""
        return [tensor.numel() for tensor in self.tensors().values()]


def examine(optimizer: Optimizer, model: nn.Module | None, *, statistics: bool = False) -> Machine:
    """The parameters that an optimizer trains, in the model's order if there is one, else in the optimizer's.

    Args:
        statistics: whether floating-point buffers are exchanged as well.
    Raises:
        ValueError: says what gossip cannot do with, and what to do instead. Nothing has been sent.
    """
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if model is None:
        flat = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        parameters: dict[str, Tensor] = {f"parameter {number}": p for number, p in enumerate(flat)}
    else:
        inner = _unwrapped(model)
        parameters = {name: p for name, p in inner.named_parameters() if p.requires_grad}
        if missing := [name for name, parameter in parameters.items() if id(parameter) not in trained]:
            raise ValueError(
                f"optimizer: it does not train {', '.join(missing[:3])}{' and others' if len(missing) > 3 else ''}; "
                "give the optimizer of all of the model's parameters, or set requires_grad of the others to False"
            )
    if not parameters:
        raise ValueError("optimizer: none of its parameters requires a gradient, so there is nothing to exchange")
    for name, parameter in parameters.items():
        _check(name, parameter)
    buffers: dict[str, Tensor] = {}
    if statistics and model is not None:
        kept = _unwrapped(model).state_dict(keep_vars=True).keys()
        buffers = {n: b for n, b in _unwrapped(model).named_buffers() if n in kept and b.is_floating_point()}
    shard, group = _mesh(parameters)
    replica = ModelReplica(list(parameters.values()), optimizer, list(buffers.values()))
    every = {} if model is None else dict(_unwrapped(model).named_buffers())
    return Machine(parameters, buffers, every, replica, shard, group)


def _check(name: str, parameter: Tensor) -> None:
    if parameter.is_meta:
        raise ValueError(f"model: {name} has no values yet (device meta); call to_empty() and initialise it first")
    if parameter.dtype not in _DTYPES:
        raise ValueError(
            f"model: {name} is {str(parameter.dtype).removeprefix('torch.')}; gossip exchanges float32, bfloat16 and "
            "float16 weights: convert the model, such as by model.float()"
        )


def _unwrapped(model: nn.Module) -> nn.Module:
    if not isinstance(model, DistributedDataParallel):
        return model
    ranks = dist.get_process_group_ranks(model.process_group) if dist.is_initialized() else []
    if model.process_group.size() == 1:
        module: nn.Module = model.module
        return module
    raise ValueError(
        f"model: DistributedDataParallel averages its gradients among {model.process_group.size()} ranks"
        f"{f' ({ranks})' if ranks else ''}, and gossip gives each rank a model of its own; give the module itself, or "
        "fully_shard() over the ranks of one machine and gossip between machines"
    )


def _mesh(parameters: Mapping[str, Tensor]) -> tuple[tuple[int, int], ProcessGroup | None]:
    sharded = {name: p for name, p in parameters.items() if isinstance(p, DTensor)}
    if not sharded:
        return (0, 1), None
    first = next(iter(sharded.values())).device_mesh
    for name, parameter in sharded.items():
        if parameter.device_mesh != first:
            raise ValueError(
                f"model: {name} is sharded on another mesh than {next(iter(sharded))}; gossip needs one mesh for all"
            )
    if first.ndim != 1:
        raise ValueError(
            "model: it is sharded on a mesh of two dimensions, and FSDP2 averages gradients over the first; "
            'give fully_shard the fast dimension alone, such as mesh["node"], and gossip the group of the other one'
        )
    if whole := [name for name in parameters if name not in sharded]:
        raise ValueError(
            f"model: {whole[0]} is not sharded, other parameters are; call fully_shard() on the whole model"
        )
    return (first.get_local_rank(), first.size()), first.get_group()
