"""A rank's place among the levels of the machine, as digits of which that of the fastest level counts most."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch.distributed.device_mesh import DeviceMesh

WHOLE = "rank"  # the level of single ranks: a state that is sharded over it is whole on every rank


class Level(Protocol):
    """name, and the number of ranks in each of the level's groups, those of the faster levels included."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...


class MachineMesh(Protocol):
    """What a thinwire World's mesh is: see dist/mesh.py."""

    @property
    def rank(self) -> int: ...

    @property
    def levels(self) -> Sequence[Level]: ...

    @property
    def order(self) -> Sequence[int]: ...

    @property
    def named(self) -> Mapping[str, Level]: ...


@dataclass(frozen=True)
class Levels:
    """The levels of the machine, fastest first, and this rank's digits.

    The digit of a rank at level l is its place, by rank, among those that have its digits at all faster levels and are
    in its group of level l. So the ranks of a group of the first k levels are numbered 0, 1, ... by
    ((c_0 L_1 + c_1) L_2 + c_2) ...: the fastest level is the most significant digit. Then what a hierarchical
    reduce-scatter leaves, and what an all-gather begins with, is one contiguous piece at every level.

    names: of the levels.
    fanouts: L_0, L_1, ...: how many groups of the level before make one of this one.
    rank: this rank.
    digits: of every rank of the job.
    named: every usable name (those of levels that were dropped included) and how many levels it stands for.
    """

    names: tuple[str, ...]
    fanouts: tuple[int, ...]
    rank: int
    digits: tuple[tuple[int, ...], ...]
    named: Mapping[str, int]

    @property
    def world_size(self) -> int:
        """Number of ranks in the job."""
        return len(self.digits)

    @property
    def depth(self) -> int:
        """Number of levels."""
        return len(self.names)

    def size(self, depth: int) -> int:
        """Ranks in a group of the first `depth` levels."""
        return math.prod(self.fanouts[:depth])

    def depth_of(self, name: str) -> int:
        """How many levels a name stands for: 0 for "rank", all for the slowest.

        Raises: ValueError for a name that no level has.
        """
        if name not in self.named:
            raise ValueError(f"the machine has no level {name!r}; it has {', '.join(self.named)}")
        return self.named[name]

    def number(self, rank: int, depth: int) -> int:
        """The number of a rank in its group of the first `depth` levels."""
        number = 0
        for digit, fanout in zip(self.digits[rank][:depth], self.fanouts[:depth], strict=True):
            number = number * fanout + digit
        return number

    def group(self, depth: int) -> tuple[int, ...]:
        """This rank's group of the first `depth` levels, in the order of the numbers in it."""
        mine = self.digits[self.rank][depth:]
        members = [rank for rank, digits in enumerate(self.digits) if digits[depth:] == mine]
        return tuple(sorted(members, key=lambda rank: self.number(rank, depth)))

    def joining(self, peer: int) -> str:
        """The name of the fastest level whose groups hold this rank and another; "self" for this rank."""
        mine, theirs = self.digits[self.rank], self.digits[peer]
        differ = [level for level in range(self.depth) if mine[level] != theirs[level]]
        return self.names[differ[-1]] if differ else "self"

    def peers(self, level: int) -> tuple[int, ...]:
        """The ranks that differ from this one in nothing but the digit of a level, this one included, ascending."""
        mine = self.digits[self.rank]
        return tuple(
            rank
            for rank, digits in enumerate(self.digits)
            if digits[:level] == mine[:level] and digits[level + 1 :] == mine[level + 1 :]
        )


def levels_of(mesh: MachineMesh | DeviceMesh, *, rank: int, world_size: int) -> Levels:
    """The levels of a thinwire World's mesh, or of a DeviceMesh with named dimensions, slowest first.

    Raises:
        ValueError: a DeviceMesh without names, or one that does not hold every rank once.
    """
    if isinstance(mesh, DeviceMesh):
        names, sizes, order = _read_device_mesh(mesh, world_size)
        return build_levels(names, sizes, order, rank=rank)
    if len(mesh.order) != world_size:
        raise ValueError(f"mesh: holds {len(mesh.order)} ranks, but the job has {world_size}; give world.mesh")
    kept = [level for level in mesh.levels if level.size > 1]
    levels = build_levels([level.name for level in kept], [level.size for level in kept], mesh.order, rank=rank)
    depths = {size: depth for depth in range(levels.depth + 1) for size in [levels.size(depth)]}
    also = {name: depths[level.size] for name, level in mesh.named.items()}
    return Levels(levels.names, levels.fanouts, rank, levels.digits, {**levels.named, **also, WHOLE: 0})


def build_levels(names: Sequence[str], sizes: Sequence[int], order: Sequence[int], *, rank: int) -> Levels:
    """Number the ranks.

    Args:
        names, sizes: of the levels, fastest first; ranks in each group, those of faster levels included.
        order: all ranks, arranged so that each group of each level is a run of neighbours.
    Raises:
        ValueError: the sizes do not nest, or the last is not the number of ranks.
    """
    fanouts = []
    for name, size, before in zip(names, sizes, (1, *sizes)[: len(sizes)], strict=True):
        if size % before:
            raise ValueError(f"mesh: level {name} has groups of {size}, which groups of {before} do not divide")
        fanouts.append(size // before)
    if math.prod(fanouts) != len(order):
        raise ValueError(
            f"mesh: levels {', '.join(names)} hold {math.prod(fanouts)} ranks, but there are {len(order)}; the sizes "
            "must multiply to the number of ranks"
        )
    digits: dict[int, tuple[int, ...]] = {r: () for r in order}
    for size in sizes:
        for start in range(0, len(order), size):
            counted: dict[tuple[int, ...], int] = {}
            for member in sorted(order[start : start + size]):
                place = counted.get(digits[member], 0)
                counted[digits[member]] = place + 1
                digits[member] = (*digits[member], place)
    named = {WHOLE: 0} | {name: depth + 1 for depth, name in enumerate(names)} | {"world": len(names)}
    return Levels(tuple(names), tuple(fanouts), rank, tuple(digits[r] for r in range(len(order))), named)


def _read_device_mesh(mesh: DeviceMesh, world_size: int) -> tuple[list[str], list[int], list[int]]:
    names, ranks = mesh.mesh_dim_names, mesh.mesh.flatten().tolist()
    if not names:
        raise ValueError(
            "mesh: its dimensions have no names, and levels are chosen by name; give mesh_dim_names, slowest first, "
            'such as init_device_mesh("cuda", (2, 8), mesh_dim_names=("world", "node"))'
        )
    if sorted(ranks) != list(range(world_size)):
        raise ValueError(
            f"mesh: holds the ranks {ranks}, but the job has {world_size}, and each must be in it once; give the mesh "
            "of the whole job"
        )
    sizes, size = [], 1
    for extent in reversed(mesh.shape):
        size *= extent
        sizes.append(size)
    kept = [i for i, extent in enumerate(reversed(mesh.shape)) if extent > 1]
    backwards = list(reversed(names))
    return [backwards[i] for i in kept], [sizes[i] for i in kept], ranks
