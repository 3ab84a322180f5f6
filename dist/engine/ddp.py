"""The DDP engine: one replica per rank, gradients through the method that hooks into it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

from thinwire.comm.settings import Settings


class DDPSettings(Settings):
    """bucket_mb: gradients go out in pieces of about this many MB (10^6 bytes), as backward makes them ready."""

    kind: Literal["ddp"] = "ddp"
    bucket_mb: float = Field(25.0, gt=0)


def wrap_ddp(model: nn.Module, settings: DDPSettings, group: ProcessGroup) -> DistributedDataParallel:
    """The model in DistributedDataParallel, without its first broadcast: preflight has proved the weights equal.

    Args:
        group: all ranks of the job. Only DDP's own book-keeping uses it; gradients go through the method's queue.
    """
    return DistributedDataParallel(
        model,
        process_group=group,
        init_sync=False,
        gradient_as_bucket_view=True,
        bucket_cap_mb=settings.bucket_mb * 1e6 / 2**20,  # torch means MiB; it takes a float
    )
