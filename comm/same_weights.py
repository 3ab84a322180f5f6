"""Do all ranks begin with the same tensors? Asked once, by methods that would never notice otherwise."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from thinwire.comm.queue import CommQueue
from thinwire.comm.rank_names import name_ranks


def check_same_weights(tensors: Mapping[str, Tensor], queue: CommQueue, *, method: str, place: str = "") -> None:
    """Compare names, shapes, dtypes and values over the ranks of a queue. Collective: every rank raises, or none.

    Args:
        tensors: this rank's, with values.
        method: what asks, for the message.
        place: what else must be equal.
    Raises:
        ValueError: names the ranks that differ from the first.
    """
    mine = torch.frombuffer(bytearray(weights_digest(tensors, place)), dtype=torch.int64)
    told = queue.submit("control/weights", lambda channel: channel.all_gather_same(mine)).wait().flatten().tolist()
    if odd := [queue.peers[rank] for rank, other in enumerate(told) if other != told[0]]:
        raise ValueError(
            f"model: {name_ranks(odd)} begin{'s' if len(odd) == 1 else ''} with other parameters than rank "
            f"{queue.peers[0]}, and method {method} would never make them equal; build the model from the same seed on "
            "every rank, and load what each rank has saved into it after this call"
        )


def weights_digest(tensors: Mapping[str, Tensor], place: str = "") -> bytes:
    """8 bytes that are equal where names, shapes, dtypes and values are."""
    digest = hashlib.blake2b(place.encode(), digest_size=8)
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.digest()
