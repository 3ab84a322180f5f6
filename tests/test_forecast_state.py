"""Forecasts of partition, gossip, onebyte, balance and expert parallelism: what the meter counts, on every rank."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from contract_rows import METHODS, OPENED, Row
from contract_run import WIDTH, Run, batch, make_model
from metered import foretold
from ranks import Rank, run_ranks
from torch import nn
from torch_threads import TorchRank, run_torch_ranks

from thinwire.comm.balance.forecast import forecast_balance
from thinwire.comm.balance.settings import BalanceSettings
from thinwire.comm.forecast import Parameter, Seat, seat_of
from thinwire.comm.gossip.agent import Agent
from thinwire.comm.gossip.build import build_agent, make_plan
from thinwire.comm.gossip.forecast import forecast_gossip
from thinwire.comm.gossip.port import Script
from thinwire.comm.gossip.replica import VectorReplica
from thinwire.comm.gossip.settings import GossipSettings
from thinwire.comm.gossip.simulation import Simulation, pause
from thinwire.comm.meter import TrafficMeter
from thinwire.comm.onebyte.forecast import forecast_onebyte
from thinwire.comm.onebyte.settings import OneByteSettings
from thinwire.comm.partition.forecast import forecast_partition, gathered_bytes
from thinwire.comm.partition.optimizer import PartitionedOptimizer
from thinwire.comm.partition.settings import PartitionSettings
from thinwire.comm.partition.traffic import UnitShapes, unit_shapes

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
def test_onebyte_sends_what_is_foretold(row: Row) -> None:
    settings = OneByteSettings.model_validate(options_of(row))
    model = make_model()

    def work(rank: Rank) -> None:
        found, _ = train(row, rank, STEPS)
        forecast = forecast_onebyte(settings, parameters_of(model), seat(rank.rank))
        assert forecast.exact
        assert foretold(forecast, STEPS) == found

    run_ranks(SIZE, work)


def test_onebyte_keeps_copies_of_16_bit_weights_masks_and_a_basis() -> None:
    """A subspace has no tensors with fewer rows or columns than its rank."""
    shapes = {"wide": (40, 3, 7), "narrow": (4, 90), "bias": (9,), "frozen": (64, 64)}
    narrow = [Parameter(n, torch.Size(s), torch.bfloat16, trained=n != "frozen") for n, s in shapes.items()]
    settings = OneByteSettings(kept=0.5, directions="subspace", rank=8)
    forecast = forecast_onebyte(settings, narrow, seat(0))
    trained = (840, 360, 9)
    masks = sum(-(-numel // 8) for numel in trained)
    assert forecast.memory_bytes == {"masters": 4 * sum(trained), "masks": masks, "basis": 8 * (40 + 21)}
    assert forecast_onebyte(OneByteSettings(), parameters_of(make_model()), seat(0)).memory_bytes == {}


@rows_of("balance")
def test_balance_sends_what_is_foretold(row: Row) -> None:
    settings = BalanceSettings(coef=1e-3, **options_of(row))

    def work(rank: Rank) -> None:
        found, _ = train(row, rank, STEPS)
        forecast = forecast_balance(settings, layers=1, num_experts=7, micro_batches=1, seat=seat(rank.rank))
        assert forecast.exact
        assert foretold(forecast, STEPS) == found

    run_ranks(SIZE, work)


PARTITIONS = {row.name: row for row in METHODS if row.name.startswith("partition")}


@pytest.mark.parametrize(
    ("row", "sizes"),
    [(row, (3,) if name == "partition-fp32" else (2, 4)) for name, row in PARTITIONS.items()],
    ids=list(PARTITIONS),
)
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


def test_partition_handles_whole_units_in_fp32_too() -> None:
    """In a sum as in a gather, what the three ranks send together is the unit, to two ranks each."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(WIDTH, 7), nn.Tanh(), nn.Linear(7, 5))
    forecasts = [
        forecast_partition(
            PartitionSettings.model_validate(options_of(PARTITIONS["partition-fp32"])),
            unit_shapes(model, [model[0]]),
            seat_of([("world", 3)], rank),
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            names={id(p): name for name, p in model.named_parameters()},
        )
        for rank in range(3)
    ]
    assert forecasts[0].exchanges
    for same in zip(*(forecast.exchanges for forecast in forecasts), strict=True):
        unit_numel = sum(exchange.sent_bytes["world"] for exchange in same) / 4 / 2
        for exchange in same:
            (coding,) = exchange.coding
            assert (coding.codec, coding.encoded, coding.decoded) == ('{"kind": "none"}', 0, 0)
            assert coding.handled == unit_numel


OWN_PACE: list[dict[str, Any]] = [
    {"graph": "ring", "algorithm": "ad_psgd"},
    {"algorithm": {"kind": "modest", "sample": 3, "aggregators": 2, "local_steps": 5}},
]


@pytest.mark.parametrize("given", OWN_PACE, ids=["ad_psgd", "modest"])
def test_where_each_machine_keeps_its_own_pace_the_mean_is_foretold(given: dict[str, Any]) -> None:
    """In virtual time, over links that take none."""
    steps, size, numel = 100, 4, 64
    settings = GossipSettings.model_validate({"probes": 0, **given})
    machines = Simulation(size)
    plan = make_plan(settings, size, steps=steps, numel=numel)
    machines.run([live(build_agent(plan, VectorReplica(torch.zeros(numel)), port)) for port in machines.ports])
    total = 0.0
    for rank in range(size):
        forecast = forecast_gossip(settings, [numel], seat_of([("world", size)], rank), steps=steps)
        assert not forecast.exact
        total += sum(forecast.bytes_per_step().values())
    assert sum(sum(port.sent_bytes.values()) for port in machines.ports) / steps == pytest.approx(total, rel=0.05)


def test_more_asks_are_more_bytes() -> None:
    """A2CiD2 asks half as many as its rate says, AD-PSGD one at every turn."""
    place = seat_of([("node", 2), ("world", 6)], 1)
    by_algorithm = [
        forecast_gossip(GossipSettings.model_validate({"graph": "star", "algorithm": one}), [1000], place, steps=50)
        for one in ("ad_psgd", {"kind": "acid", "rate": 4.0})
    ]
    once, twice = (forecast.bytes_per_step() for forecast in by_algorithm)
    # A leaf of the star asks the hub, which is on its node; the hub asks one of five leaves.
    assert once["node"] == pytest.approx(4000 * (1 + 1 / 5) + 32 / 10)
    assert twice["node"] == pytest.approx(2 * 4000 * (1 + 1 / 5) + 32 / 10)
    assert set(once) == {"node"}


def live(agent: Agent) -> Script[None]:
    while not agent.ended:
        yield pause(agent.port.now(), 0.1)
        yield from agent.before_step()
        yield from agent.after_step()


def test_whole_weights_in_use_are_the_roots_and_of_two_blocks() -> None:
    sizes = {"root": 640, "small": 64, "large": 320}
    units = [UnitShapes({name: torch.Size([numel])}, {}, is_root=name == "root") for name, numel in sizes.items()]
    place = seat_of([("node", 2), ("world", 8)], 3)
    for params, expected in (("rank", 0), ("node", 2 * (640 + 320 + 64)), ("world", 2 * (640 + 320 + 64))):
        settings = PartitionSettings(params=params, grads="world", optim="world")
        assert gathered_bytes(settings, units, place, prefetch=1, compute_dtype=torch.bfloat16) == expected
    assert gathered_bytes(PartitionSettings(), units, place, prefetch=0) == 4 * (640 + 320)
