"""dist/world.py: what one rank sets up. Several ranks run in test_launchers.py."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError

import thinwire
from thinwire.dist import world as world_module
from thinwire.dist.host import Host
from thinwire.dist.interface import Interface, loopback_interface
from thinwire.dist.mesh import MeshSettings
from thinwire.dist.place import Place
from thinwire.dist.topology import GpuPlace
from thinwire.dist.world import WorldSettings, join

ALONE = Place("single", 0, 1, 0, 1, 0, "127.0.0.1", 0)
CPU = WorldSettings(device="cpu", threads=1)


def test_world_of_one() -> None:
    with join(ALONE, CPU, MeshSettings()) as world:
        assert (world.rank, world.size, world.local_rank, world.hosts) == (0, 1, 0, (world.host,))
        assert (world.device, world.backend) == (torch.device("cpu"), "gloo")
        assert world.interface == loopback_interface()
        assert os.environ["GLOO_SOCKET_IFNAME"] == world.interface.name
        ones = world.queue.submit("ones", lambda channel: channel.all_gather_same(torch.ones(2))).wait()
        assert ones.tolist() == [[1.0, 1.0]]
        total = torch.ones(1)
        dist.all_reduce(total, group=world.group)
        assert total.item() == 1.0
        assert "rank 0 of 1" in world.describe()
        assert world.interface.name in world.describe()
    assert not dist.is_initialized()
    assert "GLOO_SOCKET_IFNAME" not in os.environ


def test_init_joins_again_after_close() -> None:
    for _ in range(2):
        thinwire.init(CPU).close()


def test_leaving_by_an_exception_passes_it_on() -> None:
    with pytest.raises(ZeroDivisionError), join(ALONE, CPU, MeshSettings()):
        _ = 1 // 0
    assert not dist.is_initialized()


def test_interface_of_the_environment_is_used_and_left_there(monkeypatch: pytest.MonkeyPatch) -> None:
    name = loopback_interface().name
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", name)
    with thinwire.init(CPU) as world:
        assert world.interface.name == name
    assert os.environ["GLOO_SOCKET_IFNAME"] == name


def test_process_group_that_is_there_already() -> None:
    with join(ALONE, CPU, MeshSettings()), pytest.raises(ValueError, match=r"call thinwire.init\(\) before"):
        join(ALONE, CPU, MeshSettings())


@pytest.mark.parametrize(("threads", "ranks", "expected"), [(3, 2, 3), ("auto", 2, 4), ("auto", 100, 1)])
def test_threads_follow_the_settings_and_not_the_environment(
    threads: int, ranks: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks in two containers of one machine share its CPUs; those of another machine do not count."""
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    hosts = [Host("other", "2"), *(Host(f"container{rank % 2}", "1") for rank in range(ranks))]
    assert world_module._pick_threads(WorldSettings.model_validate({"threads": threads}), hosts, 1) == expected


@pytest.mark.parametrize(
    "wrong",
    [
        {"timeout_s": 0},
        {"rendezvous_timeout_s": -1},
        {"interface": "^lo"},
        {"device": "tpu"},
        {"threads": 0},
        {"timeout": 3},
    ],
    ids=str,
)
def test_settings_refuse(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        WorldSettings.model_validate(wrong)


def pick_devices(monkeypatch: pytest.MonkeyPatch, gpus: int, device: str, local_rank: int) -> torch.device:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    place = Place("torchrun", local_rank, 4, local_rank, 4, 0, "127.0.0.1", 1)
    return world_module._pick_device(WorldSettings.model_validate({"device": device}), place)


def test_each_rank_takes_the_gpu_of_its_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_devices(monkeypatch, 4, "auto", 3) == torch.device("cuda", 3)
    assert pick_devices(monkeypatch, 1, "cuda", 3) == torch.device("cuda", 0)  # srun shows a task only its own
    assert pick_devices(monkeypatch, 4, "cpu", 3) == torch.device("cpu")
    assert pick_devices(monkeypatch, 0, "auto", 3) == torch.device("cpu")


def test_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"world.device: cuda, but torch finds no GPU"):
        pick_devices(monkeypatch, 0, "cuda", 0)
    with pytest.raises(ValueError, match="local rank 3 of 4 has no GPU: torch finds 2"):
        pick_devices(monkeypatch, 2, "auto", 3)


def test_two_ranks_on_one_gpu() -> None:
    one, other = GpuPlace("GPU-1", "H200", "00000000:1b:00.0"), GpuPlace("GPU-2", "H200", "00000000:1c:00.0")
    world_module._check_one_rank_per_gpu(["a", "a", "b", "b"], [one, other, one, None])
    with pytest.raises(ValueError, match=r"ranks 0 and 2 on a have the same GPU, H200 .* CUDA_VISIBLE_DEVICES"):
        world_module._check_one_rank_per_gpu(["a", "a", "a"], [one, other, one])


def pick_interfaces(
    monkeypatch: pytest.MonkeyPatch, hosts: list[str], settings: WorldSettings = CPU, asked: str | None = None
) -> list[Interface]:
    """What the ranks of these hosts choose; each host's route to an address is named after that address."""
    monkeypatch.setattr(world_module, "interface_to", lambda address: Interface(f"to-{address}", f"from-{address}"))
    store = dist.HashStore()
    places = [Place("slurm", r, len(hosts), 0, 1, r, "head", 1, interface=asked) for r in range(len(hosts))]
    with ThreadPoolExecutor(len(hosts)) as pool:
        return list(pool.map(lambda p: world_module._pick_interface(settings, p, hosts, store), places))


def test_ranks_route_to_the_head_node_and_the_head_node_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [used.name for used in pick_interfaces(monkeypatch, ["a", "a", "b", "c"])]
    assert names == ["to-from-head", "to-from-head", "to-head", "to-head"]


def test_ranks_of_one_host_use_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_interfaces(monkeypatch, ["a", "a"]) == [loopback_interface()] * 2


def test_interface_asked_for_twice_and_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = WorldSettings(interface="eth0")
    with pytest.raises(ValueError, match=r"world.interface: eth0, but the environment says GLOO_SOCKET_IFNAME=eth1"):
        pick_interfaces(monkeypatch, ["a"], settings, asked="eth1")
