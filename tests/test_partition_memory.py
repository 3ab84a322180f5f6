"""Memory of every triple: what the tensors take is what the formula says."""

from __future__ import annotations

from itertools import combinations_with_replacement
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch_threads import TorchRank, run_torch_ranks

from thinwire.comm.forecast import seat_of
from thinwire.comm.partition.door import enter
from thinwire.comm.partition.forecast import forecast_partition
from thinwire.comm.partition.optimizer import PartitionedOptimizer
from thinwire.comm.partition.peak_memory import PeakMemory
from thinwire.comm.partition.settings import PartitionSettings
from thinwire.comm.partition.traffic import unit_shapes

WIDTH = 64
NUMEL = 2 * WIDTH * WIDTH + WIDTH
NAMES = ("rank", "node", "world")
SIZE = {"rank": 1, "node": 2, "world": 4}


def step(rank: TorchRank, name: str, **settings: Any) -> tuple[nn.Module, PartitionedOptimizer]:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("world", "node"))
    optimizer = enter(
        model,
        mesh,
        torch.optim.AdamW,
        PartitionSettings(**settings),
        queue=rank.queue(name=name),
        compute_dtype=torch.bfloat16,
        lr=0.1,
        fused=True,
    )
    said = optimizer.predicted_memory()
    assert foretold(rank.rank, settings) == said
    model(torch.ones(1, WIDTH)).sum().backward()
    optimizer.step()
    assert optimizer.predicted_memory() == said
    return model, optimizer


def foretold(rank: int, settings: dict[str, Any]) -> dict[str, int]:
    """Without a process or a weight."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False))
    forecast = forecast_partition(
        PartitionSettings(**settings),
        unit_shapes(model, []),
        seat_of([("node", 2), ("world", 4)], rank),
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.1, fused=True),
        names={id(p): name for name, p in model.named_parameters()},
        compute_dtype=torch.bfloat16,
    )
    return dict(forecast.memory_bytes)


def test_memory_is_the_formula_for_every_triple() -> None:
    def work(rank: TorchRank) -> None:
        for params, grads, optim in combinations_with_replacement(NAMES, 3):
            _, optimizer = step(rank, f"{params}{grads}{optim}", params=params, grads=grads, optim=optim)
            found = optimizer.measured_memory()
            assert found == optimizer.predicted_memory()
            formula = {
                "params": 4 * NUMEL / SIZE[params],
                "grads": 4 * NUMEL / SIZE[grads],
                "optim": 8 * NUMEL / SIZE[optim],
            }
            for state, expected in formula.items():
                assert abs(found[state] - expected) <= 0.03 * expected, (params, grads, optim, state)

    run_torch_ranks([2, 4], work)


def test_memory_of_copies_masters_and_error_memories_is_the_formula_too() -> None:
    def work(rank: TorchRank) -> None:
        model, optimizer = step(
            rank,
            "all",
            params="node",
            grads="node",
            optim="world",
            secondary="rank",
            weights="bf16",
            gradients={"world": {"kind": "int8", "feedback": True}},
        )
        assert optimizer.measured_memory()["secondary"] == 0  # it would be old
        model(torch.ones(1, WIDTH))
        found = optimizer.measured_memory()
        assert found == optimizer.predicted_memory()
        assert found == {
            "params": 2 * NUMEL // 2,
            "grads": 4 * NUMEL // 2,
            "optim": (4 + 8) * NUMEL // 4 + 3 * 4,  # AdamW counts each parameter's steps in fp32
            "secondary": 2 * NUMEL,
            "memories": 8 * NUMEL // 2,
        }

    run_torch_ranks([2, 4], work)


def test_peak_memory_begins_anew() -> None:
    before = torch.ones(24 << 20)
    del before
    peak = PeakMemory()
    at_first = peak.peak_bytes()
    held = torch.ones(16 << 20)
    del held
    assert 60 << 20 < peak.peak_bytes() - at_first < 80 << 20
    assert at_first - peak.at_start_bytes < 8 << 20
