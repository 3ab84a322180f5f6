"""What a partitioned model keeps between steps, by state: foretold, and counted in the storages of its tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from thinwire.comm.partition.gather import Gather
from thinwire.comm.partition.gradient_shard import GradientShard
from thinwire.comm.partition.named_states import has_states, stand_in

if TYPE_CHECKING:
    from thinwire.comm.partition.optimizer import PartitionedUnit

_PROBE = (16, 16)


@dataclass(frozen=True)
class KeptUnit:
    """What this rank keeps of a unit.

    weights_bytes: of its shard. gradients: None where nothing is trained. has_masters: copies of what this rank owns.
    secondary_bytes: of the copy that is kept between gathers.
    """

    weights_bytes: int
    gradients: GradientShard | None
    has_masters: bool
    secondary_bytes: int


def sum_memory(kept: Iterable[KeptUnit], states_bytes: int) -> dict[str, int]:
    """Bytes by state.

    Args:
        states_bytes: what the optimizer keeps, masters not counted.
    """
    total = {"params": 0, "grads": 0, "optim": states_bytes, "secondary": 0, "memories": 0}
    for unit in kept:
        total["params"] += unit.weights_bytes
        total["secondary"] += unit.secondary_bytes
        if unit.gradients is not None:
            total["grads"] += 4 * unit.gradients.total_numel
            total["optim"] += 4 * unit.gradients.own_numel * unit.has_masters
            total["memories"] += sum(2 * 4 * count for count in unit.gradients.memory_counts().values())
    return total


def predict_memory(units: Sequence[PartitionedUnit], gathers: Sequence[Gather], inner: Optimizer) -> dict[str, int]:
    """Bytes by state, before the first step: see PartitionedOptimizer.predicted_memory().

    Args:
        units: those with trained parameters.
        gathers: of all units.
    """
    trained = {part.gather: part for part in units}
    kept = []
    for gather in gathers:
        part = trained.get(gather)
        weights_bytes = gather.unit.padded_numel * gather.unit.weights_dtype.itemsize
        kept.append(
            KeptUnit(
                weights_bytes,
                part.gradients if part else None,
                has_masters=part is not None and part.own.separate,
                secondary_bytes=gather.predicted_kept_bytes,
            )
        )
    return sum_memory(kept, _predict_states(inner))


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


def states_bytes(inner: Optimizer, numels: Sequence[Sequence[int]]) -> int:
    """What an optimizer will keep of fp32 parameters of so many elements, in each of its groups.

    Tried out on a small parameter of each group, so its own may be on the meta device. States that it does not keep by
    element are taken to be as large for every parameter.
    """
    devices = [group["params"][0].device for group in inner.param_groups]
    probes = [
        nn.Parameter(torch.zeros(_PROBE, dtype=torch.float32, device="cpu" if device.type == "meta" else device))
        for device in devices
    ]
    stand = stand_in(inner, [[probe] for probe in probes])
    total = 0
    for counts, probe in zip(numels, probes, strict=True):
        kept = [value for value in stand.state[probe].values() if isinstance(value, Tensor)]
        each = sum(value.element_size() for value in kept if value.shape == probe.shape)
        fixed = sum(value.nbytes for value in kept if value.shape != probe.shape)
        total += sum(count * each + fixed for count in counts)
    return total


def _predict_states(inner: Optimizer) -> int:
    """What the optimizer keeps, or, before its first step, will keep."""
    if has_states(inner):
        return _count(_states(inner), set())
    return states_bytes(inner, [[_local(p).numel() for p in group["params"]] for group in inner.param_groups])


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
