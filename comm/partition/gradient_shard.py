"""The gradient of one unit: summed inside the grads level at every micro-batch, beyond it once per step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from thinwire.comm.channel import Channel
from thinwire.comm.partition.cascade import Cascade
from thinwire.comm.partition.levels import Levels
from thinwire.comm.partition.ownership import Ownership
from thinwire.comm.partition.placement import Placement
from thinwire.comm.partition.wires.recode import gathered
from thinwire.comm.partition.wires.wire import Wire
from thinwire.comm.two_shot import split_evenly
from thinwire.kernels.block_payload import Runs

_PIECE = 256  # elements: what replicas of an owner share is cut in steps of this, so that blocks are whole
_SUM = "sum over replicas"  # the memory of what these sums have left out


class GradientShard:
    """This rank's fp32 shard of a unit's gradient sum, and the way there.

    take():   t <- t + reduce-scatter of the micro-batch's gradient over the levels of grads, fastest first
    finish(): g <- 1/W (reduce-scatter of t over the levels between grads and optim; then summed over the replicas of
              this rank's owner, where optim does not hold all ranks: reduce-scatter and all-gather)

    Args:
        wires: the format of every level's gradients, by its name.
        feedback: levels beyond grads whose wire gets an error memory. What a step leaves in it counts only after
            commit(), so a step that is refused leaves the memories as they were; that takes them twice.
    Attributes:
        total: fp32, t: what the owners of this rank's group of grads have, in flat order; None before the first take().
        own: the part of `total` that this rank owns; after finish() it holds g.
        memories: what each level with feedback has left out, by the level's name, and, where there are replicas, what
            was left out of their sums, by "sum over replicas".
    """

    def __init__(
        self,
        ownership: Ownership,
        levels: Levels,
        placement: Placement,
        wires: Mapping[str, Wire],
        *,
        feedback: frozenset[str] = frozenset(),
    ) -> None:
        self._ownership = ownership
        self._wires = wires
        self._world_size = levels.world_size
        self._inside = Cascade(levels, 0, placement.grads)
        self._between = Cascade(levels, placement.grads, placement.optim)
        self._replicas = Cascade(levels, placement.optim, levels.depth)
        self._owner = levels.number(levels.rank, placement.optim)
        self._first = self._owner - self._between.leaf
        self._counts = ownership.counts(self._first, self._first + self._between.leaves)
        own = ownership.count(self._owner, self._owner + 1)
        self._pieces = split_evenly(own, self._replicas.leaves, _PIECE)
        self._feedback = feedback
        self._order: Runs | None = None
        self._is_empty = True
        self._next_memories: dict[str, Tensor] = {}
        self._has_next = False
        self.memories: dict[str, Tensor] = {}
        self.total: Tensor | None = None

    @property
    def own(self) -> Tensor:
        assert self.total is not None
        start = sum(self._counts[: self._between.leaf])
        return self.total[start : start + self._counts[self._between.leaf]]

    @property
    def own_numel(self) -> int:
        """Elements that this rank owns."""
        return self._counts[self._between.leaf]

    @property
    def total_numel(self) -> int:
        """Elements of `total`."""
        return sum(self._counts)

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been taken since the last clear()."""
        return self._is_empty

    @property
    def takes_alone(self) -> bool:
        """Whether take() needs no other rank."""
        return self._inside.leaves == 1

    @property
    def finishes_alone(self) -> bool:
        """Whether finish() needs no other rank."""
        return self._between.leaves == self._replicas.leaves == 1

    def take(self, channel: Channel | None, values: Tensor, key: int) -> None:
        """Add one micro-batch's gradient.

        Args:
            values: fp32, the whole unit in flat order; not used afterwards by the caller.
        """
        self._take(channel, values, key, None)

    def take_from_fsdp(self, channel: Channel | None, flat: Tensor, key: int) -> None:
        """take() of FSDP2's flat gradient, read from where it is."""
        if self._order is None:
            self._order = self._ownership.order_of_fsdp(self._inside.first_counts(self._inside_counts()))
        self._take(channel, flat, key, self._order)

    def _take(self, channel: Channel | None, values: Tensor, key: int, order: Runs | None) -> None:
        if channel is None:
            values = gathered(values, order)
        else:
            counts = self._inside_counts()
            values = self._inside.reduce_scatter(channel, values, counts, self._wires, key=key, order=order)
        if self._is_empty or self.total is None:
            self.total = values
        else:
            self.total.add_(values)
        self._is_empty = False

    def take_zeros(self, device: torch.device) -> None:
        """Begin with a gradient of 0: for a unit that no rank has used in this step."""
        self.total = torch.zeros(sum(self._counts), dtype=torch.float32, device=device)
        self._is_empty = False

    def finish(self, channel: Channel | None, key: int) -> None:
        """Leave the mean gradient of this rank's rows in `own`."""
        assert self.total is not None
        own = self.own
        if channel is not None:
            memories = self._begin_memories()
            if self._between.leaves > 1:
                own = self._between.reduce_scatter(
                    channel, self.total, self._counts, self._wires, key=key, memories=memories
                )
            if self._replicas.leaves > 1:
                own = self._sum_over_replicas(channel, own, key + self._between.leaves, memories)
        torch.mul(own, 1.0 / self._world_size, out=self.own)

    def commit(self) -> None:
        """The step that finish() was for has been made: its errors are those to make good."""
        if self._has_next:
            self.memories, self._next_memories = self._next_memories, self.memories
        self._has_next = False

    def clear(self) -> None:
        """Forget what was taken, and what was left out since the last commit(); keep the memory."""
        self._is_empty = True
        self._has_next = False

    def sent_bytes(self, micro_batches: int) -> Counter[str]:
        """Payload bytes that this rank sends in a step, by level."""
        sent: Counter[str] = Counter()
        for level, count in self._inside.reduce_scatter_bytes(self._inside_counts(), self._wires).items():
            sent[level] += micro_batches * count
        sent.update(self._between.reduce_scatter_bytes(self._counts, self._wires))
        sent.update(self._replicas.reduce_scatter_bytes(self._pieces, self._wires))
        if self._replicas.leaves > 1:
            sent.update(self._replicas.all_gather_bytes(self._piece_sizes()))
        return sent

    def _inside_counts(self) -> list[int]:
        """Elements of each leaf of the grads level: the owners below it together."""
        per_leaf = self._between.leaves
        return [self._ownership.count(first, first + per_leaf) for first in range(0, self._ownership.owners, per_leaf)]

    def encoded_counts(self) -> dict[str, int]:
        """Elements that this rank writes for each level on their way once, by its name; it reads about as many."""
        counts = self._inside.reduce_scatter_counts(self._inside_counts())
        counts |= self._between.reduce_scatter_counts(self._counts)
        return counts | self._replicas.reduce_scatter_counts(self._pieces)

    def memory_counts(self) -> dict[str, int]:
        """Elements of each memory, by its name. It is there twice: as the last step left it, and for the next."""
        counts = self._between.reduce_scatter_counts(self._counts)
        counts |= self._replicas.reduce_scatter_counts(self._pieces)
        found = {level: count for level, count in counts.items() if level in self._feedback}
        if self._replicas.leaves > 1 and self._replicas.names[-1] in self._feedback:
            found[_SUM] = self._pieces[self._replicas.leaf]
        return found

    def all_memories(self) -> list[Tensor]:
        """Everything that error feedback keeps."""
        return [*self.memories.values(), *self._next_memories.values()]

    def _begin_memories(self) -> dict[str, Tensor]:
        """Copies of the memories, for the step to change."""
        assert self.total is not None
        for name, count in self.memory_counts().items():
            if name not in self.memories:
                self.memories[name] = torch.zeros(count, dtype=torch.float32, device=self.total.device)
            if name not in self._next_memories:
                self._next_memories[name] = torch.empty_like(self.memories[name])
            self._next_memories[name].copy_(self.memories[name])
        self._has_next = True
        return self._next_memories

    def _sum_over_replicas(self, channel: Channel, own: Tensor, key: int, memories: Mapping[str, Tensor]) -> Tensor:
        """The same bits on every replica: each piece is summed by one of them, and encoded once for all."""
        piece = self._replicas.reduce_scatter(channel, own, self._pieces, self._wires, key=key, memories=memories)
        wire = self._wires[self._replicas.names[-1]]
        memory = memories.get(_SUM)
        payload = wire.encode(piece, [piece.numel()], key=key + self._replicas.leaves, memory=memory)
        sizes = self._piece_sizes()
        gathered = self._replicas.all_gather(channel, payload, sizes)
        total = torch.empty_like(own)
        for count, part, into in zip(self._pieces, gathered.split(sizes), total.split(self._pieces), strict=True):
            if count:
                wire.decode(part, into)
        return total

    def _piece_sizes(self) -> list[int]:
        wire = self._wires[self._replicas.names[-1]]
        return [wire.payload_bytes(count) for count in self._pieces]
