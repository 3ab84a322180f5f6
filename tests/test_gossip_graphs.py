"""comm/gossip/graphs: closed-form gaps, exact periods, laws of random graphs, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from thinwire.comm.gossip.graphs import GraphSettings, build_graph, check_graph, complete_mixing, thinned
from thinwire.comm.gossip.graphs.base_k import base_rounds, simple_base_rounds
from thinwire.comm.gossip.graphs.sequence import Repeating
from thinwire.comm.gossip.mixing import Graph, Mixing

READ: TypeAdapter[Any] = TypeAdapter(GraphSettings)
EVERY_SIZE: list[Any] = [
    "ring",
    "path",
    "complete",
    "star",
    "exponential",
    "one_peer_exponential",
    "matching",
    "erdos_renyi",
    "equi",
    {"kind": "equi", "directed": True},
    {"kind": "erdos_renyi", "weights": "max_degree"},
    *({"kind": "base_k", "k": k} for k in (1, 2, 3, 4)),
]


def build(given: Any, size: int, seed: int = 0) -> Graph:
    return build_graph(READ.validate_python(given), size, seed)


def product(graph: Graph) -> NDArray[np.float64]:
    total = np.eye(graph.size)
    for round in range(graph.period):
        total = graph.mixing(round).matrix() @ total
    return total


def gap(given: Any, size: int) -> float:
    graph = build(given, size)
    assert graph.period == 1
    return 1 - float(np.linalg.norm(graph.mixing(0).matrix() - 1 / size, 2))


GAPS: list[tuple[Any, int, float]] = [
    *(("ring", n, g) for n, g in ((8, 0.195262), (16, 0.050747), (25, 0.020945), (32, 0.012810), (64, 0.003210))),
    *(("torus", n, g) for n, g in ((16, 0.4), (25, 0.276393), (64, 0.117157), (32, 0.117157))),
    *(("hypercube", n, g) for n, g in ((16, 0.4), (64, 0.285714))),
    *(("exponential", n, g) for n, g in ((16, 0.4), (32, 1 / 3), (64, 0.285714), (6, 0.5), (5, 0.75), (7, 0.646447))),
]


@pytest.mark.parametrize(("kind", "size", "expected"), GAPS)
def test_gaps_have_the_published_values(kind: str, size: int, expected: float) -> None:
    assert gap(kind, size) == pytest.approx(expected, abs=6e-7)


CLOSED_FORMS: dict[str, tuple[Callable[[int], float], range | list[int]]] = {
    "ring": (lambda n: (1 + 2 * math.cos(2 * math.pi / n)) / 3, range(4, 65, 3)),  # n = 3 is complete
    "path": (lambda n: (1 + 2 * math.cos(math.pi / n)) / 3, range(3, 65, 3)),
    "star": (lambda n: 1 - 1 / n, range(3, 65, 4)),
    "complete": (lambda _: 0, [2, 3, 4, 31, 64]),
    "hypercube": (lambda n: (n.bit_length() - 2) / n.bit_length(), [4, 8, 16, 32, 64]),
    "exponential": (lambda n: 1 - 2 / ((n - 1).bit_length() + 1), range(2, 65, 6)),
}


@pytest.mark.parametrize("kind", CLOSED_FORMS)
def test_gaps_have_their_closed_form(kind: str) -> None:
    rho, sizes = CLOSED_FORMS[kind]
    assert [gap(kind, n) for n in sizes] == pytest.approx([1 - rho(n) for n in sizes], abs=1e-12)


@pytest.mark.parametrize(("rows", "columns"), [(3, 3), (3, 5), (4, 7), (6, 6)])
def test_the_gap_of_a_torus(rows: int, columns: int) -> None:
    angles = [
        abs(1 + 2 * math.cos(2 * math.pi * i / rows) + 2 * math.cos(2 * math.pi * j / columns)) / 5
        for i in range(rows)
        for j in range(columns)
        if (i, j) != (0, 0)
    ]
    found = gap({"kind": "torus", "rows": rows, "columns": columns}, rows * columns)
    assert found == pytest.approx(1 - max(angles), abs=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_one_period_of_base_k_is_the_exact_mean_for_any_number_of_machines(k: int) -> None:
    for size in range(1, 101, 1 if k < 3 else 3):  # the benchmark takes all
        graph = build({"kind": "base_k", "k": k}, size)
        assert np.abs(product(graph) - 1 / size).max() < 1e-12
        assert graph.symmetric
        assert (
            max(len(row.keys() - {i}) for t in range(graph.period) for i, row in enumerate(graph.mixing(t).rows)) <= k
        )
        assert graph.period <= 2 * math.log(size, k + 1) + 2


PERIODS = {  # k: {machines: rounds of (Simple Base-(k+1), Base-(k+1))}
    1: {3: (3, 3), 5: (5, 5), 6: (5, 4), 7: (5, 5), 9: (7, 7), 10: (7, 6), 12: (7, 5), 16: (4, 4), 20: (9, 7)}
    | {24: (9, 6), 25: (9, 9), 31: (9, 9), 33: (11, 11), 48: (11, 7), 64: (6, 6), 96: (13, 8), 100: (13, 11)},
    2: {5: (3, 3), 7: (4, 4), 10: (5, 4), 25: (6, 6), 33: (7, 6)},
    3: {5: (3, 3), 7: (3, 3), 25: (5, 5)},
}


@pytest.mark.parametrize("k", PERIODS)
def test_the_periods_of_base_k_have_the_published_lengths(k: int) -> None:
    found = {n: (len(simple_base_rounds(range(n), k)), len(base_rounds(range(n), k))) for n in PERIODS[k]}
    assert found == PERIODS[k]


def test_the_base_2_graph_of_five() -> None:
    rounds = [{edge: float(weight) for edge, weight in round.items()} for round in base_rounds(range(5), 1)]
    apart: list[dict[tuple[int, int], float]] = [{(0, 1): 0.5, (2, 3): 0.5}, {(0, 2): 0.5, (1, 3): 0.5}]
    assert rounds == [*apart, {(0, 1): 0.5, (3, 4): 0.8}, *apart]


@pytest.mark.parametrize(("size", "left"), [(2, 0), (8, 0), (64, 0), (6, 0.216506), (12, 0.209129)])
def test_one_peer_exponential_is_exact_only_for_powers_of_two(size: int, left: float) -> None:
    graph = build("one_peer_exponential", size)
    assert graph.period == (size - 1).bit_length()
    assert np.linalg.norm(product(graph) - 1 / size, 2) == pytest.approx(left, abs=6e-7)


def test_small_numbers_of_machines_meet_no_neighbour_twice() -> None:
    half = [{0: 0.5, 1: 0.5}] * 2
    for kind in ("ring", "path", "star", "complete", "hypercube", "torus", "exponential", "base_k", "matching", "equi"):
        assert build(kind, 1).mixing(0).rows == [{0: 1.0}], kind
        assert build(kind, 2).mixing(0).rows == half, kind
    third = dict.fromkeys(range(3), 1 / 3)
    for kind in ("ring", "complete", "exponential"):
        assert build(kind, 3).mixing(0).rows == [third] * 3  # also a machine's own weight, to the last bit
    assert build("exponential", 4).mixing(0).sources(0) == [2, 3]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(EVERY_SIZE), st.integers(1, 40), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_every_round_is_stochastic_and_the_same_when_asked_again(kind: Any, size: int, seed: int, round: int) -> None:
    graph = build(kind, size, seed)
    mixing = graph.mixing(round)
    dense = mixing.matrix()
    assert dense.sum(0) == pytest.approx(1, abs=1e-12)
    assert dense.sum(1) == pytest.approx(1, abs=1e-12)
    assert (dense >= 0).all()
    assert (dense == dense.T).all() or not mixing.symmetric
    assert mixing.symmetric or not graph.symmetric  # a round of a directed graph may happen to be symmetric
    assert build(kind, size, seed).mixing(round).rows == mixing.rows
    targets = {(i, j): weight for j in range(size) for i, weight in mixing.targets(j).items()}
    assert targets == {(i, j): dense[i, j] for i in range(size) for j in mixing.sources(i)}


def squared_distance(graph: Graph, trials: int) -> float:
    """What a round leaves of the expected squared distance, of a start that is white."""
    size = graph.size
    mean = sum(np.linalg.norm(graph.mixing(t).matrix() - 1 / size) ** 2 for t in range(trials)) / trials
    return float(mean) / (size - 1)


def test_random_pairs_obey_their_law() -> None:
    assert squared_distance(build("matching", 16, 3), 10) == pytest.approx(0.466667, abs=1e-6)  # in every round
    graph = build("matching", 15, 5)
    used = np.mean([graph.mixing(t).matrix() for t in range(1500)], axis=0)
    off = used[~np.eye(15, dtype=bool)]
    assert off == pytest.approx(0.5 / 15, rel=0.5)  # each pair with the same chance, 1/n for odd n: sd is 0.1
    assert off.mean() == pytest.approx(0.5 / 15)


@pytest.mark.parametrize("size", [5, 8])
def test_shifts_of_equi_are_even(size: int) -> None:
    graph = build({"kind": "equi", "directed": True}, size)
    shifts = {next(iter(graph.mixing(t).targets(0))): graph.mixing(t).matrix() for t in range(400)}
    assert sorted(shifts) == list(range(1, size))
    eta = size / (2 * (size - 1))
    expected = (1 - eta) * np.eye(size) + eta / size  # of the paper: (1 - eta) I + eta J
    assert np.mean(list(shifts.values()), axis=0) == pytest.approx(expected, abs=1e-12)
    pairs = build("equi", size)
    for t in range(20):
        idle = [i for i in range(size) if not pairs.mixing(t).sources(i)]
        assert len(idle) <= size // 3  # maximal: no two idle machines are a shift apart


def test_edges_as_people_write_them() -> None:
    given = {
        "kind": "edges",
        "edges": [[1, 0], {"ends": [1, 2], "link": "100mbit", "latency": "20ms"}],
        "link": "10gbit",
    }
    read = READ.validate_python(given)
    graph = build_graph(read, 3, 0)
    third = 1 / 3
    assert graph.mixing(0).rows == [{0: 2 / 3, 1: third}, {0: third, 1: third, 2: third}, {1: third, 2: 2 / 3}]
    links = read.links()
    assert (links.between(2, 1).bps, links.between(1, 2).latency_s) == (1e8, 0.02)
    assert (links.between(0, 1).bps, links.between(0, 1).latency_s) == (1e10, 1e-3)


def test_a_configuration_file_can_give_every_graph() -> None:
    """Files are read as JSON in strict mode, where a list is no tuple once a validator has seen it."""
    for kind in [
        *EVERY_SIZE,
        {"kind": "torus", "rows": 2},
        {"kind": "edges", "edges": [[0, 1], {"ends": [1, 2], "latency": "20ms"}]},
        {"kind": "auto", "link": "100mbit"},
    ]:
        read = READ.validate_json(json.dumps(kind), strict=True)
        assert read == READ.validate_python(kind)
        assert READ.validate_json(read.model_dump_json(), strict=True) == read


def test_directed_edges_push_their_mass() -> None:
    circle = {"kind": "edges", "directed": True, "edges": [[0, 1], [1, 2], [2, 0], [0, 2]]}
    graph = build(circle, 3)
    assert not graph.symmetric
    dense = graph.mixing(0).matrix()
    assert dense.sum(0) == pytest.approx(1, abs=1e-15)
    assert dense[:, 0] == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match=r"stochastic: column"):
        build({**circle, "stochastic": "doubly"}, 3)
    even = [{"ends": [i, (i + 1) % 3], "weight": 0.4} for i in range(3)]
    assert build({**circle, "edges": even, "stochastic": "doubly"}, 3).mixing(0).rows[0] == {0: 0.6, 2: 0.4}


def test_given_weights_keep_the_digits_they_were_written_with() -> None:
    ring = [{"ends": [i, (i + 1) % 8], "weight": 0.4} for i in range(8)]
    rows = build({"kind": "edges", "edges": ring}, 8).mixing(0).rows
    assert rows[3] == {2: 0.4, 3: 0.2, 4: 0.4}


REFUSED: list[tuple[Any, int, str]] = [
    ("hypercube", 12, r"power of two of machines, such as 8 or 16, not 12; take base_k"),
    ("torus", 7, r"prime"),
    ({"kind": "torus", "rows": 5}, 12, r"method\.graph\.rows: 5.*auto takes 3"),
    ({"kind": "torus", "rows": 2, "columns": 3}, 12, r"2 x 3 has other than 12 machines"),
    ({"kind": "star", "hub": 4}, 4, r"method\.graph\.hub: 4, but the machines are 0\.\.3"),
    ({"kind": "erdos_renyi", "p": 0.001}, 30, r"method\.graph\.p: with 0\.001 none of 1000 graphs.*0\.23"),
    ({"kind": "edges", "edges": [[0, 1], [2, 3]]}, 4, r"nothing of machine 0 ever comes to machines 2, 3"),
    ({"kind": "edges", "edges": [[0, 1]]}, 3, r"machine 2; add an edge"),
    ({"kind": "edges", "edges": []}, 2, r"disconnected"),
    ({"kind": "edges", "edges": [[0, 1], [1, 2]], "directed": True}, 3, r"nothing of machines 1, 2 ever comes to mac"),
    ({"kind": "edges", "edges": [[0, 3]]}, 3, r"edges\[0\]: \[0, 3\], but the machines are 0\.\.2"),
    ({"kind": "edges", "edges": [[0, 1], [1, 0]]}, 2, r"edges\[1\]: \[1, 0\] has been given before"),
    ({"kind": "edges", "edges": [[0, 1], [1, 2]], "weights": "uniform"}, 3, r"degrees differ"),
    ({"kind": "edges", "edges": [[0, 1]], "weights": "given"}, 2, r"gives no weight"),
    ({"kind": "edges", "edges": [{"ends": [0, 1], "weight": 0.5}], "weights": "metropolis"}, 2, r"drop these"),
    ({"kind": "edges", "edges": [[0, 1], [1, 0]], "directed": True, "weights": "max_degree"}, 2, r"undirected"),
    ({"kind": "edges", "edges": [[0, 1]], "stochastic": "column"}, 2, r"say doubly"),
    (
        {"kind": "edges", "edges": [{"ends": [0, 1], "weight": 0.7}, {"ends": [1, 2], "weight": 0.6}]},
        3,
        r"weights at machine 1 sum to 1\.3",
    ),
    ({"kind": "edges", "edges": [{"ends": [0, 1], "weight": 1.0}]}, 2, r"models only change places"),
]


@pytest.mark.parametrize(("kind", "size", "reason"), REFUSED)
def test_graphs_that_cannot_be_are_refused_with_the_reason(kind: Any, size: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        build(kind, size)


@pytest.mark.parametrize(
    "given",
    [
        "rings",
        {"kind": "ring", "k": 2},
        {"kind": "base_k", "k": 0},
        {"kind": "edges", "edges": [[0, 0]]},
        {"kind": "edges", "edges": [[0, 1, 2]]},
        {"kind": "edges", "edges": [{"ends": [0, 1], "link": "100"}]},
        {"kind": "edges", "edges": [{"ends": [0, 1], "latency": "20"}]},
        {"kind": "edges", "edges": [{"ends": [0, 1], "weight": 0}]},
        {"kind": "auto", "link": "fast"},
        {"kind": "auto", "latency": "20"},
    ],
)
def test_settings_that_mean_nothing_are_refused(given: Any) -> None:
    with pytest.raises(ValidationError):
        READ.validate_python(given)


@pytest.mark.parametrize(
    ("mixing", "reason"),
    [
        (Mixing([{0: 0.5, 1: 0.4}, {0: 0.4, 1: 0.6}]), r"machine 0 sum to 0\.9, not to 1: not doubly"),
        (Mixing([{0: 0.5, 1: 0.5}, {0: 0.4, 1: 0.6}]), r"gives 0\.5 to 1 and gets 0\.4"),
        (Mixing([{0: 0.5, 1: 0.5}, {0: 0.4, 1: 0.6}], symmetric=False), r"what machine 0 sends sum to 0\.9"),
        (Mixing([{0: 1.5, 1: -0.5}, {0: -0.5, 1: 1.5}]), r"gives (1\.5|-0\.5)"),
        (Mixing([{0: 0.5, 2: 0.5}, {0: 0.5, 1: 0.5}]), r"has a weight for 2"),
        (Mixing([{0: math.nan}, {1: 1.0}]), r"gives nan"),
    ],
)
def test_weights_that_are_not_stochastic_are_refused_with_the_reason(mixing: Mixing, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_graph(Repeating("bad", [mixing]))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(EVERY_SIZE), st.integers(1, 24), st.floats(0, 1), st.integers(0, 2**32), st.integers(0, 2**32))
def test_thinning_keeps_the_mean_and_both_directions(
    kind: Any, size: int, probability: float, seed: int, round: int
) -> None:
    whole = build(kind, size, seed)
    thin = thinned(whole, probability, seed)
    dense, before = thin.mixing(round).matrix(), whole.mixing(round).matrix()
    assert dense.sum(0) == pytest.approx(1, abs=1e-12)
    assert (dense == dense.T).all() or not whole.symmetric
    off = ~np.eye(size, dtype=bool)
    used = dense[off] > 0
    assert (dense[off][used] == before[off][used]).all()
    both = (before > 0) & (before.T > 0) & off
    assert ((dense > 0) == (dense.T > 0))[both].all()
    for rank in range(size):
        if whole.symmetric and not thin.mixing(round).sources(rank):
            assert thin.mixing(round).rows[rank] == {rank: 1.0}


def test_thinning_takes_each_edge_as_often_as_asked() -> None:
    thin = thinned(build("complete", 8), 0.2, 1)
    used = np.mean([thin.mixing(t).matrix() > 0 for t in range(1500)], axis=0)[~np.eye(8, dtype=bool)]
    assert np.abs(used - 0.2).max() < 5 * math.sqrt(0.2 * 0.8 / 1500)
    ring = build("ring", 8)
    assert thinned(ring, 1.0, 1) is ring
    assert thinned(ring, 0.0, 1).mixing(0).rows == [{i: 1.0} for i in range(8)]
    with pytest.raises(ValueError, match=r"probability: 1\.2"):
        thinned(ring, 1.2, 1)


def test_the_complete_mixing_is_the_mean() -> None:
    assert complete_mixing(7).matrix() == pytest.approx(np.full((7, 7), 1 / 7), abs=0)
