"""Forecasts of partition, gossip, onebyte, balance and expert parallelism: what the meter counts, on every rank."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from contract_rows import METHODS, OPENED, WIDTH, Row
from contract_run import Run
from ranks import Rank, run_ranks
from test_contract import batch, make_model
from torch import nn
from torch_threads import TorchRank, run_torch_ranks

from thinwire.comm.balance.forecast import forecast_balance
from thinwire.comm.balance.settings import BalanceSettings
from thinwire.comm.forecast import Forecast, Parameter, Seat, seat_of
from thinwire.comm.gossip.forecast import forecast_gossip
from thinwire.comm.gossip.settings import GossipSettings
from thinwire.comm.meter import TrafficMeter
from thinwire.comm.onebyte.forecast import forecast_onebyte
from thinwire.comm.onebyte.settings import OneByteSettings
from thinwire.comm.partition.forecast import forecast_partition
from thinwire.comm.partition.optimizer import PartitionedOptimizer
from thinwire.comm.partition.settings import PartitionSettings
from thinwire.comm.partition.traffic import unit_shapes

SIZE = 3
LEVELS = [["self", "node", "world"], ["node", "self", "world"], ["world", "world", "self"]]
STEPS = 6  # with two of slowmo's slow steps, a merge, and whole rounds


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    while OPENED:
        OPENED.pop().remove()


def rows_of(method: str) -> Any:
    return pytest.mark.parametrize("row", [row for row in METHODS if row.name.startswith(method)], ids=str)


def options_of(row: Row) -> dict[str, Any]:
    """The keywords with which a row enters."""
    options: dict[str, Any] = inspect.getclosurevars(row.enter).nonlocals["options"]
    return options


def seat(rank: int) -> Seat:
    return Seat(rank, tuple(LEVELS[rank]), (("node", 2), ("world", 3)))


def parameters_of(model: nn.Module) -> list[Parameter]:
    return [Parameter(name, p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()]


def foretold(forecast: Forecast, steps: int) -> dict[str, int]:
    """By level, in so many steps from the beginning; what comes every n steps comes with the last of them."""
    total: Counter[str] = Counter()
    for exchange in forecast.exchanges:
        for level, count in exchange.sent_bytes.items():
            total[level] += count * int(steps * exchange.per_step + 1e-9)
    return {level: count for level, count in total.items() if count}


def sent(meter: TrafficMeter) -> dict[str, int]:
    told = meter.sent_bytes("control/")
    return {level: n - told.get(level, 0) for level, n in meter.sent_bytes().items() if n - told.get(level, 0)}


def train(row: Row, rank: Rank, steps: int) -> tuple[dict[str, int], Run]:
    """What so many steps have sent."""
    queue = row.queue(rank, LEVELS[rank.rank])
    run = row.enter(rank, queue, make_model())
    for step in range(steps):
        run.step(batch(rank.rank, step))
    found = sent(queue.meter)
    queue.close()
    return found, run


@rows_of("gossip")
def test_gossip_sends_and_keeps_what_is_foretold(row: Row) -> None:
    own = {key: value for key, value in options_of(row).items() if key != "deadline_s"}
    settings = GossipSettings.model_validate(own)
    sizes = [p.numel() for p in make_model().parameters()]

    def work(rank: Rank) -> None:
        found, run = train(row, rank, STEPS)
        forecast = forecast_gossip(settings, sizes, seat(rank.rank), steps=STEPS)
        if forecast.exact:
            assert foretold(forecast, STEPS) == found
        else:
            assert foretold(forecast, STEPS) == pytest.approx(found, rel=0.3)
        kept = tensors_of(run.method.state_dict()["algorithm"])
        if settings.algorithm.kind == "choco":
            kept += sum(sizes) * 4  # what the last payload left out: kept, but made anew by a run that resumes
        assert forecast.memory_bytes.get("gossip", 0) == kept

    run_ranks(SIZE, work)


def tensors_of(state: Any) -> int:
    """Bytes of all tensors in a state."""
    if isinstance(state, torch.Tensor):
        return state.nbytes
    return sum(map(tensors_of, state.values())) if isinstance(state, Mapping) else 0


@rows_of("onebyte")
def test_onebyte_sends_and_keeps_what_is_foretold(row: Row) -> None:
    settings = OneByteSettings.model_validate(options_of(row))
    model = make_model()

    def work(rank: Rank) -> None:
        found, _ = train(row, rank, STEPS)
        forecast = forecast_onebyte(settings, parameters_of(model), seat(rank.rank))
        assert forecast.exact
        assert foretold(forecast, STEPS) == found

    run_ranks(SIZE, work)


@rows_of("balance")
def test_balance_sends_what_is_foretold(row: Row) -> None:
    settings = BalanceSettings(coef=1e-3, **options_of(row))

    def work(rank: Rank) -> None:
        found, _ = train(row, rank, STEPS)
        forecast = forecast_balance(settings, layers=1, num_experts=7, micro_batches=1, seat=seat(rank.rank))
        assert forecast.exact
        assert foretold(forecast, STEPS) == found

    run_ranks(SIZE, work)


@rows_of("partition")
@pytest.mark.parametrize("sizes", [(3,), (2, 4)])
def test_partition_sends_and_keeps_what_is_foretold(row: Row, sizes: tuple[int, ...]) -> None:
    settings = PartitionSettings.model_validate(options_of(row))

    def work(rank: TorchRank) -> None:
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(WIDTH, 7), nn.Tanh(), nn.Linear(7, 5))
        forecast = forecast_partition(
            settings,
            unit_shapes(model, [model[0]]),
            seat_of(list(zip(("node", "world")[-len(sizes) :], sizes, strict=True)), rank.rank),
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5, foreach=True),
            names={id(p): name for name, p in model.named_parameters()},
        )
        queue = rank.queue()
        run = row.enter(rank, queue, make_model())
        for step in range(2):
            before = sent(queue.meter)
            run.step(batch(rank.rank, step))
            now = sent(queue.meter)
            assert {level: n - before.get(level, 0) for level, n in now.items()} == foretold(forecast, 1)
        assert isinstance(run.method, PartitionedOptimizer)
        assert forecast.memory_bytes == run.method.measured_memory() == run.method.predicted_memory()
        queue.close()

    run_torch_ranks(sizes, work)
