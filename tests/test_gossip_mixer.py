"""Rounds among neighbours: the exact mean through lateness, skips, deaths and masses; the limits of D-PSGD."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from gossip_worlds import Always, Late, mixing_of, quiet, ring, run_each, vectors
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from thinwire.comm.gossip.algorithm import Parts
from thinwire.comm.gossip.algorithms.dpsgd import DPSGDSettings
from thinwire.comm.gossip.barrier import barrier
from thinwire.comm.gossip.codec import Codec, Plain
from thinwire.comm.gossip.mixer import SymmetricMixer
from thinwire.comm.gossip.mixing import Mixing
from thinwire.comm.gossip.port import Script
from thinwire.comm.gossip.replica import VectorReplica
from thinwire.comm.gossip.simulation import Instant, Links, Simulation, pause
from thinwire.comm.gossip.turn import Turn
from thinwire.comm.wire import PayloadError

DEADLINE_S = 1.0


class Machines:
    """A world of mixers. Every number is a multiple of a power of two, so sums are exact and compared with ==."""

    def __init__(self, values: Sequence[float], links: Links | None = None, codec: Any = Plain) -> None:
        self.simulation = Simulation(len(values), links or Instant())
        self.x = vectors(values)
        self.mixers = [SymmetricMixer(port, codec(), deadline_s=DEADLINE_S) for port in self.simulation.ports]

    def round(self, rank: int, number: int, mixing: Mixing, step: float = 0.0, compute_s: float = 0.0) -> Script[None]:
        """Send, take a local step of `step` meanwhile, and add what the round has brought."""
        mixer = self.mixers[rank]
        mixer.begin(number, mixing, self.x[rank])
        self.x[rank] = self.x[rank] + step
        if compute_s:
            yield pause(self.simulation.now_s, compute_s)
        mixed = yield from mixer.finish()
        self.x[rank] = mixed.onto(self.x[rank])

    def cut(self, rank: int, number: int) -> Script[None]:
        """Drain, barrier, drain."""
        yield from self.settle(rank)
        yield from barrier(self.simulation.ports[rank], number, deadline_s=1e3)
        yield from self.settle(rank)

    def settle(self, rank: int) -> Script[None]:
        late = yield from self.mixers[rank].settle()
        if late is not None:
            self.x[rank] = late.onto(self.x[rank])

    def total(self) -> float:
        """sum of m x."""
        return float(sum(float(x) * mixer.mass for x, mixer in zip(self.x, self.mixers, strict=True)))


class Differences:
    """A codec with a memory: a payload is the difference from the sender's last one; none may be missed."""

    remembers = True

    def __init__(self) -> None:
        self._sent = 0.0
        self._known: dict[int, tuple[int, Tensor]] = {}
        self._count = 0

    def encode(self, round: int, value: Tensor) -> tuple[Tensor, Tensor]:
        payload = torch.tensor([float(self._count), float(value) - self._sent], dtype=torch.float64)
        self._count += 1
        self._sent = float(value)
        return payload.view(torch.uint8), value.clone()

    def decode(self, source: int, round: int, payload: Tensor, like: Tensor) -> Tensor:
        count, difference = payload.view(torch.float64).tolist()
        seen, known = self._known.get(source, (0, torch.zeros_like(like)))
        assert count == seen, f"payload {count} of {source} comes after {seen - 1}"
        self._known[source] = (seen + 1, known + difference)
        return known + difference

    def payload_bytes(self, numel: int, itemsize: int) -> int | None:
        return 16

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        """Nothing."""


def test_a_round_is_the_mixing_matrix() -> None:
    mixing = mixing_of(4, [(0, 1), (1, 2), (2, 3), (0, 2)], 0.25)
    machines = Machines([1, 20, -7, 64])
    run_each(machines.simulation, lambda rank: machines.round(rank, 0, mixing, step=2.0**rank))
    expected = mixing.matrix() @ [1, 20, -7, 64] + [1, 2, 4, 8]  # local steps come on top, unmixed
    assert [float(x) for x in machines.x] == expected.tolist()


def test_partners_of_a_pair_become_equal_bit_for_bit() -> None:
    chance = torch.Generator().manual_seed(3)
    values = [torch.randn(1000, generator=chance) for _ in range(2)]
    simulation = Simulation(2)
    results: list[Tensor] = [torch.empty(0), torch.empty(0)]

    def script(rank: int) -> Script[None]:
        mixer = SymmetricMixer(simulation.ports[rank], Plain(), deadline_s=1.0)
        mixer.begin(0, mixing_of(2, [(0, 1)], 0.5), values[rank])
        mixed = yield from mixer.finish()
        results[rank] = mixed.onto(values[rank].clone())

    run_each(simulation, script)
    assert torch.equal(results[0], results[1])


@pytest.mark.parametrize("codec", [Plain, Differences])
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), size=st.integers(2, 6))
def test_the_mean_is_exact_through_lateness_and_local_steps(codec: Any, seed: int, size: int) -> None:
    """A third of the messages come after the deadline, some of them rounds later; other neighbours in each round."""
    rounds = 8
    chance = np.random.default_rng(seed)
    pairs = [(a, b) for a in range(size) for b in range(a)]
    graphs = []
    for _ in range(rounds):
        degrees = [0] * size
        edges = []
        for a, b in (pairs[i] for i in chance.permutation(len(pairs))):
            if degrees[a] < 2 and degrees[b] < 2:
                edges.append((a, b))
                degrees[a], degrees[b] = degrees[a] + 1, degrees[b] + 1
        graphs.append(mixing_of(size, edges, 0.25))
    if codec is Differences:  # one that remembers has to hear each neighbour in every round
        graphs = [graphs[0]] * rounds
    latencies_s = chance.choice(
        [0.0, 0.5, 0.9, 1.1, 2.5, 3.5], p=[0.3, 0.2, 0.15, 0.15, 0.1, 0.1], size=(size, size, 64)
    )
    start = chance.integers(-100, 100, size).astype(float)
    steps = chance.integers(-8, 8, (rounds, size)).astype(float)
    computing_s = chance.choice([0.0, 0.4, 1.3], size=(rounds, size))
    machines = Machines(start.tolist(), Late(lambda a, b, i: float(latencies_s[a, b, i])), codec)

    def script(rank: int) -> Script[None]:
        for t in range(rounds):
            yield from machines.round(rank, t, graphs[t], float(steps[t, rank]), float(computing_s[t, rank]))
        yield from machines.cut(rank, 0)

    run_each(machines.simulation, script)
    assert machines.total() == start.sum() + steps.sum()
    assert [mixer.metrics()["overdue"] for mixer in machines.mixers] == [0] * size
    assert [mixer.mass for mixer in machines.mixers] == [1] * size


@pytest.mark.parametrize("codec", [Plain, Differences])
def test_a_late_edge_is_skipped_by_both_ends_and_made_good(codec: Any) -> None:
    """Machine 0's first message needs 2.5 deadlines: what both do in each round, to the number."""
    machines = Machines([0, 64], Late(lambda a, b, i: 2.5 if (a, i) == (0, 0) else 0.0), codec)
    mixing = mixing_of(2, [(0, 1)], 0.25)
    seen: dict[tuple[int, float], float] = {}

    def script(rank: int) -> Script[None]:
        for t in range(6):
            yield pause(machines.simulation.now_s, 0.5)
            yield from machines.round(rank, t, mixing)
            seen[rank, machines.simulation.now_s] = float(machines.x[rank])

    run_each(machines.simulation, script)
    assert machines.total() == 64
    of_0 = {now_s: x for (rank, now_s), x in seen.items() if rank == 0}
    of_1 = {now_s: x for (rank, now_s), x in seen.items() if rank == 1}
    # Machine 0 hears 1 at once and adds (64 - 0) / 4; then it hears SKIPPED, and no round but the first is late.
    assert of_0 == {0.5: 16.0, 2.0: 16.0, 2.5: 16.0, 3.0: 16.0, 3.5: 24.0, 4.0: 28.0}
    # Machine 1 waits for one deadline, then skips, and takes off what 0 has added once it has come, at 3.0.
    assert of_1 == {1.5: 64.0, 2.0: 64.0, 2.5: 64.0, 3.0: 48.0, 3.5: 40.0, 4.0: 36.0}
    assert [mixer.metrics()["late"] for mixer in machines.mixers] == [0.0, 1.0]


def test_what_is_not_there_when_a_drain_ends_stays_owed() -> None:
    """The first drain of a cut must not give up what the barrier's wait brings."""
    machines = Machines([0, 64, 0], Late(lambda a, b, i: 2.5 if (a, b) == (0, 1) else 0.0))
    mixing = mixing_of(3, [(0, 1), (1, 2)], 0.25)

    def script(rank: int) -> Script[None]:
        yield from machines.round(rank, 0, mixing)
        yield from machines.settle(rank)
        assert rank != 1 or machines.mixers[1].metrics()["overdue"] == 1.0
        yield from machines.cut(rank, 0)

    run_each(machines.simulation, script)
    assert [float(x) for x in machines.x] == [16.0, 32.0, 16.0]


def test_a_neighbour_that_is_silent_delays_by_one_deadline_in_all() -> None:
    machines = Machines([8] * 4, Late(lambda a, b, i: 1e6 if a == 3 else 0.25))
    everyone = mixing_of(4, [(a, b) for a in range(4) for b in range(a)], 0.25)
    ends: dict[int, float] = {}

    def script(rank: int) -> Script[None]:
        for t in range(20):
            yield from machines.round(rank, t, everyone)
        ends[rank] = machines.simulation.now_s

    run_each(machines.simulation, script)
    assert [ends[rank] for rank in range(3)] == [DEADLINE_S + 19 * 0.25] * 3


def test_a_dead_neighbour_takes_its_share_and_no_more() -> None:
    """It dies between its two words: 0 has its vector, 1 has not, and both keep the rest of the mean."""
    machines = Machines([16, 32, 128], Late(lambda a, b, i: 0.5 if (a, b) == (2, 1) else 0.0))
    everyone = mixing_of(3, [(0, 1), (0, 2), (1, 2)], 0.25)
    machines.simulation.at(0.25, lambda: machines.simulation.kill(2))
    ends = []

    def script(rank: int) -> Script[None]:
        yield from machines.round(rank, 0, everyone, compute_s=9.0 if rank == 2 else 0.0)
        for t in range(1, 4):
            yield from machines.round(rank, t, everyone)
        ends.append(machines.simulation.now_s)

    run_each(machines.simulation, script)
    assert machines.x[0] + machines.x[1] == 16 + 32 + 0.25 * (128 - 16)  # the flow that 0 has added, and 2 has not
    assert ends == [0.25, 0.25]  # known to be lost, it is not waited for


def test_masses_weigh_the_mean_and_travel() -> None:
    """A machine with half the mass counts half; a donor that halves its mass amid a round keeps sum m z."""
    machines = Machines([8, -24, 40, 8])
    for mixer, mass in zip(machines.mixers, (1.0, 2.0, 0.5, 0.25), strict=True):
        mixer.mass = mass
    everyone = mixing_of(4, [(a, b) for a in range(4) for b in range(a)], 0.25)
    total = machines.total()
    run_each(machines.simulation, lambda rank: machines.round(rank, 0, everyone))
    assert [mixer.mass for mixer in machines.mixers] == [3.75 / 4] * 4
    assert [float(x) for x in machines.x] == pytest.approx([total / 3.75] * 4, rel=1e-15)

    path = mixing_of(4, [(0, 1), (1, 2)], 0.25)
    machines.x = vectors([8, -24, 40, 0])

    def script(rank: int) -> Script[None]:
        mixer = machines.mixers[rank]
        mixer.begin(1, path, machines.x[rank])
        if rank == 1:  # a joiner takes half of it, in machine 3's place
            mixer.mass = mixer.mass / 2
            machines.mixers[3].mass = mixer.mass
            machines.x[3] = machines.x[1].clone()
        mixed = yield from mixer.finish()
        if rank != 3:
            machines.x[rank] = mixed.onto(machines.x[rank])

    machines.mixers[3].mass = 0.0
    total = machines.total()
    run_each(machines.simulation, script)
    assert machines.total() == pytest.approx(total, rel=1e-15)
    assert sum(mixer.mass for mixer in machines.mixers) == pytest.approx(3 * 3.75 / 4, rel=1e-15)


def test_rounding_on_the_wire_leaves_the_mean_alone() -> None:
    chance = torch.Generator().manual_seed(5)
    values = [torch.randn(64, generator=chance, dtype=torch.float64) for _ in range(6)]
    machines = Machines([0.0] * 6, codec=lambda: Plain(torch.bfloat16))
    machines.x = [value.clone() for value in values]
    before = torch.stack(values).mean(0)

    def script(rank: int) -> Script[None]:
        for t in range(10):
            yield from machines.round(rank, t, ring(6))

    run_each(machines.simulation, script)
    assert torch.allclose(torch.stack(machines.x).mean(0), before, rtol=0, atol=1e-15)
    assert machines.simulation.ports[0].sent_bytes == {1: 10 * 64 * 2, 5: 10 * 64 * 2}
    assert machines.mixers[0].sent_bytes(ring(6), 64, 8) == {1: 128, 5: 128}


def test_plain_refuses_other_lengths() -> None:
    like = torch.zeros(3)
    with pytest.raises(PayloadError, match="a vector of 3 elements takes 12 bytes, not 8"):
        Plain().decode(0, 0, torch.zeros(8, dtype=torch.uint8), like)
    with pytest.raises(PayloadError, match="takes 6 bytes, not 12"):
        Plain(torch.bfloat16).decode(0, 0, torch.zeros(12, dtype=torch.uint8), like)


# D-PSGD on f_i = |x - b_i|^2 / 2: known limits for any W.

RATE = 0.25


def train(graph: Mixing, targets: np.ndarray[Any, Any], steps: int, **how: Any) -> tuple[np.ndarray[Any, Any], float]:
    """(where the machines end, the largest error of the invariant of their mean over all steps)."""
    simulation = Simulation(len(targets))
    replicas = [VectorReplica(x, lr=RATE) for x in vectors([0.0] * len(targets))]
    turns = [Turn(t, t, graph) for t in range(steps)]
    means = np.zeros((steps, len(targets), 2))  # of each step, x before it and its gradient

    def script(rank: int) -> Script[None]:
        parts = Parts(replicas[rank], simulation.ports[rank], Always(graph), 1.0, 0)
        algorithm = DPSGDSettings(**how).build(parts)
        replica = replicas[rank]
        for turn in turns:
            gradient = replica.x - targets[rank]
            means[turn.step, rank] = float(replica.x), float(gradient)
            yield from algorithm.before_step(turn)
            replica.x = replica.x - RATE * gradient
            yield from algorithm.after_step(turn)

    run_each(simulation, script)
    x, g = means.mean(1).T
    return np.array([float(replica.x) for replica in replicas]), float(np.abs(x[1:] - (x[:-1] - RATE * g[:-1])).max())


@pytest.mark.parametrize("graph", [ring(8), mixing_of(5, [(0, 1), (1, 2), (1, 3), (3, 4)], 0.2)], ids=["ring", "tree"])
def test_dpsgd_reaches_the_fixed_points_of_both_orders(graph: Mixing) -> None:
    w = graph.matrix()
    unit = np.eye(len(w))
    b = np.random.default_rng(1).standard_normal(len(w))
    adapt_then_combine, drift = train(graph, b, 130)
    expected = np.linalg.solve(unit - (1 - RATE) * w, RATE * w @ b)
    np.testing.assert_allclose(adapt_then_combine, expected, atol=1e-14)
    combine_then_adapt, drift_overlapped = train(graph, b, 130, overlap=True)
    expected = np.linalg.solve((1 + RATE) * unit - w, RATE * b)
    np.testing.assert_allclose(combine_then_adapt, expected, atol=1e-14)
    assert max(drift, drift_overlapped) < 1e-15


def test_a_run_resumes_bit_for_bit_from_a_cut() -> None:
    """Weights and state of every machine after six steps, loaded into new machines, give what ten steps give."""
    graph = ring(4)
    b = [3.0, -1.0, 0.5, 10.0]

    def steps(first: int, last: int, state: list[Any] | None) -> list[Any]:
        simulation = Simulation(4)
        ends: list[Any] = [None] * 4

        def script(rank: int) -> Script[None]:
            replica = VectorReplica(vectors([0.0])[0] if state is None else state[rank][0], lr=RATE)
            parts = Parts(replica, simulation.ports[rank], Always(graph), 1.0, 0)
            algorithm = DPSGDSettings(overlap=True).build(parts)
            if state is not None:
                algorithm.load_state_dict(state[rank][1])
            for t in range(first, last):
                replica.x = replica.x - RATE * (replica.x - b[rank])
                yield from algorithm.after_step(Turn(t, t, graph))
                if t == 5:
                    yield from algorithm.drain()
            ends[rank] = (replica.x, algorithm.state_dict() if t == 5 else None)

        run_each(simulation, script)
        return ends

    whole = steps(0, 10, None)
    resumed = steps(6, 10, steps(0, 6, None))
    assert all(torch.equal(a[0], c[0]) for a, c in zip(whole, resumed, strict=True))


def test_the_codec_seam_is_what_the_mixer_is_given() -> None:
    """The toy codec above is a Codec as the type checker sees it."""
    codec: Codec = Differences()
    assert codec.remembers


def test_quiet_machines_still_receive() -> None:
    """What arrives while nobody looks is there afterwards."""
    machines = Machines([0, 4], Late(lambda a, b, i: 0.75))
    mixing = mixing_of(2, [(0, 1)], 0.5)

    def script(rank: int) -> Script[None]:
        machines.mixers[rank].begin(0, mixing, machines.x[rank])
        yield from quiet(machines.simulation.ports[rank], 5.0)
        mixed = yield from machines.mixers[rank].finish()  # its deadline is over, but the word is there
        machines.x[rank] = mixed.onto(machines.x[rank])

    run_each(machines.simulation, script)
    assert [float(x) for x in machines.x] == [2.0, 2.0]
