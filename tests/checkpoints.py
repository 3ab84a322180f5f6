"""Checkpointers of one rank and of several, and whether two trees hold the same."""

from __future__ import annotations

from pathlib import Path

import torch
from ranks import Rank

from thinwire.dist.checkpoint import Checkpointer, CheckpointSettings


def alone(folder: Path, **settings: object) -> Checkpointer:
    return Checkpointer(folder, CheckpointSettings(**settings), group=None, rank=0, world_size=1)


def among(rank: Rank, folder: Path, **settings: object) -> Checkpointer:
    group = rank.group if rank.size > 1 else None
    return Checkpointer(folder, CheckpointSettings(**settings), group=group, rank=rank.rank, world_size=rank.size)


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(left: object, right: object) -> None:
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert isinstance(right, torch.Tensor)
        assert (left.dtype, left.shape) == (right.dtype, right.shape)
        assert raw_bytes(left) == raw_bytes(right)
    elif isinstance(left, dict):
        assert isinstance(right, dict)
        assert list(left) == list(right)
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert isinstance(right, list | tuple)
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    else:
        assert repr(left) == repr(right)
