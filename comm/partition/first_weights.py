"""Weights that get their values after partition(): are the copies of each shard equal?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from thinwire.comm.partition.levels import Levels
from thinwire.comm.partition.placement import Placement
from thinwire.comm.partition.unit import Unit
from thinwire.comm.queue import CommQueue
from thinwire.comm.rank_names import name_ranks
from thinwire.comm.same_weights import weights_digest


def check_at_first_forward(
    model: nn.Module, units: Sequence[Unit], queue: CommQueue, levels: Levels, placement: Placement
) -> None:
    """For a model on the meta device: look when it is first used, before anything is gathered. Collective."""

    def refuse_meta(module: nn.Module, args: object) -> None:
        first.remove()
        if any(parameter.is_meta for parameter in model.parameters()):
            raise ValueError(
                "model: it is still on the meta device, without values; call model.to_empty(device=...) after "
                "partition(), then initialise it or load a checkpoint"
            )

    def compare(module: nn.Module, args: object) -> None:
        last.remove()
        check_copies(units, queue, levels, placement)

    first = model.register_forward_pre_hook(refuse_meta, prepend=True)
    last = model.register_forward_pre_hook(compare)  # after FSDP2 has looked for shards that were replaced


def check_copies(units: Sequence[Unit], queue: CommQueue, levels: Levels, placement: Placement) -> None:
    """Compare each shard with its copies on other ranks. Collective: every rank raises, or none.

    Raises:
        ValueError: names the ranks whose shard differs from the first copy.
    """
    shard = {name: rows for unit in units for name, rows in unit.whole_shard().items()}
    mine = torch.frombuffer(bytearray(weights_digest(shard)), dtype=torch.int64)
    told = queue.submit("control/shards", lambda channel: channel.all_gather_same(mine)).wait().flatten().tolist()
    first: dict[int, int] = {}
    odd = []
    for rank, digest in enumerate(told):
        number = levels.number(rank, placement.params)
        if digest != first.setdefault(number, digest):
            odd.append(rank)
    if odd:
        raise ValueError(
            f"model: {name_ranks(odd)} begin{'s' if len(odd) == 1 else ''} with other values than the first rank that "
            "holds the same shard, and would never become equal; initialise shards from one seed on all ranks, or "
            "load a checkpoint"
        )
