"""Which GPUs are joined by what, from NVML, and how ranks fall into ever larger groups. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

# A PCIe path that stays inside switches (nvidia-smi's PIX and PXB) avoids the CPU; longer ones share its lanes.
_LONGEST_SWITCHED_PATH = 20


@dataclass(frozen=True)
class GpuPlace:
    """Where one GPU sits, in terms that ranks can exchange as JSON.

    uuid, name: as the driver reports them.
    pci: "00000000:1b:00.0", eight hexadecimal digits of domain, lower case.
    numa_node: of the host; None when unknown.
    nvlink_peers: PCI addresses of the GPUs reached by NVLink without a switch.
    nvswitch_links: number of active NVLinks that end at a switch.
    pcie_distance: NVML's common-ancestor level by PCI address of every other GPU of the host (0 same board,
      10 one PCIe switch, 20 several, 30 host bridge, 40 NUMA node, 50 across sockets).
    fabric: identity of the NVLink domain, which may span hosts; None outside of one.
    unanswered: what the driver could not say, and its reason.
    """

    uuid: str
    name: str
    pci: str
    numa_node: int | None = None
    nvlink_peers: tuple[str, ...] = ()
    nvswitch_links: int = 0
    pcie_distance: tuple[tuple[str, int], ...] = ()
    fabric: str | None = None
    unanswered: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A dict that survives a trip through JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> GpuPlace:
        """The inverse of `to_json`, after JSON turned its tuples into lists."""
        as_tuples: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
        }
        as_tuples["pcie_distance"] = tuple((pci, level) for pci, level in fields["pcie_distance"])
        return cls(**as_tuples)


@dataclass(frozen=True)
class Partition:
    """One way to split all ranks into groups: `group_of[rank]` is the lowest rank of that rank's group."""

    name: str
    group_of: tuple[int, ...]
    joined_by: str

    def sizes(self) -> list[int]:
        """The size of every group, in order of its lowest rank."""
        return [self.group_of.count(first) for first in sorted(set(self.group_of))]


def partition_ranks(hosts: Sequence[str], gpus: Sequence[GpuPlace | None]) -> list[Partition]:
    """Nested partitions of the ranks, fastest links first: "pair", "node", "fabric" and "world".

    Each is the connected components of all links of its speed and faster, so that every group lies inside one group
    of the next. Levels that hold one rank, or the same ranks as another, are kept: dropping them is the mesh's task.

    Args: hosts and gpus hold one entry per rank; a rank without a GPU has None.
    """

    def same_host(a: int, b: int) -> bool:
        return hosts[a] == hosts[b]

    def by_nvlink(a: int, b: int) -> bool:
        return same_host(a, b) and _nvlinked(gpus[a], gpus[b])

    def by_pcie_switch(a: int, b: int) -> bool:
        return same_host(a, b) and _behind_one_switch(gpus[a], gpus[b])

    def in_fabric(a: int, b: int) -> bool:
        gpu_a, gpu_b = gpus[a], gpus[b]
        return same_host(a, b) or (gpu_a is not None and gpu_b is not None and _same_fabric(gpu_a, gpu_b))

    ranks = range(len(hosts))
    nvlink = _components("pair", "NVLink", len(hosts), by_nvlink)
    any_nvlink = any(nvlink.group_of[r] != r for r in ranks)
    return [
        # Without any NVLink, GPUs behind one PCIe switch are what comes closest to a pair.
        nvlink if any_nvlink else _components("pair", "one PCIe switch", len(hosts), by_pcie_switch),
        _components("node", "one host", len(hosts), same_host),
        _components("fabric", "an NVLink fabric across hosts", len(hosts), in_fabric),
        Partition("world", (0,) * len(hosts), "the network"),
    ]


def _nvlinked(a: GpuPlace | None, b: GpuPlace | None) -> bool:
    if a is None or b is None:
        return False
    both_switched = a.nvswitch_links > 0 and b.nvswitch_links > 0
    return both_switched or a.pci == b.pci or b.pci in a.nvlink_peers or a.pci in b.nvlink_peers


def _behind_one_switch(a: GpuPlace | None, b: GpuPlace | None) -> bool:
    if a is None or b is None:
        return False
    return a.pci == b.pci or dict(a.pcie_distance).get(b.pci, 50) <= _LONGEST_SWITCHED_PATH


def _same_fabric(a: GpuPlace, b: GpuPlace) -> bool:
    return a.fabric is not None and a.fabric == b.fabric


def _components(name: str, joined_by: str, count: int, linked: Callable[[int, int], bool]) -> Partition:
    group_of = list(range(count))
    for b in range(count):
        for a in range(b):
            if group_of[a] != group_of[b] and linked(a, b):
                low, high = sorted((group_of[a], group_of[b]))
                group_of = [low if label == high else label for label in group_of]
    return Partition(name, tuple(group_of), joined_by)
