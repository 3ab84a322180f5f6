"""Gossip in rounds: late neighbours, lost ones, merges, and going on from a cut."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from gossip_digraphs import digraph
from gossip_quadratics import DEADLINE_S, Quadratics
from gossip_worlds import Always, Late, mixing_of, ring
from torch import Tensor

from thinwire.comm.gossip.algorithm import AlgorithmSettings
from thinwire.comm.gossip.algorithms.d2 import D2Settings
from thinwire.comm.gossip.algorithms.decentlam import DecentLaMSettings
from thinwire.comm.gossip.algorithms.gradient_tracking import GradientTrackingSettings
from thinwire.comm.gossip.algorithms.noloco import NoLoCoSettings
from thinwire.comm.gossip.algorithms.slowmo import SlowMoSettings
from thinwire.comm.gossip.algorithms.variance_corrected import VarianceCorrectedSettings
from thinwire.comm.gossip.message import Kind

RING = Always(ring(6))
COMPLETE = Always(mixing_of(4, [(i, j) for i in range(4) for j in range(i)], 1 / 4))
ROUNDS = 25


def sometimes_late() -> Late:
    """One message in eleven comes half a deadline after its round is over, some two rounds later."""

    def latency_s(source: int, to: int, number: int) -> float:
        draw = (source * 7 + to * 13 + number * 5) % 33
        return {0: 1.5, 11: 1.5, 22: 2.5}.get(draw, 0.0) * DEADLINE_S

    return Late(latency_s)


def off(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def settled(world: Quadratics) -> None:
    """Nothing is on the wire; and there had been something late."""
    assert sum(algorithm.metrics()["late"] for algorithm in world.algorithms) > 10
    world.drain()
    world.drain()
    world.drain()
    assert all(algorithm.metrics()["overdue"] == 0 for algorithm in world.algorithms)


@pytest.mark.parametrize("graph", [RING, Always(digraph(5, 1))], ids=["ring", "digraph"])
def test_gradient_tracking_sums_to_the_gradients_once_late_flows_have_come(graph: Always) -> None:
    world = Quadratics(GradientTrackingSettings(), graph, links=sometimes_late())
    apart = []
    for _ in range(ROUNDS):
        world.run(1)
        tracked = torch.stack([algorithm._tracked for algorithm in world.algorithms])
        apart.append(off((world.mass[:, None] * tracked).sum(0), world.gradients.sum(0)))
    assert max(apart) > 1e-3  # what is on the wire is missing
    settled(world)
    tracked = torch.stack([algorithm._tracked for algorithm in world.algorithms])
    assert off((world.mass[:, None] * tracked).sum(0), world.gradients.sum(0)) < 1e-14


def test_d2_moves_the_mean_by_the_mean_update_once_late_flows_have_come() -> None:
    world = Quadratics(D2Settings(lazy=True), RING, links=sometimes_late())
    mean = world.x.mean(0)
    apart = []
    for _ in range(ROUNDS):
        world.run(1)
        mean = mean - 0.1 * world.gradients.mean(0)
        apart.append(off(world.x.mean(0), mean))
    assert max(apart) > 1e-3
    settled(world)
    assert off(world.x.mean(0), mean) < 1e-14
    assert float(sum(algorithm._gained for algorithm in world.algorithms).abs().max()) < 1e-14


def test_decentlam_and_noloco_keep_the_mean_of_weights_and_momentum_through_lateness() -> None:
    beta = 0.4
    world = Quadratics(DecentLaMSettings(), RING, momentum=beta, links=sometimes_late())

    def kept() -> Tensor:
        ahead = torch.stack(world.momenta) * 0.1 * beta / (1 - beta)
        lent = [a._lent for a in world.algorithms if a._lent is not None]
        return (world.x - ahead).sum(0) + (beta / (1 - beta) * sum(lent) if lent else 0.0)

    expected = kept()
    for _ in range(ROUNDS):
        world.run(1)
        expected = expected - 0.1 / (1 - beta) * world.gradients.sum(0)
    settled(world)
    assert off(kept(), expected) < 1e-14
    for replica in world.replicas:  # and what drain() lent comes back with its momentum
        replica.lr = 0.1
    world.run(1)
    expected = expected - 0.1 / (1 - beta) * world.gradients.sum(0)
    world.drain()
    world.drain()
    assert off(kept(), expected) < 1e-14

    pairs = Quadratics(NoLoCoSettings(), RING, links=sometimes_late())
    sums = [torch.stack([getattr(a, name) for a in pairs.algorithms]).sum(0) for name in ("_slow", "_momentum")]
    total = sums[0] + sums[1]  # momentum / (1 - momentum) is 1
    for _ in range(ROUNDS):
        slow = torch.stack([a._slow for a in pairs.algorithms])
        local = pairs.x - 0.1 * (pairs.x - pairs.b)
        total = total + 0.7 / (1 - 0.5) * (local - slow).sum(0)
        pairs.run(1)
    settled(pairs)
    slow, momentum = (
        torch.stack([getattr(a, name) for a in pairs.algorithms]).sum(0) for name in ("_slow", "_momentum")
    )
    assert off(slow + momentum, total) < 1e-13


def test_variance_correction_keeps_the_mean_of_each_tensor_through_lateness_and_of_all_once_it_is_over() -> None:
    sizes = (30, 20)
    start = list(torch.randn(6, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(5)))
    settings = VarianceCorrectedSettings(rounds=8)
    world = Quadratics(settings, RING, lr=0.0, numel=50, sizes=sizes, start=start, links=sometimes_late())
    world.run(8)
    assert max(algorithm.metrics()["largest_factor"] for algorithm in world.algorithms) > 1.02
    for _ in range(3):
        world.drain()
    before = torch.stack(start)
    for part in (slice(0, 30), slice(30, 50)):
        assert abs(float(world.x[:, part].mean() - before[:, part].mean())) < 1e-15
    mean = world.x.mean(0)
    assert off(mean, before.mean(0)) > 1e-3
    world.run(ROUNDS)
    settled(world)
    assert off(world.x.mean(0), mean) < 1e-14


def test_slowmo_makes_all_equal_after_late_rounds() -> None:
    world = Quadratics(SlowMoSettings(every=ROUNDS), RING, links=sometimes_late())
    mean = world.x.mean(0)
    world.run(ROUNDS - 1)
    for _ in range(ROUNDS):
        mean = mean - 0.1 * (mean - world.b.mean(0))
    for _ in range(2):  # the last deliveries of late messages, which would be left to the next drain()
        world.drain()
    world.simulation._links = Late(lambda source, to, number: 0.0)
    world.run(1)
    assert sum(algorithm.metrics()["late"] for algorithm in world.algorithms) > 10
    assert all(torch.equal(row, world.x[0]) for row in world.x)


def test_a_silent_neighbour_costs_one_deadline() -> None:
    late = Late(lambda source, to, number: 1000.0 if source == 2 else 0.0)
    world = Quadratics(GradientTrackingSettings(), RING, links=late)
    world.run(10)
    assert world.simulation.now_s == DEADLINE_S


@pytest.mark.parametrize("settings", [GradientTrackingSettings(), D2Settings(lazy=True)], ids=["tracking", "d2"])
def test_a_lost_machine_goes_on_as_a_linear_objective_until_a_merge(settings: AlgorithmSettings) -> None:
    """What it holds beside its weights is missing; the others' minimum moves by just that, until all begin anew."""
    world = Quadratics(settings, COMPLETE, lr=0.3)
    world.run(4)
    dead = world.algorithms[2]
    took = dead._tracked - world.gradients[2] if hasattr(dead, "_tracked") else -dead._gained / 0.3
    world.kill(2)
    world.run(80)
    living = world.b[world.alive]
    assert off(world.x, living.mean(0) + took / 3) < 1e-10
    assert float(took.abs().max()) > 0.1
    world.merge()
    world.run(80)
    assert off(world.x, living.mean(0)) < 1e-10


def test_the_others_go_on_when_a_machine_is_lost() -> None:
    for settings in (
        DecentLaMSettings(),
        NoLoCoSettings(),
        SlowMoSettings(every=4),
        VarianceCorrectedSettings(rounds=5),
    ):
        world = Quadratics(settings, RING, momentum=0.5 if settings.needs_sgd else 0.0)
        world.run(5)
        world.kill(4)
        world.run(40)
        assert world.simulation.now_s == 0.0  # nobody waited
        assert off(world.x.mean(0), world.b[world.alive].mean(0)) < 0.05
        world.merge()
        assert off(world.x, world.x[0]) == 0.0
        world.run(1)


def test_gradient_tracking_counts_the_gradient_of_a_machine_that_enters() -> None:
    world = Quadratics(GradientTrackingSettings(), Always(ring(4)), lr=0.2)
    world.kill(3)  # before it held anything
    world.run(5)
    world.enter(3, donor=0)
    assert sorted(world.mass.tolist()) == [0.5, 0.5, 1.0, 1.0]
    mean = (world.mass[:, None] * world.x).sum(0)
    for _ in range(120):
        world.run(1)
        tracked = torch.stack([algorithm._tracked for algorithm in world.algorithms])
        mean = mean - 0.2 * world.gradients.sum(0)
        assert off((world.mass[:, None] * tracked).sum(0), world.gradients.sum(0)) < 1e-14
        assert off((world.mass[:, None] * world.x).sum(0), mean) < 1e-13
    assert off(world.mass, torch.full_like(world.mass, 0.75)) < 1e-14
    assert off(world.x, world.b.mean(0)) < 1e-12


CASES: list[tuple[AlgorithmSettings, Callable[[], Always], float]] = [
    (GradientTrackingSettings(), lambda: RING, 0.9),
    (GradientTrackingSettings(wire="bf16"), lambda: Always(digraph(5, 1)), 0.0),
    (D2Settings(lazy=True), lambda: RING, 0.0),
    (DecentLaMSettings(), lambda: RING, 0.5),
    (NoLoCoSettings(), lambda: RING, 0.9),
    (SlowMoSettings(every=4, base={"overlap": True}), lambda: RING, 0.9),
    (SlowMoSettings(every=4, average="own"), lambda: Always(digraph(5, 1)), 0.0),
    (VarianceCorrectedSettings(), lambda: RING, 0.0),
    (VarianceCorrectedSettings(), lambda: Always(digraph(5, 1)), 0.0),
]


@pytest.mark.parametrize(("settings", "graph", "momentum"), CASES, ids=lambda value: getattr(value, "kind", ""))
def test_going_on_from_a_cut_is_going_on(
    settings: AlgorithmSettings, graph: Callable[[], Always], momentum: float
) -> None:
    """In fp32 and bit for bit, after a cut with late messages before it; and every byte that was sent was foretold."""
    start = list(torch.randn(graph().size, 5, generator=torch.Generator().manual_seed(7)))
    worlds = [
        Quadratics(settings, graph(), momentum=momentum, links=links, dtype=torch.float32, start=start)
        for links in (sometimes_late(), None)
    ]
    first, second = worlds
    first.run(10)
    for _ in range(3):
        first.drain()
    second.load(copy.deepcopy(first.state()), step=10)
    for port, predicted in zip(first.simulation.ports, first.predicted, strict=True):
        if settings.kind != "slowmo":  # whose averages are begun anew where one is late
            assert sum(predicted.values()) >= sum(port.sent_bytes.values())  # edges with an answer overdue send none
    first.simulation._links = Late(lambda source, to, number: 0.0)
    for world in worlds:
        world.run(9)
        world.drain()
    assert torch.equal(first.x, second.x)
    for port, predicted in zip(second.simulation.ports, second.predicted, strict=True):
        sent = defaultdict(int)
        for (to, kind), count in port.sent.items():
            if kind is not Kind.BARRIER:  # what agrees on an average is control, as is what comes before it
                sent[to] += count
        assert sent == predicted


def test_of_complete_graphs_all_is_one_step_of_all() -> None:
    """On a complete graph with equal starts, gradient tracking is gradient descent on the mean from its second step."""
    world = Quadratics(GradientTrackingSettings(), COMPLETE)
    world.run(2)
    x = world.x[0]
    world.run(1)
    assert off(world.x, x - 0.1 * (x - world.b.mean(0))) < 1e-15
