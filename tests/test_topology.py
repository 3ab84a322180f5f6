from __future__ import annotations

import inspect
import json
from types import SimpleNamespace

import pynvml
import pytest
import torch
from fake_nvml import FakeGpu, FakeNvml, nvlink_pairs, pcie_only, switched

from thinwire.dist import topology
from thinwire.dist.mesh import Mesh, MeshSettings, build_mesh
from thinwire.dist.topology import GpuPlace, list_gpus, local_gpu


def mesh_of(gpus: list[GpuPlace | None], hosts: list[str]) -> Mesh:
    return build_mesh(MeshSettings(), rank=0, hosts=hosts, gpus=gpus)


def sizes(mesh: Mesh) -> list[tuple[str, int]]:
    return [(level.name, level.size) for level in mesh.levels]


def test_eight_switched_gpus_are_one_node_without_pairs():
    gpus, reason = list_gpus(switched())
    assert (len(gpus), reason) == (8, "")
    assert all(gpu.nvlinks == gpu.nvswitch_links == 18 and len(gpu.nvlink_peers) == 7 for gpu in gpus)
    assert sizes(mesh_of(gpus, ["a"] * 8)) == [("node", 8)]
    assert all(gpu.fabric is None for gpu in gpus)
    two_boxes = mesh_of([*gpus, *gpus], ["a"] * 8 + ["b"] * 8)
    assert sizes(two_boxes) == [("node", 8), ("world", 16)]
    assert two_boxes.level("pair") == two_boxes.level("node")


def test_switched_gpus_are_joined_also_where_peer_status_is_unknown():
    gpus, _ = list_gpus(switched({"nvmlDeviceGetP2PStatus": pynvml.NVML_ERROR_NOT_SUPPORTED}))
    assert [gpu.nvlink_peers for gpu in gpus] == [()] * 8
    mesh = mesh_of([*gpus, None, None], ["a"] * 10)
    assert mesh.remarks == ("pair is merged into the next level, because its groups hold 1 or 8 ranks",)


def test_nvlink_pairs_are_found_by_their_links_not_by_their_index():
    gpus, _ = list_gpus(nvlink_pairs())
    assert [gpu.nvlinks for gpu in gpus] == [3] * 8
    assert all(gpu.nvswitch_links == 0 for gpu in gpus)
    assert gpus[0].nvlink_peers == (gpus[4].pci,)
    mesh = mesh_of([*gpus, *gpus], ["a"] * 8 + ["b"] * 8)
    assert sizes(mesh) == [("pair", 2), ("node", 8), ("world", 16)]
    assert mesh.group("pair") == (0, 4)
    assert mesh.level("pair").joined_by == "NVLink"


def test_pcie_only_gpus_have_no_level_below_the_node():
    gpus, _ = list_gpus(pcie_only())
    assert all(gpu.nvlinks == 0 and gpu.nvlink_peers == () and gpu.unanswered == () for gpu in gpus)
    assert dict(gpus[0].pcie_distance)[gpus[1].pci] == pynvml.NVML_TOPOLOGY_NODE
    assert dict(gpus[0].pcie_distance)[gpus[2].pci] == pynvml.NVML_TOPOLOGY_SYSTEM
    mesh = mesh_of(gpus, ["a"] * 4)
    assert sizes(mesh) == [("node", 4)]
    assert mesh.level("pair").size == 1


def test_without_nvlink_a_shared_pcie_switch_makes_a_pair():
    def ancestor(a: int, b: int) -> int:
        return pynvml.NVML_TOPOLOGY_SINGLE if a // 2 == b // 2 else pynvml.NVML_TOPOLOGY_HOSTBRIDGE

    gpus, _ = list_gpus(FakeNvml([FakeGpu(bus=i) for i in range(4)], ancestor))
    mesh = mesh_of(gpus, ["a"] * 4)
    assert sizes(mesh) == [("pair", 2), ("node", 4)]
    assert mesh.level("pair").joined_by == "one PCIe switch"


def test_unequal_nvlink_groups_are_merged_into_the_node_and_said():
    links: list[list[int | str | None]] = [[1, 2], [0], [0], [None]]
    gpus, _ = list_gpus(FakeNvml([FakeGpu(links=x, bus=i) for i, x in enumerate(links)]))
    mesh = mesh_of(gpus, ["a"] * 4)
    assert sizes(mesh) == [("node", 4)]
    assert mesh.level("pair") == mesh.level("node")
    assert "pair is merged into the next level, because its groups hold 1 or 3 ranks" in mesh.describe()


def test_a_fabric_that_spans_hosts_is_a_level_between_node_and_world():
    gpus, _ = list_gpus(FakeNvml([FakeGpu(links=["switch"], bus=i, cluster=b"k" * 16) for i in range(2)]))
    alone, _ = list_gpus(FakeNvml([FakeGpu(links=["switch"], bus=i, cluster=b"m" * 16) for i in range(2)]))
    mesh = mesh_of([*gpus, *gpus, *alone, *alone], list("aabbccdd"))
    assert sizes(mesh) == [("node", 2), ("fabric", 4), ("world", 8)]
    assert mesh.groups("fabric") == ((0, 1, 2, 3), (4, 5, 6, 7))


def test_ranks_that_share_a_gpu_are_joined():
    gpus, _ = list_gpus(pcie_only())
    mesh = mesh_of([gpus[0], gpus[0], gpus[1], gpus[1]], ["a"] * 4)
    assert mesh.groups("pair") == ((0, 1), (2, 3))


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("nvmlInit", pynvml.NVML_ERROR_LIBRARY_NOT_FOUND),
        ("nvmlInit", pynvml.NVML_ERROR_DRIVER_NOT_LOADED),
        ("nvmlDeviceGetCount", pynvml.NVML_ERROR_UNKNOWN),
    ],
)
def test_a_driver_that_does_not_answer_is_a_reason_not_an_exception(call, error):
    nvml = switched({call: error})
    gpus, reason = list_gpus(nvml)
    assert gpus == []
    assert reason == f"the NVIDIA driver does not answer: {pynvml.NVMLError(error)}"
    assert nvml.sessions == 0


def test_no_gpu_at_all_is_said():
    assert list_gpus(FakeNvml([])) == ([], "the NVIDIA driver shows no GPU")


def test_links_with_a_hidden_far_end_are_found_by_peer_status():
    hidden = {
        "nvmlDeviceGetNvLinkRemoteDeviceType": pynvml.NVML_ERROR_NOT_SUPPORTED,
        "nvmlDeviceGetNvLinkRemotePciInfo": pynvml.NVML_ERROR_NOT_SUPPORTED,
    }
    gpus, _ = list_gpus(nvlink_pairs(hidden))
    assert gpus[0].nvlink_peers == (gpus[4].pci,)
    assert gpus[0].unanswered == tuple(f"{call}: Not Supported" for call in hidden)
    assert sizes(mesh_of(gpus, ["a"] * 8)) == [("pair", 2), ("node", 8)]


@pytest.mark.parametrize(
    "call",
    [
        "nvmlDeviceGetP2PStatus",
        "nvmlDeviceGetTopologyCommonAncestor",
        "nvmlDeviceGetNumaNodeId",
        "nvmlDeviceGetGpuFabricInfoV",
        "nvmlDeviceGetUUID",
        "nvmlDeviceGetName",
    ],
)
def test_one_failing_call_costs_only_its_own_answer(call):
    gpus, reason = list_gpus(nvlink_pairs({call: pynvml.NVML_ERROR_UNKNOWN}))
    assert reason == ""
    assert [gpu.unanswered for gpu in gpus] == [(f"{call}: Unknown Error",)] * 8
    assert sizes(mesh_of(gpus, ["a"] * 8)) == [("pair", 2), ("node", 8)]


def test_places_survive_json():
    for place in list_gpus(nvlink_pairs())[0]:
        assert GpuPlace.from_json(json.loads(json.dumps(place.to_json()))) == place


def test_the_stand_in_cannot_drift_from_the_real_binding():
    """Every name that the code uses exists in pynvml, and every function is given as many arguments as it takes."""
    nvml = nvlink_pairs()
    list_gpus(nvml)
    functions = {name for name in nvml.asked if name.startswith("nvml")}
    assert len(functions) >= 12
    for name in functions:
        real = inspect.signature(getattr(pynvml, name))
        ours = inspect.signature(getattr(FakeNvml, f"_{name}"))
        assert len(real.parameters) == len(ours.parameters) - 1, name
    # A structure's text fields read as str, and its PCI fields as numbers, in the real binding.
    info = nvml._nvmlDeviceGetPciInfo(1)
    assert (info.busId, info.bus) == ("00000000:20:00.0", 0x20)


def test_local_gpu_is_looked_up_by_pci_address(monkeypatch):
    nvml = nvlink_pairs()
    third = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x30, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: third)
    place = local_gpu(torch.device("cuda", 0), nvml)  # CUDA's device 0 is NVML's 2 here
    assert place is not None
    assert place.uuid == "GPU-00000002"
    assert local_gpu(torch.device("cpu"), nvml) is None
    monkeypatch.setattr(topology, "list_gpus", lambda nvml: ([], "no driver"))
    assert local_gpu(torch.device("cuda", 0), nvml) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: the stand-in covers the rest")
def test_a_real_gpu_is_found_by_its_cuda_device():
    place = local_gpu(torch.device("cuda", 0))
    assert place is not None
    assert place.uuid == f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    assert GpuPlace.from_json(json.loads(json.dumps(place.to_json()))) == place
    assert sizes(mesh_of([place], ["a"])) == [("world", 1)]


@pytest.mark.skipif(list_gpus()[0] != [], reason="this machine has an NVIDIA driver")
def test_the_real_binding_without_a_driver_gives_a_reason():
    gpus, reason = list_gpus()
    assert gpus == []
    assert "NVML Shared Library Not Found" in reason or "Driver Not Loaded" in reason or "no GPU" in reason
