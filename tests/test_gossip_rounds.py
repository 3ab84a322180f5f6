"""Gossip in rounds: what each algorithm computes, against closed forms in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gossip_digraphs import digraph
from gossip_quadratics import Quadratics
from gossip_worlds import Always, mixing_of, ring
from torch import Tensor

from thinwire.comm.gossip.algorithm import AlgorithmSettings, Parts
from thinwire.comm.gossip.algorithms.d2 import D2, D2Settings, lazy
from thinwire.comm.gossip.algorithms.decentlam import DecentLaMSettings
from thinwire.comm.gossip.algorithms.dpsgd import DPSGDSettings
from thinwire.comm.gossip.algorithms.gradient_tracking import GradientTrackingSettings
from thinwire.comm.gossip.algorithms.in_rounds import mixer_of
from thinwire.comm.gossip.algorithms.noloco import NoLoCoSettings, pair_moments
from thinwire.comm.gossip.algorithms.slowmo import SlowMoSettings
from thinwire.comm.gossip.algorithms.variance_corrected import VarianceCorrectedSettings
from thinwire.comm.gossip.graphs.random_graphs import MatchingSettings
from thinwire.comm.gossip.mixer import summing_to_one

RING = Always(ring(6))
W = torch.from_numpy(ring(6).matrix())
EYE = torch.eye(6, dtype=torch.float64)
COMPLETE = Always(mixing_of(4, [(i, j) for i in range(4) for j in range(i)], 1 / 4))


def off(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def test_gradient_tracking_finds_the_common_minimum_and_tracks_the_mean_gradient_at_every_step() -> None:
    world = Quadratics(GradientTrackingSettings(), RING, lr=0.2)
    for _ in range(150):
        world.run(1)
        tracked = torch.stack([algorithm._tracked for algorithm in world.algorithms])
        assert off(tracked.mean(0), world.gradients.mean(0)) < 1e-15
    assert off(world.x, world.b.mean(0)) < 1e-12


def test_gradient_tracking_is_its_formula() -> None:
    world = Quadratics(GradientTrackingSettings(), RING, lr=0.2)
    world.run(7, exchange_every=2)
    x = torch.zeros_like(world.b)
    y = g = x - world.b
    for step in range(7):
        mixing = W if step % 2 else EYE
        x, mixed = mixing @ (x - 0.2 * y), mixing @ y
        y, g = mixed + (x - world.b) - g, x - world.b
    assert off(world.x, x) < 1e-15


def test_gradient_tracking_over_pushed_mass_counts_all_machines_alike() -> None:
    world = Quadratics(GradientTrackingSettings(), Always(digraph(5, 1)), lr=0.2)
    for _ in range(160):
        world.run(1)
        tracked = torch.stack([algorithm._tracked for algorithm in world.algorithms])
        assert off((world.mass[:, None] * tracked).sum(0), world.gradients.sum(0)) < 1e-14
    assert float(world.mass.std()) > 0.3  # it is not the easy case
    assert off(world.x, world.b.mean(0)) < 1e-12


def test_d2_finds_the_common_minimum_where_lazy() -> None:
    world = Quadratics(D2Settings(lazy=True), RING, lr=0.3)
    mean = world.x.mean(0)
    for _ in range(250):
        world.run(1)
        mean = mean - 0.3 * world.gradients.mean(0)
        assert off(world.x.mean(0), mean) < 1e-12
        assert float(sum(a._gained for a in world.algorithms).abs().max()) < 1e-13
    assert off(world.x, world.b.mean(0)) < 1e-12


def test_d2_is_its_formula() -> None:
    world = Quadratics(D2Settings(lazy=True), RING, lr=0.2)
    world.run(6)
    half = (EYE + W) / 2
    before = torch.zeros_like(world.b)
    x = half @ (before + 0.2 * world.b)
    for _ in range(5):
        x, before = half @ (2 * x - before - 0.2 * (x - before)), x
    assert off(world.x, x) < 1e-15


def test_d2_refuses_where_it_would_diverge() -> None:
    heavy = Always(mixing_of(8, [(i, (i + 1) % 8) for i in range(8)], 0.4))
    for graph, smallest in ((RING, "-0.3333"), (heavy, "-0.6000")):
        with pytest.raises(ValueError, match=rf"method\.algorithm\.lazy: false .*{smallest}.*lazy: true"):
            Quadratics(D2Settings(), graph)
    with pytest.raises(ValueError, match=r"method\.graph: always the same is directed.*gradient_tracking"):
        Quadratics(D2Settings(), Always(digraph(5, 1)))

    class Unchecked(D2Settings):
        def build(self, parts):
            return D2(parts.replica, mixer_of(parts))

    world = Quadratics(Unchecked(), heavy, lr=0.1)
    world.run(120)
    assert float(world.x.abs().max()) > 1e6


def test_lazy_mixing_is_half_way_to_none() -> None:
    assert np.allclose(lazy(ring(8)).matrix(), (np.eye(8) + ring(8).matrix()) / 2, atol=1e-16)


def test_decentlam_has_the_fixed_point_of_no_momentum() -> None:
    lr, beta = 0.2, 0.6
    world = Quadratics(DecentLaMSettings(), RING, lr=lr, momentum=beta)
    world.run(110)
    without = torch.linalg.solve(EYE - (1 - lr) * W, lr * W @ world.b)
    assert off(world.x, without) < 1e-12

    usual = Quadratics(DPSGDSettings(), RING, lr=lr, momentum=beta)
    usual.run(110)
    effective = lr / (1 - beta)
    assert off(usual.x, torch.linalg.solve(EYE - W + effective * W, effective * W @ world.b)) < 1e-12
    mean = world.b.mean(0)
    assert float((usual.x - mean).pow(2).sum()) > 2 * float((world.x - mean).pow(2).sum())


def test_decentlam_at_a_learning_rate_of_zero_averages() -> None:
    start = list(torch.arange(30.0, dtype=torch.float64).view(6, 5))
    world = Quadratics(DecentLaMSettings(), RING, lr=0.0, momentum=0.9, start=start)
    world.run(1)
    assert off(world.x, W @ torch.stack(start)) < 1e-14
    assert off(world.momenta[3], world.gradients[3]) == 0.0


def test_noloco_without_momentum_is_the_mean_and_with_it_is_its_formula() -> None:
    start = list(torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))
    plain = Quadratics(NoLoCoSettings(momentum=0.0, lr=1.0, pull=1.0), COMPLETE, start=start)
    plain.run(3, exchange_every=3)
    local = plain.b + 0.9**3 * (torch.stack(start) - plain.b)
    assert off(plain.x, local.mean(0)) < 1e-15

    graph = MatchingSettings().build(4, seed=5)
    world = Quadratics(NoLoCoSettings(), graph, start=start)
    world.run(12, exchange_every=3)
    slow, m = torch.stack(start), torch.zeros(4, 5, dtype=torch.float64)
    for round in range(4):
        pairs = torch.from_numpy(graph.mixing(round).matrix())
        changed = world.b + 0.9**3 * (slow - world.b) - slow
        m = 0.5 * m + 0.7 * pairs @ changed + 0.7 * (pairs @ slow - slow)
        slow = slow + m
    assert off(world.x, slow) < 1e-14


def test_noloco_knows_when_pairs_diverge() -> None:
    """The moments of disagreement after rounds of random pairs, against 4000 draws; and what they decide."""
    chance = np.random.Generator(np.random.Philox(key=[0, 1]))
    for n in (7, 8):
        trials, moments = 4000, np.array([1.0, 0.0, 0.0])
        phi = chance.normal(size=(trials, n))
        phi -= phi.mean(1, keepdims=True)
        phi /= np.sqrt((phi**2).mean())
        m = np.zeros_like(phi)
        for _ in range(6):
            order = np.argsort(chance.random((trials, n)), axis=1)
            partner = np.tile(np.arange(n), (trials, 1))
            left, right = order[:, 0 : n - n % 2 : 2], order[:, 1:n:2]
            np.put_along_axis(partner, left, right, 1)
            np.put_along_axis(partner, right, left, 1)
            m = 0.5 * m + 0.7 * (np.take_along_axis(phi, partner, 1) - phi) / 2
            phi = phi + m
            moments = pair_moments(0.5, 0.7, n) @ moments
            measured = np.array([(phi**2).mean(), (phi * m).mean(), (m**2).mean()])
            assert np.abs(measured - moments).max() < 0.04 * moments[0] + 0.004
    matching = MatchingSettings().build(8, seed=0)
    Quadratics(NoLoCoSettings(momentum=0.8, pull=0.8), matching)
    with pytest.raises(ValueError, match=r"method\.algorithm\.pull: 0\.9 with momentum 0\.8.*a pull below 0\.8129"):
        Quadratics(NoLoCoSettings(momentum=0.8, pull=0.9), matching)
    with pytest.raises(ValueError, match=r"a pull below 2\.25,"):
        Quadratics(NoLoCoSettings(pull=2.3), RING)


def test_slowmo_is_its_formula_and_without_momentum_the_average() -> None:
    world = Quadratics(SlowMoSettings(every=3, momentum=0.6, lr=0.9), RING)
    plain = Quadratics(SlowMoSettings(every=3, momentum=0.0), RING)
    x = slow = torch.zeros_like(world.b)
    u = torch.zeros(5, dtype=torch.float64)
    for _ in range(4):
        for _ in range(3):
            x = W @ (x - 0.1 * (x - world.b))
        u = 0.6 * u + (slow[0] - x.mean(0)) / 0.1
        slow = x = (slow[0] - 0.9 * 0.1 * u).expand(6, 5)
        world.run(3)
        assert off(world.x, x) < 1e-14
        assert all(torch.equal(row, world.x[0]) for row in world.x)

        plain.run(2)
        before = plain.x
        plain.run(1)
        assert off(plain.x, (W @ (before - 0.1 * (before - plain.b))).mean(0)) < 1e-15


def test_slowmo_weighs_the_average_by_pushed_mass() -> None:
    world = Quadratics(SlowMoSettings(every=4, momentum=0.0), Always(digraph(5, 1)))
    world.run(3)
    before, mass = world.x, world.mass
    world.run(1)
    local = before - 0.1 * (before - world.b)
    assert off(world.x, (mass[:, None] * local).sum(0) / 5) < 1e-14


def test_slowmo_of_ones_own_weights_needs_nobody_and_moves_the_mean_as_one() -> None:
    world = Quadratics(SlowMoSettings(every=3, momentum=0.6, average="own"), RING)
    mean = slow = world.x.mean(0)
    u = torch.zeros_like(mean)
    for _ in range(5):
        for _ in range(3):
            mean = mean - 0.1 * (mean - world.b.mean(0))
        u = 0.6 * u + (slow - mean) / 0.1
        slow = mean = slow - 0.1 * u
        world.run(3)
        assert off(world.x.mean(0), mean) < 1e-14
    assert off(world.x, mean) > 1e-3  # they differ all the same


def test_slowmo_at_a_learning_rate_of_zero_averages_and_keeps_its_momentum() -> None:
    world = Quadratics(SlowMoSettings(every=2), RING)
    world.run(4)
    kept = world.algorithms[0]._momentum.clone()
    for replica in world.replicas:
        replica.lr = 0.0
    world.lr = 0.0
    mean = world.x.mean(0)
    world.run(2)
    assert off(world.x, mean) < 1e-15
    assert torch.equal(world.algorithms[0]._momentum, kept)


def test_slowmo_refuses_a_run_without_a_slow_step() -> None:
    world = Quadratics(DPSGDSettings(), RING)
    parts = Parts(world.replicas[0], world.simulation.ports[0], RING, 1.0, 0, steps=47)
    with pytest.raises(ValueError, match=r"method\.algorithm\.every: 48 in a run of 47 steps.*give 47 or less"):
        SlowMoSettings().build(parts)
    SlowMoSettings(every=47).build(parts)


def unlike(sizes: tuple[int, ...]) -> list[Tensor]:
    return list(torch.randn(4, sum(sizes), dtype=torch.float64, generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("follow", ["conservative", "others", "self"])
def test_variance_correction_gives_averages_the_variance_of_what_went_in(follow: str) -> None:
    sizes = (4000, 1, 300)
    start = unlike(sizes)
    for x in start:
        x[4001:4101] *= 3.0  # one tensor of another spread
    world = Quadratics(
        VarianceCorrectedSettings(follow=follow), COMPLETE, lr=0.0, numel=sum(sizes), sizes=sizes, start=start
    )
    world.run(1)
    average = torch.stack(start).mean(0)
    for part in (slice(0, 4000), slice(4001, 4301)):
        each = torch.stack([x[part].var() for x in start])
        others = torch.stack([(each.sum() - v) / 3 for v in each])
        target = {"conservative": each.mean().expand(4), "others": others, "self": each}[follow]
        got = world.x[:, part]
        assert off(got.var(dim=1), target) < 1e-13
        assert off(got.mean(1), average[part].mean().expand(4)) < 1e-15
        assert float((average[part].var() / target).max()) < 0.4  # it would have been a quarter
    assert off(world.x[:, 4000], average[4000].expand(4)) < 1e-15
    assert world.algorithms[0].metrics()["corrected"] == 2.0
    assert 1.9 < world.algorithms[0].metrics()["largest_factor"] < 2.1


def test_variance_correction_leaves_alike_machines_and_constant_tensors_alone_and_ends() -> None:
    sizes = (40, 20)
    same = [torch.cat([unlike((40,))[0], torch.zeros(20, dtype=torch.float64)])] * 4
    settings: list[AlgorithmSettings] = [VarianceCorrectedSettings(rounds=3), DPSGDSettings()]
    corrected, plain = (Quadratics(s, COMPLETE, lr=0.01, numel=60, sizes=sizes, start=same) for s in settings)
    for world in (corrected, plain):
        world.b[:, 40:] = 0.0
        world.run(5)
    assert torch.equal(corrected.x, plain.x)
    assert corrected.algorithms[0].metrics()["corrected"] == 0.0

    over = Quadratics(VarianceCorrectedSettings(rounds=0), COMPLETE, lr=0.0, numel=60, sizes=sizes, start=unlike(sizes))
    over.run(1)
    assert off(over.x, torch.stack(unlike(sizes)).mean(0)) < 1e-15


@pytest.mark.parametrize(
    ("settings", "moved"),
    [
        (GradientTrackingSettings(), 0.0),  # statistics are given no gradient
        (DecentLaMSettings(), 0.0),
        (D2Settings(lazy=True), 1.0),
        (NoLoCoSettings(), 1.0),
        (SlowMoSettings(every=3), 1.0),
        (VarianceCorrectedSettings(), 1.0),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_statistics_are_averaged_as_they_are(settings: AlgorithmSettings, moved: float) -> None:
    start = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    world = Quadratics(settings, RING, sizes=(1, 2), start=list(start))
    without = Quadratics(settings, RING, sizes=(1, 2), start=list(start[:, :3]), numel=3)
    without.b = world.b[:, :3]
    mixing = (EYE + W) / 2 if settings.kind == "d2" else W
    statistics = start[:, 3:]
    for step in range(5):
        statistics = mixing @ (statistics - moved * 0.1 * (statistics - world.b[:, 3:]))
        if settings.kind == "slowmo" and step == 2:
            statistics = statistics.mean(0).expand(6, 2)
        world.run(1)
        without.run(1)
        assert off(world.x[:, 3:], statistics) < 1e-14
        assert off(world.x[:, :3], without.x) < 1e-14


def test_rounding_to_fp32_does_not_add_up() -> None:
    """Neither of three weights of 1/3, which are more than 1 in fp32; nor in what D2 adds in every later step."""
    for count in (2, 3, 6, 7):
        weights = summing_to_one([1 / count] * count, 1, torch.float32)
        assert weights == torch.tensor(weights, dtype=torch.float32).tolist()
        assert sum(weights) == 1.0
        assert max(weights) - min(weights) < 2e-6
    start = list(3 + torch.randn(6, 1000, generator=torch.Generator().manual_seed(6)))
    before = torch.stack(start).double().mean(0)
    averaging = Quadratics(DPSGDSettings(), RING, lr=0.0, numel=1000, start=start, dtype=torch.float32)
    averaging.run(60)
    assert abs(float(averaging.x.double().mean() - before.mean())) < 1e-6
    drawn = Quadratics(D2Settings(lazy=True), RING, lr=1e-3, numel=1000, start=start, dtype=torch.float32)
    drawn.run(100)
    gained = torch.stack([algorithm._gained for algorithm in drawn.algorithms]).double().mean(0)
    assert float(gained.abs().max()) < 1e-7
