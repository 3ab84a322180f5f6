"""The cost model: what it measures, and what it advises."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from thinwire.comm.onebyte.cost import CostModel, contribution_s, most_contributions
from thinwire.comm.onebyte.optimizer import OneByteSPSA
from thinwire.comm.onebyte.rounds import Contribution, Round


class Clock:
    """time.monotonic() of a machine on which each evaluation takes what the test says."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


def build(**settings: Any) -> OneByteSPSA:
    return OneByteSPSA([("w", nn.Parameter(torch.ones(64, 40))), ("b", nn.Parameter(torch.ones(64)))], **settings)


def modelled(
    monkeypatch: pytest.MonkeyPatch, one_s: float, evaluations_s: tuple[float, ...], **settings: Any
) -> CostModel:
    """A model that has seen these evaluations, on a machine that applies a contribution in one_s."""
    optimizer = build(**settings)
    model, clock = CostModel(optimizer.replica.lattice, optimizer.settings), Clock()
    monkeypatch.setattr("thinwire.comm.onebyte.cost.time", clock)
    monkeypatch.setattr("thinwire.comm.onebyte.cost.contribution_s", lambda lattice: one_s)
    for taken_s in evaluations_s:

        def closure(taken_s: float = taken_s) -> float:
            clock.now += taken_s
            return 1.0

        assert model.timed(closure)() == 1.0
    return model


def test_the_figure_of_the_note() -> None:
    """60 ms for a pair of forward passes, 2.3 ms for a contribution: 26."""
    assert most_contributions(60e-3, 2.3e-3) == 26


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({}, 40),  # two passes of 20 ms, at 1 ms a contribution
        ({"samples": 3}, 120),
        ({"samples": 3, "estimate": "one_sided"}, 80),
    ],
)
def test_the_fastest_evaluation_counts(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], most: int) -> None:
    model = modelled(monkeypatch, 1e-3, (5.0, 0.02 + 1e-9, 0.03), **settings)  # the first one compiles
    assert model.most_contributions == most


@pytest.mark.parametrize(
    ("settings", "contributions", "line"),
    [
        (
            {},
            41,
            "applying one more contribution takes 1 ms, this machine's 2 forward passes 40 ms: beyond 40 contributions "
            "per round, applying them outweighs measuring them; this run has 41: choose directions: subspace, or "
            "shared",
        ),
        (
            {},
            40,
            "applying one more contribution takes 1 ms, this machine's 2 forward passes 40 ms: beyond 40 contributions "
            "per round, applying them outweighs measuring them; this run has 40",
        ),
        (
            {"directions": "shared", "samples": 4},
            4000,
            "directions are shared: a round applies 4 of them, 1 ms each, however many machines take part",
        ),
        (
            {"directions": "subspace"},
            4000,
            "a matrix product applies any number of contributions; where tensors are too small for it, one more takes "
            "1 ms",
        ),
    ],
)
def test_it_says_what_to_choose_once(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    settings: dict[str, Any],
    contributions: int,
    line: str,
) -> None:
    model = modelled(monkeypatch, 1e-3, (0.02 + 1e-9,), **settings)
    with caplog.at_level(logging.INFO, "thinwire.onebyte"):
        model.tell(contributions)
        model.tell(contributions)
    # Of the others, nothing is known now that was not at the start.
    assert [record.getMessage() for record in caplog.records] == ([] if "directions" in settings else [line])
    assert model.describe(contributions) == line


def test_measuring_leaves_the_weights_alone_and_counts_what_is_swept(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = build()
    before = optimizer.replica.model_hash()
    assert contribution_s(optimizer.replica.lattice) > 0
    assert optimizer.replica.model_hash() == before
    assert optimizer.replica.lattice.swept_elements == 64 * 40 + 64
    assert build(directions="subspace").replica.lattice.swept_elements == 64  # the matrix has a subspace
    assert build(directions="subspace", rank=64).replica.lattice.swept_elements == 64 * 40 + 64
    whole = contribution_s(build(directions="subspace").replica.lattice)
    monkeypatch.setattr(type(optimizer.replica.lattice), "swept_elements", 0)
    assert contribution_s(optimizer.replica.lattice) == 0.0 < whole


@pytest.mark.parametrize(("directions", "applied"), [("distinct", [1, 8, 512]), ("shared", [1, 1, 1])])
def test_with_shared_directions_the_number_of_machines_costs_nothing(
    monkeypatch: pytest.MonkeyPatch, directions: str, applied: list[int]
) -> None:
    counts = []
    replica = build(directions=directions).replica
    monkeypatch.setattr(replica.lattice, "add", lambda coefficients, places: counts.append(len(places)))
    for number, machines in enumerate((1, 8, 512)):
        replica.apply([Round(number, 2**-10, tuple(Contribution(slot, b"\x40") for slot in range(machines)))])
    assert counts == applied


def test_an_optimizer_describes_itself_before_and_after_its_first_step(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = build()
    assert "shows after the first round" in optimizer.describe()
    with caplog.at_level(logging.INFO, "thinwire.onebyte"):
        for _ in range(2):
            optimizer.step(_loss)
    (record,) = [record for record in caplog.records if record.name == "thinwire.onebyte"]
    assert "this run has 1" in record.getMessage()
    assert record.getMessage() == optimizer.describe()


def _loss() -> Tensor:
    return torch.tensor(1.0)
