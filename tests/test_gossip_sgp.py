"""Stochastic gradient push against matrices, and against D-PSGD where rows do not sum to 1."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gossip_digraphs import Directed, digraph
from gossip_quadratics import Quadratics
from gossip_worlds import Late, quiet
from pydantic import ValidationError

from thinwire.comm.gossip.agent import Agent
from thinwire.comm.gossip.algorithms.dpsgd import DPSGDSettings
from thinwire.comm.gossip.algorithms.sgp import SGPSettings
from thinwire.comm.gossip.port import Script
from thinwire.comm.gossip.turn import Turn

N = 6
LR = 0.1


def changing() -> Directed:
    return Directed(N, lambda round: digraph(N, seed=round))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("heal", [False, True])
def test_numerators_move_by_updates_and_are_mixed(overlap: bool, heal: bool) -> None:
    world = Quadratics(SGPSettings(overlap=overlap, heal=heal), changing(), lr=LR)
    x, b, m = world.x.numpy().copy(), world.b.numpy(), np.ones((N, 1))
    for step in range(20):
        update = -LR * (x / m - b)
        if not overlap:
            matrix = digraph(N, seed=step).matrix()
            x, m = matrix @ (x + update), matrix @ m
        else:  # a round ends one step later
            matrix = digraph(N, seed=step - 1).matrix() if step else np.eye(N)
            x, m = matrix @ x + update, matrix @ m
        world.run(1)
        np.testing.assert_allclose(world.x.numpy(), x / m, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(world.mass.numpy(), m[:, 0], rtol=1e-13)


def test_every_machine_counts_alike_where_in_dpsgd_mass_counts() -> None:
    graph = Directed(N, lambda round: digraph(N, seed=1))

    def bias(settings: Any) -> float:
        world = Quadratics(settings, graph, lr=LR)
        world.run(200)
        return float((world.x.mean(0) - world.b.mean(0)).norm())

    assert bias(SGPSettings()) < 1e-7
    assert bias(DPSGDSettings()) > 0.1


@pytest.mark.parametrize("settings", [SGPSettings(overlap=True), SGPSettings(overlap=True, heal=True), DPSGDSettings()])
def test_a_resumed_run_goes_on_bit_for_bit(settings: Any) -> None:
    going_on, resumed = (Quadratics(settings, changing(), momentum=0.9) for _ in range(2))
    going_on.run(7)
    going_on.drain()
    resumed.load(going_on.state(), step=7)
    for world in (going_on, resumed):
        world.run(5)
        world.drain()
    assert torch.equal(going_on.x, resumed.x)
    assert torch.equal(going_on.mass, resumed.mass)


@pytest.mark.parametrize("settings", [SGPSettings(overlap=True), SGPSettings(heal=True), DPSGDSettings()])
def test_a_merge_waits_for_parcels_that_are_late(settings: Any) -> None:
    late = Late(lambda source, to, count: 0.1 + (7 * source + 5 * to + 3 * count) % 11 / 2)  # deadline: 1 s
    world = Quadratics(settings, changing(), links=late)
    for replica, b in zip(world.replicas, world.b, strict=True):
        replica.x = b.clone()

    class Ending:
        def turn(self, step: int) -> Turn:
            return Turn(step, step, world.graph.mixing(step), merge=step == 7)

    def script(rank: int) -> Script[None]:
        port, replica = world.simulation.ports[rank], world.replicas[rank]
        agent = Agent(replica, port, world.algorithms[rank], Ending(), steps=8)
        while not agent.ended:
            yield from agent.before_step()
            yield from agent.after_step()
        yield from quiet(port, port.now() + 20.0)
        yield from agent.algorithm.drain()

    start = world.x.mean(0)
    world.simulation.run([script(rank) for rank in range(N)])
    assert sum(algorithm.metrics()["late"] for algorithm in world.algorithms) > 10
    assert world.mass.sum() == pytest.approx(N, abs=1e-13)
    for x in world.x:
        assert torch.equal(x, world.x[0])
    torch.testing.assert_close(world.x[0], start, rtol=0, atol=1e-14)


def test_predicted_bytes_are_those_sent() -> None:
    for settings, each in ((SGPSettings(), 5 * 8), (SGPSettings(heal=True), 5 * 8), (SGPSettings(wire="bf16"), 10)):
        world = Quadratics(settings, changing())
        world.run(3)
        for rank, port in enumerate(world.simulation.ports):
            assert world.predicted[rank] == dict(port.sent_bytes)
            assert set(port.sent_bytes.values()) <= {each, 2 * each, 3 * each}


def test_refuses_to_round_running_sums() -> None:
    with pytest.raises(ValidationError, match="wire: bf16 with heal: true; running sums travel as they are"):
        SGPSettings(heal=True, wire="bf16")
