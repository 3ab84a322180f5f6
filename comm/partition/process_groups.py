"""The torch process groups and meshes that FSDP2 and DTensor need: in the order of the numbers, not of the ranks."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from thinwire.comm.partition.levels import Levels
from thinwire.comm.partition.placement import Placement


class StateMeshes:
    """params: the 1-D mesh for fully_shard. state: of those of (params, grads, optim) that cut at all, on which an
    owner's rows are a DTensor's local shard with placement Shard(0) in every dimension.

    A dimension of one rank would cut nothing, but DTensor takes four to eight times as long over the first step of an
    optimizer for each dimension more. Torch sorts the ranks of a group unless told otherwise, and DTensor believes the
    mesh: both must say the same. Collective: all ranks build them at the same point.
    """

    def __init__(self, levels: Levels, placement: Placement, device_type: str, timeout_s: float) -> None:
        cuts = cuts_of(levels, placement)
        owners = torch.tensor(levels.group(placement.optim)).view(cuts)
        number = levels.number(levels.rank, placement.optim)
        place = [int(i) for i in torch.unravel_index(torch.tensor(number), cuts)]
        lines = (owners[:, place[1], place[2]], owners[place[0], :, place[2]], owners[place[0], place[1], :])
        first = _new_group(lines[0].tolist(), timeout_s)
        self.params = DeviceMesh.from_group(first, device_type, mesh=lines[0], mesh_dim_names=("params",))
        kept = [dim for dim in range(3) if cuts[dim] > 1] or [0]
        self.groups: list[ProcessGroup] = [_new_group(lines[dim].tolist(), timeout_s) if dim else first for dim in kept]
        self.state = DeviceMesh.from_group(
            self.groups if len(kept) > 1 else self.groups[0],
            device_type,
            mesh=owners.view([cuts[dim] for dim in kept]),
            mesh_dim_names=tuple(("params", "grads", "optim")[dim] for dim in kept),
        )


def cuts_of(levels: Levels, placement: Placement) -> tuple[int, int, int]:
    """s_p, s_g / s_p, s_o / s_g."""
    params, grads, optim = (levels.size(depth) for depth in (placement.params, placement.grads, placement.optim))
    return params, grads // params, optim // grads


def _new_group(ranks: list[int], timeout_s: float) -> ProcessGroup:
    group = dist.new_group(
        ranks, timeout=timedelta(seconds=timeout_s), use_local_synchronization=True, sort_ranks=False
    )
    assert isinstance(group, ProcessGroup)
    return group
