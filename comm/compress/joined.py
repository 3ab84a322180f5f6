"""All tensors of a call compressed as one, so that their entries compete with each other: scope "global"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from thinwire.comm.channel import Channel
from thinwire.comm.compress.collective import Collective, Job
from thinwire.comm.compress.collectives.flat import copy_back, split_like
from thinwire.comm.compress.decoded import Decoded, add_to, split_decoded

_ONE = "all tensors"


class Joined:
    """outputs <- the inner collective's mean of the inputs joined into one tensor. A Collective."""

    def __init__(self, inner: Collective) -> None:
        self.inner = inner

    def mean(self, channel: Channel, job: Job) -> list[Decoded] | None:
        """As in Collective. Memories are added before joining, and written from what was decoded."""
        flat = torch.cat([x.reshape(-1) for x in job.inputs])
        parts = split_like(flat, job.inputs)
        if job.memories is not None:
            for part, (memory, _) in zip(parts, job.memories, strict=True):
                part.add_(memory.view(-1))
        mean = torch.empty_like(flat)
        draw = replace(job.draws[0], name=_ONE)
        sent = self.inner.mean(channel, Job([_ONE], [flat], [mean], [draw], weights=job.weights))
        copy_back(mean, job.outputs)
        if sent is None:
            return None
        decoded = split_decoded(sent[0], [x.numel() for x in job.inputs])
        if job.memories is None:
            return decoded
        for part, gone, (_, next_memory) in zip(parts, decoded, job.memories, strict=True):
            next_memory.copy_(part.view_as(next_memory))
            add_to(next_memory, gone, -1.0)
        return []

    def commit(self) -> None:
        self.inner.commit()

    def rollback(self) -> None:
        self.inner.rollback()

    def sent_bytes(self, shapes: Mapping[str, Sequence[int]], rank: int, size: int) -> dict[int, int]:
        """As in Collective."""
        return self.inner.sent_bytes(self.joined(shapes), rank, size)

    def joined(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, torch.Size]:
        """The one tensor that the inner collective is given."""
        return {_ONE: torch.Size([sum(torch.Size(shape).numel() for shape in shapes.values())])}

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.inner.load_state_dict(state)

    def merge(self, states: Sequence[Mapping[str, Any]], rank: int, size: int) -> dict[str, Any]:
        return self.inner.merge(states, rank, size)

    def surrendered(self) -> list[tuple[str, int, Tensor]]:
        return self.inner.surrendered()
