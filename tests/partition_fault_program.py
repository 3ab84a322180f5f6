"""Four ranks, as processes, of which the last dies in the backward of its third step.

    python partition_fault_program.py FOLDER

Each survivor writes to FOLDER/RANK.json what it was told: the error, the operation, the ranks that it names, and after
how many seconds.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from forked_ranks import fork_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from thinwire.comm.errors import CommError
from thinwire.comm.partition.door import partition

RANKS, VICTIM = 4, 3
DEADLINE_S = 8.0


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.die_in_backward = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x))
            if self.die_in_backward:
                x.register_hook(lambda _: os._exit(9))
                self.die_in_backward = False  # between the two blocks: the second has had its backward by then
        return x


def run_rank(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("world", "node"))
    model = Net()
    optimizer = partition(
        model, mesh, torch.optim.SGD, params="node", grads="node", optim="world", timeout_s=DEADLINE_S, lr=0.1
    )
    began = time.monotonic()
    try:
        for step in range(3):
            model.die_in_backward = rank == VICTIM and step == 2
            began = time.monotonic()
            model(torch.randn(4, 8)).square().mean().backward()
            optimizer.step()
        told: dict[str, Any] = {"error": "none"}
    except CommError as error:
        told = {
            "error": type(error).__name__,
            "operation": error.operation,
            "ranks": list(error.missing_ranks),
            "seconds": time.monotonic() - began,
        }
    (folder / f"{rank}.json").write_text(json.dumps(told))
    store.set(f"told/{rank}", "")  # who leaves at once would be missed by the others, too
    store.wait([f"told/{other}" for other in range(RANKS) if other != VICTIM], timedelta(seconds=60))


if __name__ == "__main__":
    given = Path(sys.argv[1])
    codes = fork_ranks(RANKS, lambda rank, port: run_rank(rank, port, given))
    sys.exit(codes != [9 if rank == VICTIM else 0 for rank in range(RANKS)])
