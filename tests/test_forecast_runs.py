"""Forecasts of whole runs of other methods than those of gradients, as their trainers carry them out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from memory import Memory
from metered import foretold
from ranks import Rank, run_ranks
from torch import nn
from torch_threads import TorchRank, run_torch_ranks
from worlds import close_world, small_text, thread_world, torch_world

from thinwire.comm.forecast import Forecast, seat_of
from thinwire.dist.config import RunConfig, load_config
from thinwire.dist.gossip_train import GossipTrainer
from thinwire.dist.metrics import Record
from thinwire.dist.models import build_model
from thinwire.dist.plan.forecasts import Subject, forecast_run
from thinwire.dist.plan.prediction import subject_of
from thinwire.dist.plan.trace import StepTrace
from thinwire.dist.train import Trainer
from thinwire.dist.zeroth_order import ZerothOrderTrainer


def small(name: str, folder: Path, *overrides: str) -> RunConfig:
    """A run of configs/, with its method and its settings, of a small model on a small text."""
    text = [
        "model.layers=1",
        "model.heads=2",
        "model.width=32",
        "model.context=32",
        f"data={{corpus: files, files: {small_text()}, validation_fraction: 0.2}}",
        "train={steps: 10, global_batch: 8, micro_batch: 1, eval_windows: 0}",
        f"output.folder={folder}",
    ]
    return load_config(Path("configs") / f"{name}.yaml", [*text, *overrides])


def run_all(config: RunConfig, world: Any) -> list[Record]:
    memory = Memory()
    trainers = {"gossip": GossipTrainer, "onebyte": ZerothOrderTrainer}
    try:
        trainers.get(config.method.kind, Trainer)(config, world).run([memory])  # type: ignore[attr-defined]
    finally:
        close_world(world)
    return memory.records


EXPERTS = ("model.experts=4", "model.expert_width=16")


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("partition", ("model.layers=3", "train.parameters=['blocks.2.*']")),  # of frozen blocks backward fetches one
        ("partition_quantised", ()),
        ("moe_8m", EXPERTS),
    ],
    ids=["frozen blocks", "quantised", "experts"],
)
def test_runs_on_two_levels_send_what_is_foretold(name: str, overrides: tuple[str, ...], tmp_path: Path) -> None:
    config = small(name, tmp_path, "train.steps=2", *overrides)
    subject = subject_of(config, 4)

    def work(rank: TorchRank) -> None:
        forecast = forecast_run(subject, seat_of([("node", 2), ("world", 4)], rank.rank))
        assert forecast.exact
        for record in run_all(config, torch_world(rank)):
            assert record["sent_bytes_by_level"] == foretold(forecast, 1)

    run_torch_ranks((2, 4), work)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("gossip", ("method.schedule.every=2", "train.steps=8")),
        ("onebyte_gpt", ("method.samples=2", "method.snapshot_every=2", "train.steps=3")),
    ],
)
def test_runs_among_equal_ranks_send_what_is_foretold(name: str, overrides: tuple[str, ...], tmp_path: Path) -> None:
    config = small(name, tmp_path, *overrides)
    subject = subject_of(config, 4)

    def work(rank: Rank) -> None:
        forecast = forecast_run(subject, seat_of([("node", 4)], rank.rank))
        assert forecast.exact
        records = run_all(config, thread_world(rank))
        total: Counter[str] = Counter()
        for record in records:
            total.update(record["sent_bytes_by_level"])
        assert total == foretold(forecast, len(records))

    run_ranks(4, work)


def test_runs_with_spread_experts_send_what_is_foretold_but_for_uneven_loads(tmp_path: Path) -> None:
    config = small("moe_expert_parallel", tmp_path, "train.steps=2", *EXPERTS)
    subject = subject_of(config, 4)

    def work(rank: TorchRank) -> None:
        forecast = forecast_run(subject, seat_of([("node", 2), ("world", 4)], rank.rank))
        world = torch_world(rank)
        run_all(config, world)
        for operation in ("allreduce", "balance", "experts/counts", "experts/weight_gradients", "experts/norm"):
            assert foretold(part(forecast, operation), 2) == world.meter.sent_bytes(operation), operation
        for operation in ("experts/rows", "experts/gradients"):
            found = world.meter.sent_bytes(operation)
            assert foretold(part(forecast, operation), 2) == pytest.approx(found, rel=0.5), operation

    run_torch_ranks((2, 4), work)


def part(forecast: Forecast, operation: str) -> Forecast:
    return Forecast(tuple(e for e in forecast.exchanges if e.operation.startswith(operation)))


@pytest.mark.parametrize(
    ("name", "overrides", "size", "message"),
    [
        ("gossip", ("method.graph=auto", "train.global_batch=600"), 600, "method.graph: auto compares graphs by their"),
        ("gossip", ("method.algorithm=decentlam", "method.schedule=every"), 4, "optimizer.kind: adamw, but method.alg"),
        ("gossip_machines", (), 4, "method.machines.machines: 3 addresses, but the cluster has 4 ranks"),
        ("partition", ("method.params=rack",), 4, "method.params: the machine has no level 'rack'"),
        ("onebyte_gpt", ("method.exchange={kind: flood, graph: hypercube}", "train.global_batch=6"), 6, "hypercube"),
        (
            "moe_expert_parallel",
            (*EXPERTS, "model.expert_parallel=rack"),
            4,
            "model.expert_parallel: there is no level",
        ),
        ("moe_expert_parallel", (*EXPERTS, "model.experts=5"), 4, "model.experts: 5 cannot be shared equally by the 2"),
    ],
)
def test_what_does_not_fit_is_refused(
    name: str, overrides: tuple[str, ...], size: int, message: str, tmp_path: Path
) -> None:
    config = small(name, tmp_path, *overrides)
    subject = Subject(config, *_model_of(config))
    with pytest.raises(ValueError, match=message):
        forecast_run(subject, seat_of([("node", 2), ("world", size)], 1))


def _model_of(config: RunConfig) -> tuple[nn.Module, StepTrace]:
    """Without the seconds that a trace takes."""
    model = build_model(config.model, tokenizer_vocab=256, seed=0, device=torch.device("meta"))
    return model, StepTrace(1, 1, tuple((name, 1.0) for name, _ in model.named_parameters()), 0)
