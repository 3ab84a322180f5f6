"""A stand-in for the module pynvml (nvidia-ml-py) that answers as NVML documents, for machines that tests lack.

Constants, structures and exceptions are the real binding's, so only the answers are invented.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pynvml

SWITCH = "switch"


@dataclass
class FakeGpu:
    """links: what each NVLink leads to: the index of a GPU, SWITCH, or None for an inactive one.

    cluster: the NVLink fabric's identity; all zeros on a host that is its own fabric; None without a fabric manager.
    """

    links: list[int | str | None] = field(default_factory=list)
    bus: int = 0
    cluster: bytes | None = None


class FakeNvml:
    """gpus of one host; ancestor(a, b) is the common-ancestor level; failures: what a call raises, by its name."""

    def __init__(self, gpus: list[FakeGpu], ancestor: Any = None, failures: Mapping[str, int] | None = None) -> None:
        self.gpus = gpus
        self.ancestor = ancestor or (lambda a, b: pynvml.NVML_TOPOLOGY_SYSTEM)
        self.failures = failures or {}
        self.sessions = 0
        self.asked: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        real = getattr(pynvml, name)  # AttributeError where the real binding has no such name
        self.asked.add(name)
        if not name.startswith("nvml"):
            return real
        answer = getattr(type(self), f"_{name}")

        def call(*args: Any) -> Any:
            if name in self.failures:
                raise pynvml.NVMLError(self.failures[name])
            if not self.sessions and name != "nvmlInit":
                raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)
            return answer(self, *args)

        return call

    def _nvmlInit(self) -> None:
        self.sessions += 1

    def _nvmlShutdown(self) -> None:
        self.sessions -= 1

    def _nvmlSystemGetDriverVersion(self) -> str:
        return "580.65.06"

    def _nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def _nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def _nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{handle:08x}"

    def _nvmlDeviceGetName(self, handle: int) -> str:
        return "Fake H100"

    def _nvmlDeviceGetPciInfo(self, handle: int) -> Any:
        info = pynvml.nvmlPciInfo_t()
        info.domain, info.bus, info.device = 0, self.gpus[handle].bus, 0
        info.busId = f"00000000:{info.bus:02X}:00.0".encode()
        return info

    def _nvmlDeviceGetNvLinkState(self, handle: int, link: int) -> int:
        return int(self._link(handle, link) is not None)

    def _nvmlDeviceGetNvLinkRemoteDeviceType(self, handle: int, link: int) -> int:
        to_switch = self._link(handle, link) == SWITCH
        return pynvml.NVML_NVLINK_DEVICE_TYPE_SWITCH if to_switch else pynvml.NVML_NVLINK_DEVICE_TYPE_GPU

    def _nvmlDeviceGetNvLinkRemotePciInfo(self, handle: int, link: int) -> Any:
        remote = self._link(handle, link)
        if isinstance(remote, int):
            return self._nvmlDeviceGetPciInfo(remote)
        info = pynvml.nvmlPciInfo_t()
        info.domain, info.bus, info.device = 0, 0xF0, 0
        return info

    def _nvmlDeviceGetP2PStatus(self, a: int, b: int, index: int) -> int:
        assert index == pynvml.NVML_P2P_CAPS_INDEX_NVLINK
        direct = b in self.gpus[a].links
        switched = SWITCH in self.gpus[a].links and SWITCH in self.gpus[b].links
        return pynvml.NVML_P2P_STATUS_OK if direct or switched else pynvml.NVML_P2P_STATUS_NOT_SUPPORTED

    def _nvmlDeviceGetTopologyCommonAncestor(self, a: int, b: int) -> int:
        return self.ancestor(a, b)

    def _nvmlDeviceGetNumaNodeId(self, handle: int) -> int:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    def _nvmlDeviceGetGpuFabricInfoV(self, handle: int, pointer: Any) -> int:
        info = pointer._obj  # what ctypes.byref() was given
        cluster = self.gpus[handle].cluster
        info.state = pynvml.NVML_GPU_FABRIC_STATE_NOT_SUPPORTED
        if cluster is not None:
            info.clusterUuid[:] = list(cluster)
            info.state = pynvml.NVML_GPU_FABRIC_STATE_COMPLETED
            info.cliqueId = 7
        return pynvml.NVML_SUCCESS

    def _link(self, handle: int, link: int) -> int | str | None:
        links = self.gpus[handle].links
        if not links:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        if link >= len(links):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return links[link]


def switched(failures: Mapping[str, int] | None = None) -> FakeNvml:
    """Eight GPUs with 18 links each to NVSwitches, as in an HGX H100 box."""
    gpus = [FakeGpu(links=[SWITCH] * 18, bus=0x10 + 0x10 * i, cluster=bytes(16)) for i in range(8)]
    return FakeNvml(gpus, _two_sockets(8), failures)


def nvlink_pairs(failures: Mapping[str, int] | None = None) -> FakeNvml:
    """Eight GPUs, bridged two by two with three active links each; neighbours by index are not partners."""
    gpus: list[FakeGpu] = [FakeGpu(links=[i ^ 4, i ^ 4, None, i ^ 4], bus=0x10 + 0x10 * i) for i in range(8)]
    return FakeNvml(gpus, _two_sockets(8), failures)


def pcie_only(failures: Mapping[str, int] | None = None) -> FakeNvml:
    """Four GPUs without NVLink, each on its own root port."""
    return FakeNvml([FakeGpu(bus=0x10 + 0x10 * i) for i in range(4)], _two_sockets(4), failures)


def _two_sockets(count: int) -> Any:
    def ancestor(a: int, b: int) -> int:
        same = (a < count // 2) == (b < count // 2)
        return pynvml.NVML_TOPOLOGY_NODE if same else pynvml.NVML_TOPOLOGY_SYSTEM

    return ancestor
