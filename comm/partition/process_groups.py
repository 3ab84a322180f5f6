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
    """params: the 1-D mesh for fully_shard. state: (params, grads, optim), on which an owner's rows are a DTensor's
    local shard with placements [Shard(0)] * 3.

    Torch sorts the ranks of a group unless told otherwise, and DTensor believes the mesh: both must say the same.
    Collective: all ranks build them at the same point.
    """

    def __init__(self, levels: Levels, placement: Placement, device_type: str, timeout_s: float) -> None:
        cuts = cuts_of(levels, placement)
        owners = torch.tensor(levels.group(placement.optim)).view(cuts)
        number = levels.number(levels.rank, placement.optim)
        place = [int(i) for i in torch.unravel_index(torch.tensor(number), cuts)]
        lines = (owners[:, place[1], place[2]], owners[place[0], :, place[2]], owners[place[0], place[1], :])
        self.groups: list[ProcessGroup] = [_new_group(line.tolist(), timeout_s) for line in lines]
        self.params = DeviceMesh.from_group(self.groups[0], device_type, mesh=lines[0], mesh_dim_names=("params",))
        self.state = DeviceMesh.from_group(
            self.groups, device_type, mesh=owners, mesh_dim_names=("params", "grads", "optim")
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
