"""CHOCO and SPARTA: exact means through lateness, steps that neither crawl nor diverge, payloads, damage, resuming."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from gossip_posts import place_for, run_scripts
from gossip_quadratics import Quadratics
from gossip_worlds import Always, Late, mixing_of, ring
from pydantic import ValidationError
from torch import Tensor

import thinwire as tw
from thinwire.comm.compress.compressor import Compressor
from thinwire.comm.gossip.algorithm import Parts
from thinwire.comm.gossip.algorithms.choco import ChocoSettings, default_gamma
from thinwire.comm.gossip.algorithms.choco_codec import ChocoCodec
from thinwire.comm.gossip.algorithms.dpsgd import DPSGDSettings
from thinwire.comm.gossip.algorithms.sparta import SpartaSettings, SubsetCodec
from thinwire.comm.gossip.codec import Plain
from thinwire.comm.gossip.port import Port, Script
from thinwire.comm.gossip.replica import VectorReplica
from thinwire.comm.gossip.simulation import Simulation
from thinwire.comm.gossip.turn import Turn
from thinwire.comm.wire import PayloadError

SIDES = [((4 * r + c, 4 * r + (c + 1) % 4), (4 * r + c, 4 * ((r + 1) % 4) + c)) for r in range(4) for c in range(4)]
TORUS = Always(mixing_of(16, [edge for pair in SIDES for edge in pair], 1 / 5))


def normal(n: int, numel: int, seed: int = 0) -> Tensor:
    return torch.randn(n, numel, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def consensus(settings: Any, graph: Always, start: Tensor, **more: Any) -> Quadratics:
    """Machines that do nothing but average."""
    return Quadratics(settings, graph, lr=0.0, numel=start.shape[1], start=list(start), dtype=start.dtype, **more)


def spread(world: Quadratics) -> float:
    """Consensus distance."""
    return float((world.x - world.x.mean(0)).square().sum(1).mean())


def settle(world: Quadratics) -> None:
    """Until what is overdue has come, each drain waits for a deadline."""
    for _ in range(4):
        world.drain()


def in_disorder(source: int, to: int, count: int) -> float:
    """Now and then a message comes rounds after its deadline."""
    return 2.7 if (source * 5 + to * 3 + count) % 7 == 0 else 0.01


@pytest.mark.parametrize(
    ("compressor", "overlap"),
    [
        (tw.TopK(density=0.05), False),
        (tw.TopK(density=0.05), True),
        (tw.RandK(density=0.1, values="int8"), True),
        (tw.Sign(block=64), False),
        ("int4", True),
    ],
)
def test_the_mean_is_exact_whatever_is_left_out_or_late(compressor: Any, overlap: bool) -> None:
    settings = ChocoSettings(compressor=compressor, gamma=0.2, overlap=overlap)
    world = Quadratics(settings, Always(ring(6)), lr=0.1, numel=100, links=Late(in_disorder))
    mean = world.x.mean(0)
    for _ in range(18):
        world.run(1)
        mean = mean - 0.1 * world.gradients.mean(0)
    settle(world)
    assert world.algorithms[0].metrics()["late"] > 0
    torch.testing.assert_close(world.x.mean(0), mean, rtol=0, atol=1e-14)
    assert 0 < spread(world) < float((world.b - world.b.mean(0)).square().sum(1).mean())


def test_the_mean_in_fp32_is_kept_to_a_millionth() -> None:
    start = normal(6, 500).float()
    world = consensus(ChocoSettings(compressor=tw.TopK(density=0.1)), Always(ring(6)), start)
    world.run(25)
    drift = world.x.double().mean(0) - start.double().mean(0)
    assert float(drift.norm() / start.double().norm(dim=1).mean()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_identity_with_step_size_one_is_plain_gossip_to_the_bit(dtype: torch.dtype) -> None:
    runs = []
    for settings in (ChocoSettings(compressor="none", gamma=1.0), DPSGDSettings()):
        world = Quadratics(settings, TORUS, numel=33, dtype=dtype, links=Late(in_disorder))
        world.run(12)
        runs.append(world.x)
    assert torch.equal(runs[0], runs[1])


def test_with_nothing_left_out_copies_that_begin_at_the_weights_are_plain_gossip() -> None:
    start = normal(1, 40).expand(6, 40)
    runs = []
    for settings in (ChocoSettings(compressor=tw.TopK(density=1.0), gamma=1.0, adapt=False), DPSGDSettings()):
        world = Quadratics(settings, Always(ring(6)), numel=40, start=list(start))
        world.run(10)
        runs.append(world.x)
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=1e-7)  # differences travel in fp32


def reference(start: Tensor, w: Tensor, compressor: Compressor, gamma: float, rounds: int) -> Tensor:
    """Algorithm 1 of the paper, from copies of zero, for a top-k whose values are whole."""
    x, hat = start.clone(), torch.zeros_like(start)
    k = round(compressor.density * start.shape[1])  # type: ignore[attr-defined]
    for _ in range(rounds):
        places = (x - hat).float().abs().topk(k, dim=1).indices
        hat.scatter_add_(1, places, (x - hat).float().double().gather(1, places))
        x = x + gamma * (w @ hat - hat)
    return x


def test_it_is_its_formula() -> None:
    start, compressor = normal(9, 60), tw.TopK(density=0.1)
    world = consensus(
        ChocoSettings(compressor=compressor, gamma=0.15, adapt=False, start="zero"), Always(ring(9)), start
    )
    world.run(25)
    w = torch.from_numpy(ring(9).matrix())
    torch.testing.assert_close(world.x, reference(start, w, compressor, 0.15, 25), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("density", "good", "bad"), [(0.05, 0.1, 0.5), (0.1, 0.2, 0.5), (0.5, 1.0, None)])
def test_the_table_of_stable_step_sizes(density: float, good: float, bad: float | None) -> None:
    w, start, compressor = torch.from_numpy(ring(9).matrix()), normal(9, 200), tw.TopK(density=density)
    before = float((start - start.mean(0)).square().sum())
    for gamma in (good, default_gamma(compressor, 200)):
        x = reference(start, w, compressor, gamma, 300)
        assert float((x - x.mean(0)).square().sum()) < 1e-3 * before, gamma
    if bad is not None:
        x = reference(start, w, compressor, bad, 300)
        assert float((x - x.mean(0)).square().sum()) > before


def test_random_entries_need_a_smaller_step() -> None:
    start = normal(5, 50)
    ends = []
    for gamma in (None, 0.6):
        settings = ChocoSettings(compressor=tw.RandK(density=0.2), gamma=gamma, adapt=False, start="zero")
        world = consensus(settings, Always(ring(5)), start)
        world.run(40)
        ends.append(spread(world) / float((start - start.mean(0)).square().sum(1).mean()))
    assert ends[0] < 0.3
    assert ends[1] > 1


def test_a_step_size_that_diverges_is_found_out_and_one_that_does_not_is_left_alone() -> None:
    start, compressor = normal(5, 50), tw.TopK(density=0.1)
    x = reference(start, torch.from_numpy(ring(5).matrix()), compressor, 1.0, 80)
    assert float((x - x.mean(0)).square().sum(1).mean()) > 200
    ends = {}
    for gamma, rounds in ((1.0, 80), (0.18, 25)):
        world = consensus(ChocoSettings(compressor=compressor, gamma=gamma, start="zero"), Always(ring(5)), start)
        world.run(rounds)
        ends[gamma] = spread(world), [algorithm.metrics()["gamma"] for algorithm in world.algorithms]
    assert ends[1.0][0] < float((start - start.mean(0)).square().sum(1).mean())
    assert min(ends[1.0][1]) < 0.7  # which is that of its edges
    assert ends[0.18][1] == [0.18] * 5


@pytest.mark.parametrize(
    ("compressor", "expected"),
    [
        ("none", 1.0),
        ("bf16", 1.0),
        ("int8", 1.0),
        (tw.TopK(density=0.02), 0.036),
        (tw.RandK(k=20), 0.01),
        ("sign", 0.45),
    ],
)
def test_default_step_sizes(compressor: Any, expected: float) -> None:
    settings = ChocoSettings(compressor=compressor)
    assert default_gamma(settings.compressor, 1000) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"compressor": "lowrank"}, "matrices"),
        ({"compressor": {"kind": "topk", "scope": "tensor"}}, "compressor.scope"),
        ({"compressor": "fp16"}, "give gamma"),
        ({"gamma": 1.5}, "less than or equal to 1"),
        ({"kind": "choco", "gamme": 0.1}, "Extra inputs"),
    ],
)
def test_what_cannot_be_used_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ChocoSettings(**given)
    ChocoSettings(compressor="fp16", gamma=0.5)


def test_other_neighbours_in_another_round_are_refused() -> None:
    world = Quadratics(ChocoSettings(), Always(ring(4)), numel=50)
    world.run(1)
    world.graph = Always(mixing_of(4, [(0, 1), (2, 3)], 0.5))
    with pytest.raises(ValueError, match=r"method\.algorithm: choco needs the same neighbours"):
        world.run(1)


@pytest.mark.parametrize("settings", [ChocoSettings(compressor="int8"), SpartaSettings(density=0.03, wire="bf16")])
def test_bytes_are_as_predicted(settings: Any) -> None:
    world = Quadratics(settings, Always(ring(5)), numel=700)
    world.run(4)
    for port, predicted in zip(world.simulation.ports, world.predicted, strict=True):
        assert dict(port.sent_bytes) == predicted
        assert predicted
    each = (4 + 3 * 4 + 700) if isinstance(settings, ChocoSettings) else 21 * 2
    assert world.predicted[0][1] == 4 * each


@pytest.mark.parametrize(
    "settings",
    [
        ChocoSettings(compressor=tw.RandK(density=0.1), overlap=True, gamma=0.9),
        ChocoSettings(compressor=tw.TopK(density=0.05, values="int8_stochastic")),
        SpartaSettings(density=0.1, overlap=True),
    ],
)
def test_a_run_resumed_from_a_cut_is_the_run_that_went_on(settings: Any) -> None:
    def world() -> Quadratics:
        return Quadratics(settings, Always(ring(5)), numel=80, momentum=0.9)

    first = world()
    first.run(12)
    first.drain()
    state = first.state()
    first.run(8)
    second = world()
    second.load(state, 12)
    second.run(8)
    assert torch.equal(first.x, second.x)


def test_after_a_merge_copies_begin_from_the_average() -> None:
    world = Quadratics(ChocoSettings(compressor=tw.TopK(density=0.05)), Always(ring(4)), numel=100)
    world.run(30)
    world.drain()
    world.merge()
    mean = world.x.mean(0)
    world.run(1)
    mean = mean - 0.1 * world.gradients.mean(0)
    torch.testing.assert_close(world.x.mean(0), mean, rtol=0, atol=1e-14)
    # Nothing but the one local step is left to say.
    assert world.algorithms[0].metrics()["residual"] < 0.1 * float(world.gradients[0].norm())


@pytest.mark.parametrize("start", ["weights", "zero"])
def test_machines_that_lack_a_copy_are_given_the_weights_and_the_mean_stays(start: Any) -> None:
    """Unequal weights at the start; and one machine that was left out of a merge."""
    begin = normal(5, 60)
    world = consensus(ChocoSettings(compressor=tw.TopK(density=0.1), start=start), Always(ring(5)), begin)
    world.run(20)
    torch.testing.assert_close(world.x.mean(0), begin.mean(0), rtol=0, atol=1e-14)
    assert spread(world) < 0.2 * float((begin - begin.mean(0)).square().sum(1).mean())
    average = world.x[:4].mean(0)
    for rank in range(4):
        world.replicas[rank].set_weights(average)
        world.algorithms[rank].merged()
    mean = world.x.mean(0)
    before = spread(world)
    world.run(40)
    torch.testing.assert_close(world.x.mean(0), mean, rtol=0, atol=1e-14)
    assert spread(world) < 0.2 * before


def test_a_machine_that_comes_back_is_taken_in_without_moving_the_mean() -> None:
    settings = ChocoSettings(compressor=tw.TopK(density=0.1), gamma=0.15)
    world = consensus(settings, Always(ring(5)), normal(1, 60).expand(5, 60) + 0.1 * normal(5, 60, 1))
    world.run(8)
    world.drain()
    world.kill(2)
    world.run(3)
    port = world.simulation.revive(2)
    world.replicas[2].set_weights(world.replicas[1].x)
    world.algorithms[2] = settings.build(Parts(world.replicas[2], port, world.graph, 1.0, 0))
    world.alive.append(2)
    world.alive.sort()
    for rank in (1, 2):  # as a machine that enters and its donor have it
        world.algorithms[rank].hold(0.5)
    held, before = (world.mass[:, None] * world.x).sum(0), spread(world)
    world.run(40)
    torch.testing.assert_close((world.mass[:, None] * world.x).sum(0), held, rtol=0, atol=1e-13)
    assert world.mass.tolist() == [1, 0.5, 0.5, 1, 1]
    assert spread(world) < 0.05 * before


@pytest.mark.parametrize("settings", [ChocoSettings(compressor=tw.TopK(density=0.1)), SpartaSettings(density=0.2)])
def test_over_tcp_it_gives_the_bits_of_the_simulation(settings: Any) -> None:
    graph, b = Always(ring(3)), normal(3, 50, 4).float()

    def train(port: Port, replica: VectorReplica) -> Script[None]:
        algorithm = settings.build(Parts(replica, port, graph, 30.0, 0))
        for step in range(12):
            replica.x = replica.x - 0.1 * (replica.x - b[port.rank])
            yield from algorithm.after_step(Turn(step, step, graph.mixing(step)))
        yield from algorithm.drain()

    def ends(ports: Sequence[Any], run: Callable[[list[Script[None]]], object]) -> Tensor:
        replicas = [VectorReplica(torch.zeros(50)) for _ in ports]
        run([train(port, replica) for port, replica in zip(ports, replicas, strict=True)])
        return torch.stack([replica.x for replica in replicas])

    simulation = Simulation(3)
    with place_for(3) as place:
        posts = place.enter_all()
        over_tcp = ends(posts, lambda scripts: run_scripts(posts, scripts))
    assert torch.equal(over_tcp, ends(simulation.ports, simulation.run))


CODECS: dict[str, Callable[[], Any]] = {
    "topk": lambda: ChocoCodec(tw.TopK(density=0.1), rank=0, seed=1, start=torch.zeros(60)),
    "int8": lambda: ChocoCodec(tw.Int8(), rank=0, seed=1, start=torch.zeros(60)),
    "sparta": lambda: SubsetCodec(0.2, 1, Plain()),
}


@pytest.mark.parametrize("name", CODECS)
def test_damaged_payloads_are_refused_or_decoded_to_finite_vectors(
    name: str, mutations: Callable[[Tensor], Iterator[Tensor]]
) -> None:
    value = torch.randn(60, generator=torch.Generator().manual_seed(0))
    difference, _ = CODECS[name]().encode(0, value)
    whole, _ = CODECS[name]().encode(7, value)  # of a machine that enters late
    codec = CODECS[name]()
    for intact in (difference, whole):
        for payload in mutations(intact):
            try:
                decoded = codec.decode(3, 0, payload, value)
            except PayloadError:
                continue
            assert decoded.shape == value.shape
            if name != "sparta":
                assert bool(decoded.isfinite().all())


def test_sparta_averages_a_random_set_and_nothing_else() -> None:
    start = normal(6, 200)
    world = consensus(SpartaSettings(density=0.05), Always(ring(6)), start)
    w = torch.from_numpy(ring(6).matrix())
    touched = torch.zeros(200)
    x = start
    for _ in range(40):
        world.run(1)
        changed = (world.x != x).any(0)
        assert int(changed.sum()) == 10
        torch.testing.assert_close(world.x[:, changed], (w @ x)[:, changed], rtol=0, atol=1e-14)
        touched += changed
        x = world.x
    assert float(touched.std()) < 2.2  # binomial of 40 draws at 1/20: 1.38
    assert int((touched == 0).sum()) < 60  # 200 * 0.95^40 = 26


def test_sparta_keeps_the_mean_when_rounds_come_late() -> None:
    world = Quadratics(SpartaSettings(density=0.3), TORUS, numel=40, links=Late(in_disorder))
    mean = world.x.mean(0)
    for _ in range(20):
        world.run(1)
        mean = mean - 0.1 * world.gradients.mean(0)
    settle(world)
    assert sum(a.metrics()["late"] for a in world.algorithms) > 0
    torch.testing.assert_close(world.x.mean(0), mean, rtol=0, atol=1e-14)
