"""What a method will put on the wire, and when, from shapes and levels alone: before there are processes or weights."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch

from thinwire.comm.settings import Settings

When: TypeAlias = Literal["gather", "backward", "step", "beside"]
"""When an exchange begins, and who waits for it.

gather: before a module's forward or backward pass, which waits for it; up to a unit ahead where it is prefetched.
backward: as soon as the gradients that it needs are there, behind the rest of the backward pass; the optimizer waits.
step: after the optimizer's step; the next step waits.
beside: after the optimizer's step, behind the whole of the next one; the step after that waits.
"""


DETECTED = ("pair", "node", "fabric")  # levels that a job finds by itself, between one rank and all


@dataclass(frozen=True)
class Parameter:
    """A parameter of a model that need not exist. numel is that of the whole, whoever holds it."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    trained: bool = True

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.shape.numel()


@dataclass(frozen=True)
class Seat:
    """A rank's place in a job that need not exist.

    Args:
        rank: this rank.
        level_of_peer: for each rank of the job the name of the level that joins it to this one; "self" for this one.
        levels: their names, fastest first, and the ranks in each group, those of the faster levels included.
    """

    rank: int
    level_of_peer: tuple[str, ...]
    levels: tuple[tuple[str, int], ...]

    @property
    def size(self) -> int:
        """Ranks of the job."""
        return len(self.level_of_peer)

    def by_level(self, sent_bytes: Mapping[int, int]) -> dict[str, int]:
        """Bytes by level of bytes by receiving rank."""
        levels: Counter[str] = Counter()
        for peer, count in sent_bytes.items():
            if count:
                levels[self.level_of_peer[peer]] += count
        return dict(levels)

    def size_of(self, name: str) -> int:
        """Ranks in each group of the level of this name.

        A name that a job detects, and for which this one has no level, stands for the next faster one, or for single
        ranks; world for all.

        Raises:
            ValueError: there is no such level.
        """
        sizes = dict(self.levels)
        if name in sizes:
            return sizes[name]
        if name == "world":
            return self.size
        if name not in DETECTED:
            known = ", ".join(dict.fromkeys((*sizes, *DETECTED, "world")))
            raise ValueError(f"there is no level {name!r}; it has {known}")
        return 1 if name == "pair" else sizes.get("node", sizes.get("pair", 1))

    def groups(self, name: str) -> tuple[tuple[int, ...], ...]:
        """The groups of that level, runs of neighbours: every rank in exactly one. Raises: as size_of()."""
        size = self.size_of(name)
        return tuple(tuple(range(first, first + size)) for first in range(0, self.size, size))

    def group(self, name: str) -> tuple[int, ...]:
        """This rank's group of that level. Raises: as size_of()."""
        size = self.size_of(name)
        first = self.rank // size * size
        return tuple(range(first, first + size))


@dataclass(frozen=True)
class Coding:
    """Encoding and decoding that an exchange does on this rank, where its bytes wait for it.

    codec: see codec_label(). encoded, decoded: elements of the tensors, whatever is kept of them.
    encodes, decodes: calls for all of them, each of which takes some time whatever its size.
    handled: elements that go through the pipeline of method compress meanwhile, in one call: joined, packed, checked.
    """

    codec: str
    encoded: int
    decoded: int
    encodes: int = 1
    decodes: int = 1
    handled: int = 0


@dataclass(frozen=True)
class Exchange:
    """What one rank sends for one purpose, once.

    operation: the meter knows it under names that begin so.
    sent_bytes: payload of one occurrence, by level.
    messages: that this rank sends in it, to all peers together.
    shots: messages of it that come one after another on the longest path, each of which costs a latency, by level.
    when: see When.
    needs: parameters whose gradients it waits for; for when gather, those that it gathers. Empty: all.
    per_step: occurrences in a step; 0.1 = in every tenth. Of a gather 2 for each micro-batch where forward and backward
        both need it, 1 for each where what forward gathered stays, 1 in all = in the first forward only. Of what waits
        for gradients 1 = in the last backward pass, as many as micro-batches = in each.
    queue: exchanges of one queue run one after another, in the order in which they become ready; different queues run
        at the same time, but share the links. Exchanges with the same needs follow one another in any case, such as the
        levels of one gather.
    exact: whether the meter will count just these bytes; else their size depends on data, and this is what is expected.
    """

    operation: str
    sent_bytes: Mapping[str, int]
    messages: int
    shots: Mapping[str, int]
    when: When
    needs: tuple[str, ...] = ()
    per_step: float = 1.0
    coding: tuple[Coding, ...] = ()
    exact: bool = True
    queue: str = "main"


@dataclass(frozen=True)
class Forecast:
    """Of one rank under one method.

    exchanges: of a step, in the order in which they are submitted.
    memory_bytes: what is kept between steps, by state: params, grads, optim, and what else the method remembers.
    remarks: what is not foretold, or only roughly, one sentence each.
    """

    exchanges: tuple[Exchange, ...]
    memory_bytes: Mapping[str, int] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    def bytes_per_step(self) -> dict[str, float]:
        """Payload bytes that this rank sends, by level, in the mean over steps."""
        levels: defaultdict[str, float] = defaultdict(float)
        for exchange in self.exchanges:
            for level, count in exchange.sent_bytes.items():
                levels[level] += count * exchange.per_step
        return dict(levels)

    def messages_per_step(self) -> float:
        """Messages that this rank sends, in the mean over steps."""
        return sum(exchange.messages * exchange.per_step for exchange in self.exchanges)

    @property
    def exact(self) -> bool:
        """Whether the meter will count just these bytes."""
        return all(exchange.exact for exchange in self.exchanges)


def seat_of(levels: Sequence[tuple[str, int]], rank: int) -> Seat:
    """The place of `rank` where the groups of every level are runs of neighbouring ranks.

    Args:
        levels: names and sizes, fastest first; sizes count the ranks of the faster levels too, and the last holds all.
    """
    size = levels[-1][1]
    names = []
    for peer in range(size):
        joined = (name for name, within in levels if peer // within == rank // within)
        names.append("self" if peer == rank else next(joined))
    return Seat(rank, tuple(names), tuple(levels))


def codec_label(codec: Settings) -> str:
    """The settings of a codec but for its defaults, as JSON with sorted keys: {"density": 0.01, "kind": "topk"}."""
    given = codec.model_dump(mode="json", exclude_defaults=True)
    return json.dumps({**given, "kind": getattr(codec, "kind", type(codec).__name__)}, sort_keys=True)


def total_numel(parameters: Iterable[Parameter]) -> int:
    """Elements of all parameters that learn."""
    return sum(parameter.numel for parameter in parameters if parameter.trained)
