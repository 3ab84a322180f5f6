"""The levels of the machine, fastest first: which ranks share a device pair, a node, the world."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from pydantic_core import InitErrorDetails

from thinwire.comm.settings import Settings
from thinwire.dist.topology import GpuPlace, Partition, partition_ranks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class LevelSettings(Settings):
    """One level: `size` is the number of ranks in each of its groups, those of the faster levels included."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    size: int = Field(ge=1)


def _check_levels(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    """Accept "auto" or a list whose levels nest; errors carry the path of the entry at fault."""
    if value == "auto":
        return value
    if not isinstance(value, list | tuple):
        raise ValueError("must be auto, or a list of levels, fastest first, such as [{name: node, size: 4}]")
    levels = _LEVEL_LIST.validate_python(value)
    for i, level in enumerate(levels):
        before = levels[i - 1] if i else LevelSettings(name="rank", size=1)
        if level.name in ("self", *(x.name for x in levels[:i])):
            _refuse(i, "name", level.name, "must differ from every other level's name, and from self")
        if level.size % before.size:
            what = f"must be a multiple of {before.size}, the size of {before.name!r} before it: it counts them too"
            _refuse(i, "size", level.size, what)
        if level.name == "world" and i != len(levels) - 1:
            _refuse(i, "name", level.name, "holds every rank, so it must be the last level")
    return levels


def _refuse(index: int, key: str, value: Any, text: str) -> None:
    details = InitErrorDetails(type="value_error", loc=(index, key), input=value, ctx={"error": f"{value!r} {text}"})
    raise ValidationError.from_exception_data("levels", [details])


_LEVEL_LIST = TypeAdapter(tuple[LevelSettings, ...])


class MeshSettings(Settings):
    """`levels: auto` detects them; else a list, fastest first, such as pair 2, node 4, world 8.

    A list that stops short of all ranks is completed by a level called world.
    """

    levels: Annotated[Literal["auto"] | tuple[LevelSettings, ...], WrapValidator(_check_levels)] = "auto"


@dataclass(frozen=True)
class Level:
    """A level's name, the number of ranks in each of its groups, and what joins them (for people to read)."""

    name: str
    size: int
    joined_by: str = field(default="", compare=False)


@dataclass(frozen=True)
class Mesh:
    """How the ranks of a job nest: every group of a level lies inside one group of the next.

    levels: fastest first, sizes strictly growing, the last one holding every rank.
    order: all ranks, arranged so that each group of each level is a run of neighbours.
    named: every usable name, those of dropped levels included, and the level that it stands for.
    remarks: what had to be adapted, one sentence each.
    """

    rank: int
    levels: tuple[Level, ...]
    order: tuple[int, ...]
    named: Mapping[str, Level]
    hosts: tuple[str, ...]
    remarks: tuple[str, ...] = ()

    @property
    def world_size(self) -> int:
        """Number of ranks in the job."""
        return len(self.order)

    def level(self, name: str) -> Level:
        """The level that `name` stands for; a dropped one stands for an equal level, or for single ranks.

        Raises: ValueError for a name that no level has or had.
        """
        if name not in self.named:
            raise ValueError(f"the mesh has no level {name!r}; it has {', '.join(self.named)}")
        return self.named[name]

    def groups(self, name: str) -> tuple[tuple[int, ...], ...]:
        """The groups of a level: every rank of the job in exactly one."""
        size = self.level(name).size
        return tuple(self.order[i : i + size] for i in range(0, self.world_size, size))

    def group(self, name: str) -> tuple[int, ...]:
        """The group of a level that this rank is in."""
        return next(group for group in self.groups(name) if self.rank in group)

    def level_of_peer(self) -> list[str]:
        """For each rank of the job, the fastest level that holds it and this rank; "self" for this rank."""
        names = ["self"] * self.world_size
        for level in reversed(self.levels):
            for peer in self.group(level.name):
                if peer != self.rank:
                    names[peer] = level.name
        return names

    def device_mesh(self, device_type: str) -> DeviceMesh:
        """The same levels as a `DeviceMesh` with one dimension per level, slowest first, named after it.

        A dimension joins the ranks that have equal places in the groups one level down: a group of a level is that
        level's dimension together with all after it. Collective: every rank of the job must call it, at the same
        point, because it creates process groups.

        Args: device_type, "cpu" or "cuda".
        """
        import torch
        from torch.distributed.device_mesh import DeviceMesh

        inner_sizes = (1, *(level.size for level in self.levels[:-1]))
        shape = [level.size // inner for level, inner in zip(self.levels, inner_sizes, strict=True)]
        ranks = torch.tensor(self.order).reshape(shape[::-1])
        return DeviceMesh(device_type, ranks, mesh_dim_names=tuple(level.name for level in reversed(self.levels)))

    def describe(self) -> str:
        """One paragraph for the start of a run."""
        if self.world_size == 1:
            return "1 rank: no level has anything to exchange."
        num_hosts = len(set(self.hosts))
        levels = ", ".join(f"{x.name} of {x.size}" + (f" ({x.joined_by})" * bool(x.joined_by)) for x in self.levels)
        text = f"{_count(self.world_size, 'rank')} on {_count(num_hosts, 'host')}; levels, fastest first: {levels}."
        return " ".join([text, *(f"{remark}." for remark in self.remarks)])


def build_mesh(
    settings: MeshSettings, *, rank: int, hosts: Sequence[str], gpus: Sequence[GpuPlace | None] = ()
) -> Mesh:
    """The mesh of a job, equal on every rank but for `rank`.

    Ranks are arranged by host and, inside a host, by the links of their GPUs, also for levels given in the settings;
    ranks of one host need not be neighbours.

    Args: hosts, one name per rank; gpus, one place per rank, None for a rank without a GPU (empty: no rank has one).
    Raises: ValueError when given levels do not fit the number of ranks.
    """
    assert 0 <= rank < len(hosts), f"rank {rank} of {len(hosts)}"
    assert len(gpus) in (0, len(hosts)), f"{len(gpus)} GPU places for {len(hosts)} ranks"
    partitions = partition_ranks(hosts, gpus or [None] * len(hosts))
    order = sorted(range(len(hosts)), key=lambda r: (*(p.group_of[r] for p in reversed(partitions)), r))
    if settings.levels == "auto":
        named, remarks = _detected_levels(partitions)
    else:
        named = _given_levels(settings.levels, len(hosts))
        remarks = _cut_hosts(named.values(), order, hosts)
    kept = {level.name: level for level in named.values() if level.size > 1}
    return Mesh(
        rank=rank,
        levels=tuple(sorted(kept.values(), key=lambda level: level.size)) or (named["world"],),
        order=tuple(order),
        named=named,
        hosts=tuple(hosts),
        remarks=tuple(remarks),
    )


def _detected_levels(partitions: Sequence[Partition]) -> tuple[dict[str, Level], list[str]]:
    """Every partition's name with its level; a partition that cannot be a level stands for the next that can."""
    node = next(part for part in partitions if part.name == "node")
    # Of two names for the same groups, "node" says most; "world" is dropped by the general rule of `_add_level`.
    several = len(set(node.group_of)) < len(node.group_of)
    twins = [p.name for p in partitions if several and p.group_of == node.group_of and p.name in ("pair", "fabric")]
    named: dict[str, Level] = {}
    remarks: list[str] = []
    merged: list[str] = []
    for part in partitions:
        sizes = sorted(set(part.sizes()))
        if part.name in twins:
            continue
        if len(sizes) > 1:
            held = " or ".join(map(str, sizes))
            remarks.append(f"{part.name} is merged into the next level, because its groups hold {held} ranks")
            merged.append(part.name)
        else:
            _add_level(named, Level(part.name, sizes[0], part.joined_by))
            named |= {name: named[part.name] for name in merged}
            merged.clear()
    named |= {name: named["node"] for name in twins}
    return {part.name: named[part.name] for part in partitions}, remarks


def _given_levels(levels: Sequence[LevelSettings], world_size: int) -> dict[str, Level]:
    named: dict[str, Level] = {}
    for i, level in enumerate(levels):
        if world_size % level.size:
            allowed = ", ".join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)
            raise ValueError(
                f"mesh.levels[{i}].size is {level.size}; the job has {world_size} ranks, which must split into equal "
                f"groups: allowed are {allowed}"
            )
        if level.name == "world" and level.size != world_size:
            raise ValueError(
                f"mesh.levels[{i}].size is {level.size}; world holds every rank, so it must be {world_size} in this "
                "job (or leave the level out: it is added)"
            )
        _add_level(named, Level(level.name, level.size))
    if "world" not in named:
        _add_level(named, Level("world", world_size))
    return named


def _add_level(named: dict[str, Level], level: Level) -> None:
    """Name the level, as itself, or as the faster one that already joins exactly these ranks."""
    named[level.name] = next((x for x in named.values() if x.size == level.size > 1), level)


def _cut_hosts(levels: Iterable[Level], order: Sequence[int], hosts: Sequence[str]) -> list[str]:
    """One remark for each given level whose groups hold some, but not all, ranks of a host next to other hosts'."""
    remarks = []
    for level in dict.fromkeys(levels):
        for i in range(0, len(order), level.size):
            group = order[i : i + level.size]
            inside = dict.fromkeys(hosts[r] for r in group)
            cut = [host for host in inside if any(hosts[r] == host for r in order if r not in group)]
            if len(inside) > 1 and cut:
                remarks.append(
                    f"{level.name}, as given, joins ranks {' '.join(map(str, group))} of the hosts "
                    f"{' and '.join(inside)}, but not all ranks of {cut[0]}"
                )
                break
    return remarks


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)
