"""OneByteSPSA: its estimates, its groups, what it refuses and warns of."""

from __future__ import annotations

import itertools
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from thinwire.comm.onebyte.errors import TornWeightsError, WeightRangeError
from thinwire.comm.onebyte.exchange import Turn
from thinwire.comm.onebyte.measure import measure
from thinwire.comm.onebyte.optimizer import OneByteSPSA
from thinwire.kernels.philox import direction_reference

D = 96


def start(*shape: int, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(*(shape or (D,)), generator=torch.Generator().manual_seed(seed)))


def half_square(*weights: Tensor) -> Tensor:
    return sum((w.detach().double().square().sum() / 2 for w in weights), torch.zeros((), dtype=torch.float64))


def slopes_of(optimizer: OneByteSPSA, closure: Any, samples: int) -> tuple[list[float], list[Tensor]]:
    """Slopes as they are before the code, and their directions."""
    replica = optimizer.replica
    _, slopes = measure(closure, Turn(0, 3, samples), replica, optimizer.settings)
    replica.restore()
    key = replica._key
    return slopes, [
        direction_reference(
            D, key=key, tensor=0, place=(0, 3 << 16 | s), distribution=optimizer.settings.distribution
        ).double()
        for s in range(samples)
    ]


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
@pytest.mark.parametrize("eps", [0.5, 2.0**-3, 1e-3])
def test_two_sided_slopes_are_exact_on_quadratics(eps: float, distribution: str) -> None:
    w = start()
    optimizer = OneByteSPSA([("w", w)], eps=eps, distribution=distribution)
    hessian = torch.randn(D, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    hessian = hessian + hessian.t()

    def loss() -> Tensor:
        return w.double() @ hessian @ w.double() / 2 + w.double().sum()

    gradient = hessian @ w.detach().double() + 1
    slopes, zs = slopes_of(optimizer, loss, 4)
    for slope, z in zip(slopes, zs, strict=True):
        assert slope == pytest.approx(float(z @ gradient), rel=1e-9, abs=1e-8)


def test_one_sided_slopes_are_off_by_half_eps_times_the_curvature_and_share_one_evaluation() -> None:
    w = start()
    optimizer = OneByteSPSA([("w", w)], eps=0.25, estimate="one_sided")
    calls: list[int] = []

    def loss() -> Tensor:
        calls.append(1)
        return half_square(w) + w.double().sum() ** 2

    gradient = w.detach().double() * 1 + 2 * w.detach().double().sum()
    slopes, zs = slopes_of(optimizer, loss, 5)
    assert len(calls) == 6
    for slope, z in zip(slopes, zs, strict=True):
        curvature = float(z @ z + 2 * z.sum() ** 2)
        assert slope == pytest.approx(float(z @ gradient) + 0.25 / 2 * curvature, rel=1e-9)


def test_the_slope_of_a_linear_model_is_autograds_directional_derivative() -> None:
    model, x = nn.Linear(D, 1, bias=False), torch.randn(7, D, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        model.weight.copy_(start(1, D))
    optimizer = OneByteSPSA(model.named_parameters(), model=model)

    def loss() -> Tensor:
        # In fp64: what a product in fp32 rounds, which machines do differently, would be divided by eps.
        return (x.double() @ model.weight.double().T).mean()

    slopes, zs = slopes_of(optimizer, loss, 2)
    model(x).mean().backward()
    for slope, z in zip(slopes, zs, strict=True):
        assert slope == pytest.approx(float(z @ model.weight.grad.flatten().double()), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"distribution": "gaussian"},
        {"estimate": "one_sided", "samples": 2, "eps": 1e-4},
        {"directions": "shared"},
        {"scaling": "sqrt", "samples": 4},
        {"step_size": "std", "samples": 4},
        {"step_size": "ema"},
        {"robust": "clip", "samples": 3},
        {"directions": "subspace", "rank": 2},
    ],
    ids=str,
)
def test_one_step_descends(settings: dict[str, Any]) -> None:
    w = start(8, 12)
    before = float(half_square(w))
    optimizer = OneByteSPSA([("w", w)], 1e-3, **settings)
    assert optimizer.step(lambda: half_square(w)) == pytest.approx(before, rel=2e-2)
    assert float(half_square(w)) < before


def test_a_step_is_minus_lr_times_the_slope_along_the_direction() -> None:
    w = start()
    before = w.detach().double().clone()
    optimizer = OneByteSPSA([("w", w)], 2.0**-10)
    key = optimizer.replica._key
    optimizer.step(lambda: half_square(w))
    z = direction_reference(D, key=key, tensor=0, place=(0, 0)).double()
    slope = float(z @ before)
    step = before - w.detach().double()
    assert torch.equal(step.sign(), z * math.copysign(1, slope))
    assert float(step.abs().max()) == pytest.approx(2.0**-10 * abs(slope), rel=0.045)
    assert optimizer.metrics()["slope"] == pytest.approx(abs(slope), rel=0.045)


def test_groups_have_their_own_rates_decay_and_eps() -> None:
    """All of one tensor's copies in groups: the same expected gradient, scaled by the group's lr."""
    parts = [start(8, 12, seed=5) for _ in range(3)]
    groups = [
        {"params": [("frozen", nn.Parameter(torch.ones(2), requires_grad=False))], "lr": 0.5},
        {"params": [("a", parts[0])], "lr": 0.25},
        {"params": [("b", parts[1])], "lr": 0.125, "weight_decay": 0.5},
        {"params": [("c", parts[2])], "lr": 0.25, "eps": 2.0**-8},
    ]
    optimizer = OneByteSPSA(groups, 0.5, eps=2.0**-10, snapshot_every=1)
    shown: list[list[Tensor]] = []

    def loss() -> float:
        shown.append([p.detach().clone() for p in parts])
        return -len(shown) * 2.0**-9  # a slope of 1, whatever the weights

    before = [p.detach().clone() for p in parts]
    optimizer.step(loss)
    eps = [float((s - b).abs().max()) for s, b in zip(shown[0], before, strict=True)]
    assert eps == [2.0**-10, 2.0**-10, 2.0**-8]
    moved = [(b - p.detach()).abs() for b, p in zip(before, parts, strict=True)]
    decay = before[1].abs() * (0.5 * 0.125)  # taken away after the step, of what is left of the weight
    step = float(moved[0].max())
    assert float(moved[0].min()) == step
    assert bool(((moved[1] - step / 2).abs() <= decay + step / 2 * 0.07).all())
    assert float(moved[2].max()) == pytest.approx(step / 4, rel=1e-5)  # the slope is along 4 z there
    optimizer.param_groups[1]["lr"] *= 3
    with pytest.raises(ValueError, match=r"0\.5 times the first group's.*all groups' lr by the same factor"):
        optimizer.step(loss)


MISUSES = {
    "names": (lambda: OneByteSPSA([start()]), "give model.named_parameters"),  # type: ignore[list-item]
    "empty": (lambda: OneByteSPSA([("w", start().requires_grad_(False))]), "no parameter has requires_grad"),
    "float64": (lambda: OneByteSPSA([("w", nn.Parameter(start().double()))]), "w has dtype torch.float64"),
    "strides": (lambda: OneByteSPSA([("w", nn.Parameter(start(4, 5).t()))]), r"\.contiguous\(\)"),
    "nan": (lambda: OneByteSPSA([("w", nn.Parameter(torch.full((3,), math.nan)))]), "w: weights are NaN or infinite"),
    "meta": (lambda: OneByteSPSA([("w", nn.Parameter(torch.empty(3, device="meta")))]), "meta device"),
    "overlap": (
        lambda: OneByteSPSA([("a", whole := start()), ("b", nn.Parameter(whole.data[5:9]))]),
        "a and b share a part of their memory",
    ),
    "option": (lambda: OneByteSPSA([{"params": [("w", start())], "momentum": 0.9}]), "has momentum; .*lr, eps, weight"),
    "group lr": (lambda: OneByteSPSA([{"params": [("w", start())], "lr": 0.0}]), "lr 0.0; it must be more than 0"),
    "eps": (lambda: OneByteSPSA([("w", start())], eps=0.0), "eps"),
    "fine eps": (lambda: OneByteSPSA([("w", nn.Parameter(1e6 * start()))], eps=1e-6), "finer than the grid of w"),
    "setting": (lambda: OneByteSPSA([("w", start())], sample=3), "sample"),
    "median": (lambda: OneByteSPSA([("w", start())], robust="median"), "needs directions: shared"),
    "join": (lambda: OneByteSPSA([("w", start())], join=lambda *_: None), "join needs a log"),  # type: ignore[arg-type]
    "closure": (lambda: OneByteSPSA([("w", start())]).step(), "there is no backward pass"),
    "shape": (lambda: OneByteSPSA([("w", start())]).step(lambda: torch.ones(3)), r"shape \(3,\)"),
    "dtype": (lambda: OneByteSPSA([("w", start())]).step(lambda: torch.ones(()).bfloat16()), "compute it in fp32"),
    "no loss": (lambda: OneByteSPSA([("w", start())]).step(lambda: None), "gave NoneType"),  # type: ignore[arg-type]
    "late group": (
        lambda: OneByteSPSA([("w", start())]).add_param_group({"params": [("v", start())]}),
        "all parameter groups at once",
    ),
}


@pytest.mark.parametrize(("misuse", "message"), MISUSES.values(), ids=MISUSES)
def test_refuses(misuse: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        misuse()


def test_refuses_weights_that_others_have_changed_and_takes_those_of_the_run() -> None:
    w, v = start(), nn.Parameter(start(seed=1).to(torch.bfloat16))
    optimizer = OneByteSPSA([("w", w), ("v", v)], 1e-3)
    saved = w.detach().clone(), v.detach().clone()
    optimizer.step(lambda: half_square(w, v))
    for parameter, value in ((w, 0.1), (v, 1.0)):
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.add_(value)
        with pytest.raises(ValueError, match="was changed from outside"):
            optimizer.step(lambda: half_square(w, v))
        with torch.no_grad():
            parameter.copy_(kept)
    with torch.no_grad():
        w.copy_(saved[0])  # of this run, on its grid
    optimizer.step(lambda: half_square(w, v))
    w.data = w.data.clone()
    with pytest.raises(ValueError, match="w has moved to other memory"):
        optimizer.step(lambda: half_square(w, v))


def test_a_step_that_leaves_the_grid_changes_nothing_and_can_be_tried_again(tmp_path: Path) -> None:
    w, v = start(), start(seed=1)
    optimizer = OneByteSPSA([("w", w), ("v", v)], 64.0, log=tmp_path / "log")
    before, state = optimizer.replica.model_hash(), str(optimizer.replica.state())
    losses = itertools.cycle([0.0, 2.0**-9])  # a slope of 1, whatever the weights
    for lr, message in ((64.0, "w would grow to .* beyond what its grid"), (2.0**30, "round 0 would move")):
        optimizer.param_groups[0]["lr"] = lr
        with pytest.raises(WeightRangeError, match=message):
            optimizer.step(lambda: next(losses))
        assert (optimizer.replica.model_hash(), str(optimizer.replica.state())) == (before, state)
        assert optimizer.log is not None
        assert optimizer.log.rounds == 0
    optimizer.param_groups[0]["lr"] = 1e-3
    optimizer.step(lambda: half_square(w, v))
    assert optimizer.log.rounds == optimizer.replica.rounds == 1
    optimizer.param_groups[0]["lr"] = -0.1
    with pytest.raises(ValueError, match=r"lr is -0\.1"):
        optimizer.step(lambda: half_square(w, v))
    optimizer.remove()


def test_weight_decay_that_would_take_all_is_refused() -> None:
    w = start(8, 12)
    optimizer = OneByteSPSA([("w", w)], 0.5, weight_decay=1.0, snapshot_every=2)
    optimizer.step(lambda: 0.0)
    before = optimizer.replica.model_hash()
    with pytest.raises(WeightRangeError, match="weight decay would take 1 times w away at the snapshot after 2 rounds"):
        optimizer.step(lambda: 0.0)
    assert optimizer.replica.model_hash() == before


def test_a_change_interrupted_in_its_midst_is_not_taken_for_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    w, v = start(), start(seed=1)
    optimizer = OneByteSPSA([("w", w), ("v", v)], 1e-3)

    def interrupt(*_: object) -> list[int]:
        with torch.no_grad():
            w.add_(1)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(optimizer.replica.lattice._directions, "add", interrupt)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step(lambda: half_square(w, v))
    with pytest.raises((TornWeightsError, ValueError)):
        optimizer.step(lambda: half_square(w, v))
    with pytest.raises(TornWeightsError, match="with the log"):
        optimizer.replica.model_hash()


@pytest.mark.parametrize(
    ("slope", "better", "share"),
    [(2000.0, "8", "100.0 % were larger"), (2.0**-18, "1.49012e-08", "100.0 % were taken for zero"), (1.0, "", "")],
)
def test_warns_once_of_slopes_that_a_byte_cannot_say(
    slope: float, better: str, share: str, caplog: pytest.LogCaptureFixture
) -> None:
    optimizer = OneByteSPSA([("w", start(8))], 1e-12)
    call = itertools.count()
    with caplog.at_level(logging.WARNING, logger="thinwire"):
        for _ in range(210):
            optimizer.step(lambda: slope * 2.0**-9 * (next(call) % 2))
    assert len(caplog.messages) == bool(better)
    if better:
        assert share in caplog.text
        assert caplog.messages[0].endswith(f"Begin a run with slope_floor: {better}")


def test_warns_of_16_bit_weights_that_eps_does_not_move(caplog: pytest.LogCaptureFixture) -> None:
    norm = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    matrix = nn.Parameter((0.02 * start(8, 8)).to(torch.bfloat16))
    with caplog.at_level(logging.WARNING, logger="thinwire"):
        OneByteSPSA([("matrix", matrix), ("norm", norm)])
    assert "moves 0 % of norm" in caplog.text
    assert "keep norm in float32" in caplog.text
    caplog.clear()
    OneByteSPSA([{"params": [("matrix", matrix)]}, {"params": [("norm", norm)], "eps": 2.0**-6}])
    OneByteSPSA([("norm", nn.Parameter(norm.detach().to(torch.float16)))])
    assert not caplog.messages
