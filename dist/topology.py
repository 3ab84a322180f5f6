"""Where a host's GPUs sit and what joins them, as NVML tells it; and how ranks fall into ever larger groups."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# A PCIe path that stays inside switches (nvidia-smi's PIX and PXB) avoids the CPU; longer ones share its lanes.
_LONGEST_SWITCHED_PATH = 20


@dataclass(frozen=True)
class GpuPlace:
    """Where one GPU sits, in terms that ranks can exchange as JSON.

    uuid, name: as the driver reports them.
    pci: "00000000:1b:00.0", eight hexadecimal digits of domain, lower case.
    numa_node: of the host; None when unknown.
    nvlinks: number of active NVLinks; nvswitch_links: how many of them end at a switch.
    nvlink_peers: PCI addresses of the GPUs of the host that NVLink reaches.
    pcie_distance: NVML's common-ancestor level by PCI address of every other GPU of the host (0 same board,
      10 one PCIe switch, 20 several, 30 host bridge, 40 NUMA node, 50 across sockets).
    fabric: identity of the NVLink domain, which may span hosts; None outside of one.
    unanswered: what the driver could not say, and its reason.
    """

    uuid: str
    name: str
    pci: str
    numa_node: int | None = None
    nvlinks: int = 0
    nvswitch_links: int = 0
    nvlink_peers: tuple[str, ...] = ()
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


def local_gpu(device: torch.device, nvml: Any = None) -> GpuPlace | None:
    """The place of a CUDA device; None for the CPU, for AMD's GPUs, and where NVML does not answer.

    The device is looked up by PCI address: NVML counts all GPUs of the host and in another order than CUDA.
    """
    if device.type != "cuda":
        return None
    import torch

    found: Any = torch.cuda.get_device_properties(device)  # its type stub lacks the PCI fields
    pci = _pci_address(found.pci_domain_id, found.pci_bus_id, found.pci_device_id)
    gpus, _ = list_gpus(nvml)
    return next((gpu for gpu in gpus if gpu.pci == pci), None)


def list_gpus(nvml: Any = None) -> tuple[list[GpuPlace], str]:
    """All NVIDIA GPUs of this host, and why there are none ("" when there are). Never raises for want of a driver.

    Args: nvml, a module that answers as nvidia-ml-py's `pynvml` does; default: that one.
    """
    if nvml is None:
        try:
            import pynvml as nvml  # type: ignore[no-redef,unused-ignore]
        except ImportError as error:
            return [], f"the package nvidia-ml-py cannot be imported ({error})"
    try:
        with _session(nvml):
            count = nvml.nvmlDeviceGetCount()
            handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(count)]
            pcis = [_pci_of(nvml.nvmlDeviceGetPciInfo(handle)) for handle in handles]
            gpus = [_read_gpu(nvml, handles, pcis, i) for i in range(count)]
    except nvml.NVMLError as error:
        return [], f"the NVIDIA driver does not answer: {error}"
    return gpus, "" if gpus else "the NVIDIA driver shows no GPU"


@contextmanager
def _session(nvml: Any) -> Iterator[None]:
    nvml.nvmlInit()
    try:
        yield
    finally:
        nvml.nvmlShutdown()


def _read_gpu(nvml: Any, handles: Sequence[Any], pcis: Sequence[str], own: int) -> GpuPlace:
    handle = handles[own]
    unanswered: dict[str, str] = {}
    not_supported: type[Exception] = nvml.NVMLError_NotSupported

    def ask(call: str, *args: Any, expected: tuple[type[Exception], ...] = ()) -> Any:
        """The call's answer; None when there is none, which is remembered unless the error was to be expected."""
        try:
            return getattr(nvml, call)(*args)
        except expected:
            return None
        except nvml.NVMLError as error:
            unanswered[call] = str(error)
            return None

    past_last_link = (nvml.NVMLError_InvalidArgument, not_supported)
    active = [
        link
        for link in range(nvml.NVML_NVLINK_MAX_LINKS)
        if ask("nvmlDeviceGetNvLinkState", handle, link, expected=past_last_link) == nvml.NVML_FEATURE_ENABLED
    ]
    switch_links = 0
    peers = set()
    for link in active:
        if ask("nvmlDeviceGetNvLinkRemoteDeviceType", handle, link) == nvml.NVML_NVLINK_DEVICE_TYPE_SWITCH:
            switch_links += 1
        elif (remote := ask("nvmlDeviceGetNvLinkRemotePciInfo", handle, link)) is not None:
            peers.add(_pci_of(remote))
    distances = []
    for i, (other, pci) in enumerate(zip(handles, pcis, strict=True)):
        if i == own:
            continue
        # Inside a virtual machine links may hide their far end; whether two GPUs can use them is still known.
        if active and (
            ask("nvmlDeviceGetP2PStatus", handle, other, nvml.NVML_P2P_CAPS_INDEX_NVLINK) == nvml.NVML_P2P_STATUS_OK
        ):
            peers.add(pci)
        distance = ask("nvmlDeviceGetTopologyCommonAncestor", handle, other)
        if distance is not None:
            distances.append((pci, int(distance)))
    numa_node = ask("nvmlDeviceGetNumaNodeId", handle, expected=(not_supported,))
    return GpuPlace(
        uuid=ask("nvmlDeviceGetUUID", handle) or "",
        name=ask("nvmlDeviceGetName", handle) or "",
        pci=pcis[own],
        numa_node=_numa_node_by_kernel(pcis[own]) if numa_node is None else numa_node,
        nvlinks=len(active),
        nvswitch_links=switch_links,
        nvlink_peers=tuple(sorted(peers & set(pcis))),
        pcie_distance=tuple(distances),
        fabric=_fabric(nvml, ask, handle),
        unanswered=tuple(f"{call}: {reason}" for call, reason in unanswered.items()),
    )


def _fabric(nvml: Any, ask: Callable[..., Any], handle: Any) -> str | None:
    info = nvml.c_nvmlGpuFabricInfoV_t()
    expected = (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound)
    answer = ask("nvmlDeviceGetGpuFabricInfoV", handle, ctypes.byref(info), expected=expected)
    cluster = bytes(info.clusterUuid)
    if answer is None or info.state != nvml.NVML_GPU_FABRIC_STATE_COMPLETED or not any(cluster):
        return None  # an all-zero cluster is a single host's fabric, which the switch links show already
    return f"{cluster.hex()}/{info.cliqueId}"


def _pci_of(info: Any) -> str:
    return _pci_address(info.domain, info.bus, info.device)


def _pci_address(domain: int, bus: int, device: int) -> str:
    return f"{domain:08x}:{bus:02x}:{device:02x}.0"


def _numa_node_by_kernel(pci: str) -> int | None:
    # NVML knows the NUMA node only where the GPU's memory is one itself; the kernel writes -1 for unknown.
    try:
        node = int(Path("/sys/bus/pci/devices", pci[4:], "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


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
