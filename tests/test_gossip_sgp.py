"""Stochastic gradient push against matrices, and against D-PSGD where rows do not sum to 1."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gossip_digraphs import Directed, digraph
from gossip_quadratics import Quadratics
from pydantic import ValidationError

from thinwire.comm.gossip.algorithms.dpsgd import DPSGDSettings
from thinwire.comm.gossip.algorithms.sgp import SGPSettings

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
