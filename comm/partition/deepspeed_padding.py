"""DeepSpeed's reduce-scatter of several tensors, padded with zeros and not with what was in the memory."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup


def reduce_scatter_coalesced(tensors: list[Tensor], group: ProcessGroup | None = None) -> list[Tensor]:
    """This rank's slices of the mean of each tensor, as deepspeed.runtime.comm.coalesced_collectives has it.

    A block that holds padding takes its scale from it: a number that was left in the memory would silence its values.

    Args:
        tensors: of one dtype; each is cut into as many equal slices as there are ranks, the last ones shorter or empty.
    """
    import deepspeed.comm

    size, rank = dist.get_world_size(group), dist.get_rank(group)
    each = [-(-tensor.numel() // size) for tensor in tensors]
    rows = [
        F.pad(tensor.reshape(-1), (0, size * share - tensor.numel())).view(size, share)
        for tensor, share in zip(tensors, each, strict=True)
    ]
    flat = torch.cat(rows, dim=1).view(-1).div_(size)
    own = flat.new_empty(sum(each))
    deepspeed.comm.reduce_scatter_fn(own, flat, group=group)
    lengths = [max(0, min(share, t.numel() - rank * share)) for t, share in zip(tensors, each, strict=True)]
    return [piece[:length] for piece, length in zip(own.split(each), lengths, strict=True)]
