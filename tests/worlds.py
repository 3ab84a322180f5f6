"""A World for a rank that is a thread, and small configurations that train in seconds."""

from __future__ import annotations

import functools
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from ranks import Rank
from torch_threads import TorchRank

from thinwire.comm.queue import CommQueue
from thinwire.dist.config import RunConfig, load_config
from thinwire.dist.corpus import standard_library
from thinwire.dist.interface import loopback_interface
from thinwire.dist.mesh import LevelSettings, Mesh, MeshSettings, build_mesh
from thinwire.dist.place import Place
from thinwire.dist.world import World, WorldSettings


def thread_world(rank: Rank) -> World:
    """What join() would give, made of threads; close its queue and monitor with close_world()."""
    queue = rank.queue(levels=["self" if r == rank.rank else "node" for r in range(rank.size)])
    return _world(rank, rank.group, queue, build_mesh(MeshSettings(), rank=rank.rank, hosts=["here"] * rank.size))


def torch_world(rank: TorchRank) -> World:
    """The same, of threads that have all of torch.distributed, with the levels of the machine that they play."""
    group = dist.new_group()
    assert isinstance(group, dist.ProcessGroup)
    levels = [LevelSettings(name=name, size=rank.levels.size(i + 1)) for i, name in enumerate(rank.levels.names)]
    mesh = build_mesh(MeshSettings(levels=tuple(levels)), rank=rank.rank, hosts=["here"] * rank.size)
    return _world(rank, group, rank.queue(), mesh)


def _world(rank: Rank | TorchRank, group: dist.ProcessGroup, queue: CommQueue, mesh: Mesh) -> World:
    return World(
        place=Place("single", rank.rank, rank.size, rank.rank, rank.size, 0, "127.0.0.1", 0),
        settings=WorldSettings(),
        rank=rank.rank,
        size=rank.size,
        local_rank=rank.rank,
        host="here",
        hosts=("here",) * rank.size,
        interface=loopback_interface(),
        device=torch.device("cpu"),
        backend="gloo",
        store=rank.store,
        group=group,
        mesh=mesh,
        meter=queue.meter,
        monitor=queue.monitor,
        queue=queue,
    )


def close_world(world: World) -> None:
    world.queue.close()
    world.monitor.close()


@functools.cache
def small_text() -> list[str]:
    """Paths of a few modules of the standard library, about 200 kB."""
    return [str(path) for path in standard_library() if 2_000 < path.stat().st_size < 10_000][:40]


def small_settings(folder: Path) -> dict[str, Any]:
    return {
        "model": {"kind": "gpt", "layers": 1, "heads": 2, "width": 32, "context": 32},
        "data": {"corpus": "files", "files": small_text(), "validation_fraction": 0.2},
        "optimizer": {"kind": "adamw", "lr": 1e-2},
        "schedule": {"kind": "constant", "warmup_steps": 2},
        "train": {"steps": 4, "global_batch": 8, "eval_windows": 10, "eval_batch": 3},
        "method": {"kind": "allreduce", "dtype": "fp32"},
        "output": {"folder": str(folder / "runs")},
    }


def small_config_file(folder: Path) -> Path:
    own = folder / f"small-{threading.get_ident()}.yaml"
    own.write_text(yaml.safe_dump(small_settings(folder)))
    return own.replace(folder / "small.yaml")  # ranks that are threads come here together: no one reads half a file


def small_config(folder: Path, *overrides: str) -> RunConfig:
    return load_config(small_config_file(folder), overrides)
