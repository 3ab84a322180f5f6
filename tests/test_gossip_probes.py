from __future__ import annotations

import math

import pytest
import torch

from thinwire.comm.gossip.probes import Probes, decode, measure, project
from thinwire.comm.gossip.simulation import Simulation
from thinwire.comm.wire import PayloadError


def distance(vectors):
    stacked = torch.stack(vectors)
    return float((stacked - stacked.mean(dim=0)).square().sum(dim=1).mean())


def disagreeing(size, numel, directions=None):
    generator = torch.Generator().manual_seed(size)
    apart = torch.randn(size, directions or numel, generator=generator)
    if directions:
        apart = apart @ torch.randn(directions, numel, generator=generator)
    return list(100.0 + torch.randn(numel, generator=generator) + 0.01 * apart)


def test_probes_are_products_with_the_same_signs_everywhere():
    whole = torch.eye(100, dtype=torch.float64)
    signs = torch.stack([project(row, 8, 5, 2) for row in whole], dim=1)
    assert set(signs.flatten().tolist()) == {-1.0, 1.0}
    assert abs(signs.mean()) < 4 / math.sqrt(signs.numel())
    x = torch.randn(100, dtype=torch.float64)
    torch.testing.assert_close(project(x, 8, 5, 2), signs @ x.float(), rtol=1e-5, atol=1e-4)
    assert not torch.equal(project(x, 8, 5, 3), project(x, 8, 5, 2))
    assert not torch.equal(project(x, 8, 6, 2), project(x, 8, 5, 2))


def test_signs_of_a_long_vector_do_not_repeat():
    numel = 2 * 65536 + 70
    a, b = torch.zeros(numel), torch.zeros(numel)
    a[:64], b[65536 : 65536 + 64] = 1.0, 1.0
    assert not torch.equal(project(a, 16, 0, 0), project(b, 16, 0, 0))
    assert project(torch.ones(numel), 4, 0, 0).abs().max() < 6 * math.sqrt(numel)


def ratios(vectors, count, draws):
    """Estimates of `count` probes each, over the truth: every probe has signs of its own, so one draw gives many."""
    projected = [project(v, count * draws, 1, 0).split(count) for v in vectors]
    truth = distance(vectors)
    return torch.tensor([measure(n, list(each)).squared / truth for n, each in enumerate(zip(*projected, strict=True))])


@pytest.mark.parametrize(("count", "low", "high"), [(8, 0.10, 0.18), (32, 0.055, 0.085)])
def test_the_estimate_is_unbiased_with_the_stated_spread(count, low, high):
    found = ratios(disagreeing(16, 500), count, 200)
    assert float(found.mean()) == pytest.approx(1.0, abs=0.03)
    assert low < float(found.std()) < high
    assert low < measure(0, [torch.zeros(count)] * 16).spread < high


def test_machines_that_differ_along_one_direction_have_the_worse_spread():
    assert measure(0, [torch.zeros(8)] * 16).worst == 0.5
    assert float(ratios(disagreeing(16, 500, directions=1), 8, 400).std()) == pytest.approx(0.5, rel=0.2)


def run(world, probes, vectors, number):
    def publish(one, vector):
        one.publish(number, vector)
        return
        yield

    alive = [one for one in range(len(probes)) if world.ports[one].alive]
    for rank in alive:
        world.start(rank, publish(probes[rank], vectors[rank]))
    world.run([])
    for rank in alive:
        world.start(rank, collect(probes[rank]))
    world.run([])


def collect(one):
    one.collect()
    return
    yield


def test_the_lowest_machine_alive_gathers_what_128_bytes_from_each_tell():
    vectors = disagreeing(6, 400)
    world = Simulation(6)
    probes = [Probes(port, count=32, seed=3) for port in world.ports]
    run(world, probes, vectors, 10)
    assert [one.sent_bytes() for one in probes] == [{}] + [{0: 128}] * 5
    assert [sum(port.sent_bytes.values()) for port in world.ports] == [0] + [128] * 5
    assert probes[0].newest.number == 10
    assert probes[0].metrics()["consensus_distance"] == pytest.approx(math.sqrt(distance(vectors)), rel=0.25)
    assert all(not one.metrics() for one in probes[1:])
    world.kill(0)
    run(world, probes, vectors, 20)
    assert probes[1].newest.number == 20
    assert probes[1].newest.machines == 5


def test_a_machine_that_lags_delays_the_measurement_and_nobody():
    vectors = disagreeing(3, 50)
    world = Simulation(3)
    probes = [Probes(port, count=8, seed=3) for port in world.ports]
    for number in range(100, 200):
        run(world, probes[:2], vectors[:2], number)
    assert probes[0].newest is None
    probes[2].publish(190, vectors[2])
    world.run([collect(one) for one in probes])
    assert probes[0].newest.number == 190


def test_damaged_probes_are_refused_or_finite(mutations):
    payload = project(torch.ones(100), 8, 0, 0).view(torch.uint8)
    assert len(decode(payload, 8)) == 8
    for damaged in mutations(payload):
        try:
            assert decode(damaged, 8).isfinite().all()
        except PayloadError:
            continue
