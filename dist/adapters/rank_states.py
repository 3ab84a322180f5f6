"""What each rank must keep, brought to rank 0: libraries that write one checkpoint file write it there. No pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from thinwire.comm.channel import Channel
from thinwire.comm.queue import CommQueue
from thinwire.dist.checkpoint_tree import DTYPE_NAMES, DTYPES, flatten, unflatten

_SIZES = 2  # bytes of the description, bytes of the tensors


def gather_at_first(tree: Mapping[str, Any], queue: CommQueue, device: torch.device) -> list[Any]:
    """The trees of all ranks in rank order, on rank 0; an empty list on the others. Collective.

    Args:
        tree: this rank's: dicts, lists and tuples of tensors and plain values.
        device: what the queue's group can send from; on rank 0 it holds the bytes of all ranks for a moment.
    Raises:
        ValueError: the tree holds something else.
    """
    form, tensors = flatten(tree)
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    layout = [[name, DTYPE_NAMES[tensor.dtype], list(tensor.shape)] for name, tensor in held.items()]
    described = json.dumps({"tree": form, "tensors": layout}).encode()
    description = torch.frombuffer(bytearray(described), dtype=torch.uint8)
    payload = torch.cat([description, *(tensor.view(-1).view(torch.uint8) for tensor in held.values())]).to(device)
    sizes = torch.tensor([len(described), len(payload) - len(described)], dtype=torch.int64, device=device)

    def exchange(channel: Channel) -> list[Any]:
        told = channel.all_gather_same(sizes).tolist()
        to_first = [len(payload) if rank == 0 else 0 for rank in range(channel.size)]
        from_each = [sum(told[rank]) if channel.rank == 0 else 0 for rank in range(channel.size)]
        gathered = payload.new_empty(sum(from_each))
        channel.all_to_all(gathered, payload, from_each, to_first, in_rounds=True)
        if channel.rank:
            return []
        return [
            _tree_of(piece, described_bytes)
            for piece, (described_bytes, _) in zip(gathered.cpu().split(from_each), told, strict=True)
        ]

    return queue.submit("control/checkpoint", exchange).wait()


def _tree_of(payload: Tensor, described_bytes: int) -> Any:
    described = json.loads(payload[:described_bytes].numpy().tobytes())
    tensors: dict[str, Tensor] = {}
    begin = described_bytes
    for name, dtype_name, shape in described["tensors"]:
        tensor = torch.empty(shape, dtype=DTYPES[dtype_name])
        raw = tensor.view(-1).view(torch.uint8)
        raw.copy_(payload[begin : begin + len(raw)])
        tensors[name] = tensor
        begin += len(raw)
    return unflatten(described["tree"], tensors)
