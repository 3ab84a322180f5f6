"""Constants and step sizes of EF21's theory against known values and bounds."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire.comm.compress.feedback import theory

SMOOTHNESS = st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=50)


@pytest.mark.parametrize(
    ("alpha", "expected"), [(0.5, 2.41421356), (0.1, 18.48683298), (0.01, 198.4987437), (1.0, 0.0)]
)
def test_xi_has_its_known_values_and_is_the_root_of_beta_over_theta(alpha: float, expected: float) -> None:
    assert theory.xi(alpha) == pytest.approx(expected, rel=1e-9)
    assert theory.xi(alpha) == pytest.approx(math.sqrt(theory.beta(alpha) / theory.theta(alpha)), abs=1e-12, rel=1e-12)


def test_means_and_clones_of_one_rank_that_stands_out() -> None:
    L = [1.0, 1.0, 1.0, 100.0]
    assert theory.quadratic_mean(L) == pytest.approx(50.01, abs=0.005)
    assert theory.arithmetic_mean(L) == 25.75
    assert theory.cloned_mean(L, [1, 1, 1, 1]) == pytest.approx(theory.quadratic_mean(L))
    assert theory.cloned_mean(L, [1, 1, 1, 2]) == pytest.approx(39.54, abs=0.005)
    assert theory.clones(L) == [1, 1, 1, 4]
    assert theory.cloned_mean(L, theory.clones(L)) == pytest.approx(33.09, abs=0.005)


@settings(deadline=None)
@given(SMOOTHNESS)
def test_cloning_keeps_its_bounds(L: list[float]) -> None:
    copies = theory.clones(L)
    assert len(L) <= sum(copies) <= 2 * len(L)
    assert theory.cloned_mean(L, copies) <= math.sqrt(2) * theory.arithmetic_mean(L) * (1 + 1e-9)
    assert theory.arithmetic_mean(L) <= theory.quadratic_mean(L) * (1 + 1e-9)


def test_the_larger_step_size() -> None:
    """Twenty ranks, Top-1 of 10: the sharper proof doubles the step."""
    ratio = theory.step_size(18.07, 0.1, 29.95) / theory.step_size(18.07, 0.1, 60.91)
    assert ratio == pytest.approx(2.0, abs=0.01)
    assert theory.step_size(2.0, 1.0, 5.0) == 0.5


def test_partial_participation_costs_and_ends_at_the_full_one() -> None:
    sizes = [theory.step_size_partial(1.0, 0.1, 2.0, p) for p in (0.1, 0.5, 0.9, 0.999999, 1.0)]
    assert sizes == sorted(sizes)
    assert sizes[-1] == theory.step_size(1.0, 0.1, 2.0)
    assert sizes[-2] == pytest.approx(sizes[-1], rel=0.03)


def test_the_default_rho_is_the_best() -> None:
    best = theory.step_size_partial(1.0, 0.2, 2.0, 0.5)
    limit = theory.theta(0.2) * 0.5 / 0.5
    others = [theory.step_size_partial(1.0, 0.2, 2.0, 0.5, rho=limit * i / 1000) for i in range(1, 1000)]
    assert max(others) == pytest.approx(best, rel=1e-5)
    assert max(others) <= best * (1 + 1e-12)


def test_the_formula_of_partial_participation() -> None:
    """Written out, with theta and beta as functions of s, at the best s."""
    alpha, p, rho, L, mean = 0.25, 0.6, 0.01, 3.0, 7.0
    s = 1 / math.sqrt(1 - alpha) - 1
    theta, beta = 1 - (1 + s) * (1 - alpha), (1 + 1 / s) * (1 - alpha)
    theta_p = rho * p + theta * p - rho
    B = (beta * p + (1 + 1 / rho) * (1 - p)) * mean**2
    expected = 1 / (L + math.sqrt(B / theta_p))
    assert theory.step_size_partial(L, alpha, mean, p, rho=rho) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("alpha", [0.0, -0.1, 1.1, math.nan])
def test_no_contraction_factor(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha"):
        theory.xi(alpha)


@pytest.mark.parametrize("L", [[], [0.0, 0.0], [1.0, -1.0], [1.0, math.inf]])
def test_no_smoothness(L: list[float]) -> None:
    with pytest.raises(ValueError, match="smoothness"):
        theory.weights(L)


def test_no_rho_and_no_probability() -> None:
    with pytest.raises(ValueError, match="rho"):
        theory.step_size_partial(1.0, 0.5, 1.0, 0.5, rho=1.0)
    with pytest.raises(ValueError, match="participation"):
        theory.step_size_partial(1.0, 0.5, 1.0, 0.0)
