"""What a partitioned model keeps between steps, by state: foretold, and counted in the storages of its tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from thinwire.comm.partition.gather import Gather
from thinwire.comm.partition.named_states import has_states, stand_in

if TYPE_CHECKING:
    from thinwire.comm.partition.optimizer import PartitionedUnit

_PROBE = (16, 16)


def predict_memory(units: Sequence[PartitionedUnit], gathers: Sequence[Gather], inner: Optimizer) -> dict[str, int]:
    """Bytes by state, before the first step: see PartitionedOptimizer.predicted_memory().

    Args:
        units: those with trained parameters.
        gathers: of all units.
    """
    weights = sum(gather.unit.padded_numel * gather.unit.weights_dtype.itemsize for gather in gathers)
    masters = sum(4 * unit.gradients.own_numel for unit in units if unit.own.separate)
    return {
        "params": weights,
        "grads": sum(4 * unit.gradients.total_numel for unit in units),
        "optim": masters + _predict_states(inner),
        "secondary": sum(gather.predicted_kept_bytes for gather in gathers),
        "memories": sum(2 * 4 * count for unit in units for count in unit.gradients.memory_counts().values()),
    }


def measure_memory(units: Sequence[PartitionedUnit], gathers: Sequence[Gather], inner: Optimizer) -> dict[str, int]:
    """Bytes by state, now: whole storages, each counted once."""
    seen: set[int] = set()
    weights = [tensor for gather in gathers for tensor in gather.unit.whole_shard().values()]
    masters = [unit.own.local(name) for unit in units for name in unit.masters]
    return {
        "params": _count(weights, seen),
        "grads": _count((unit.gradients.total for unit in units if unit.gradients.total is not None), seen),
        "optim": _count([*masters, *_states(inner)], seen),
        "secondary": sum(gather.kept_bytes for gather in gathers),
        "memories": _count((memory for unit in units for memory in unit.gradients.all_memories()), seen),
    }


def _predict_states(inner: Optimizer) -> int:
    """What the optimizer keeps, or, before its first step, will keep: tried out on a small parameter of each group."""
    if has_states(inner):
        return _count(_states(inner), set())
    probes = [
        nn.Parameter(torch.zeros(_PROBE, dtype=like.dtype, device="cpu" if like.is_meta else like.device))
        for group in inner.param_groups
        for like in [group["params"][0]]
    ]
    stand = stand_in(inner, [[probe] for probe in probes])
    total = 0
    for group, probe in zip(inner.param_groups, probes, strict=True):
        kept = [value for value in stand.state[probe].values() if isinstance(value, Tensor)]
        each = sum(value.element_size() for value in kept if value.shape == probe.shape)
        fixed = sum(value.nbytes for value in kept if value.shape != probe.shape)
        total += sum(_local(parameter).numel() * each + fixed for parameter in group["params"])
    return total


def _states(inner: Optimizer) -> list[Tensor]:
    return [value for own in inner.state.values() for value in own.values() if isinstance(value, Tensor)]


def _count(tensors: Iterable[Tensor], seen: set[int]) -> int:
    total = 0
    for tensor in tensors:
        storage = _local(tensor).untyped_storage()
        if storage.data_ptr() not in seen:
            total += storage.nbytes()
            seen.add(storage.data_ptr())
    return total


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
