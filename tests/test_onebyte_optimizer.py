"""OneByteSPSA: its estimates, its groups, what it refuses and warns of, how it resumes."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Rank, run_ranks, run_ranks_to_the_end
from torch import Tensor, nn

from thinwire.comm.errors import PeerLateError
from thinwire.comm.onebyte.errors import ModelMismatchError, TornWeightsError, WeightRangeError
from thinwire.comm.onebyte.exchange import Change, Turn
from thinwire.comm.onebyte.log import Log
from thinwire.comm.onebyte.measure import measure
from thinwire.comm.onebyte.optimizer import OneByteSPSA
from thinwire.comm.onebyte.replica import Replica
from thinwire.comm.onebyte.rounds import Contribution, Roster, Round, Snapshot
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
    slopes, zs = slopes_of(optimizer, lambda: model(x).double().mean(), 2)
    model(x).mean().backward()
    for slope, z in zip(slopes, zs, strict=True):
        assert slope == pytest.approx(float(z @ model.weight.grad.flatten().double()), rel=1e-4, abs=1e-4)


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


class Task:
    """Two tensors, their optimizer, a schedule, and a loss that differs from machine to machine and round to round."""

    def __init__(self, **options: Any) -> None:
        self.parameters = [start(8, 12), nn.Parameter(start(seed=1).to(torch.bfloat16))]
        settings = {"snapshot_every": 4, "weight_decay": 0.1, "kept": 0.5, "step_size": "ema", "samples": 2}
        self.optimizer = OneByteSPSA([*zip("wv", self.parameters, strict=True)], 2e-3, **{**settings, **options})
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 12)

    def train(self, steps: int) -> bytes:
        for _ in range(steps):
            self.optimizer.step(self.loss)
            self.schedule.step()
        return self.optimizer.replica.model_hash()

    def loss(self) -> Tensor:
        turn = self.optimizer.turn
        return half_square(*(p - (turn.round + turn.slot) % 3 for p in self.parameters))


def test_resuming_by_state_equals_not_stopping_also_within_a_period() -> None:
    task, steady = Task(), Task()
    task.train(6)
    saved = task.optimizer.state_dict(), [p.detach().clone() for p in task.parameters], task.schedule.state_dict()
    resumed = Task()
    for parameter, value in zip(resumed.parameters, saved[1], strict=True):
        parameter.data.copy_(value)
    resumed.optimizer.load_state_dict(saved[0])
    resumed.schedule.load_state_dict(saved[2])
    assert resumed.train(5) == steady.train(11)
    with pytest.raises(ValueError, match="of another run"):
        Task(seed=1).optimizer.load_state_dict(saved[0])


def test_resuming_by_log_equals_not_stopping_and_the_log_proves_itself(tmp_path: Path) -> None:
    task, steady = Task(log=tmp_path / "log"), Task(log=tmp_path / "other")
    task.train(6)
    state = task.optimizer.state_dict()
    task.optimizer.remove()
    resumed = Task(log=tmp_path / "log")
    resumed.schedule.load_state_dict(task.schedule.state_dict())
    resumed.optimizer.param_groups[0]["lr"] = task.optimizer.param_groups[0]["lr"]
    final = resumed.train(5)
    assert final == steady.train(11)
    with pytest.raises(ValueError, match=r"is after 6 rounds, .* has 11"):
        resumed.optimizer.load_state_dict(state)
    steady.optimizer.remove()
    assert (tmp_path / "log").read_bytes() == (tmp_path / "other").read_bytes()
    with pytest.raises(ValueError, match="log of another run"):
        Task(log=tmp_path / "other", seed=1)
    with Log.open(tmp_path / "other") as log:  # no lock was left behind
        kinds = [type(record) for record in log]
    assert kinds == [Roster, *[Round] * 4, Snapshot, *[Round] * 4, Snapshot, *[Round] * 3]


def test_a_job_of_another_size_goes_on_with_the_log(tmp_path: Path) -> None:
    def train(rank: Rank) -> bytes:
        queue = rank.queue()
        task = Task(queue=queue, log=tmp_path / f"log{rank.rank}")
        found = task.train(3)
        task.optimizer.remove()
        queue.close()
        return found

    first, second = run_ranks(2, train)
    assert first == second
    run_ranks(1, train)
    with Log.open(tmp_path / "log0") as log:
        rosters = [record for record in log if isinstance(record, Roster)]
    assert [(roster.epoch, len(roster.members)) for roster in rosters] == [(0, 2), (1, 1)]


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"robust": "drop"}, "settings"),
        ({"seed": 4}, "settings"),
        ({"samples": 3}, "samples"),
        ({"eps": 0.5}, "settings"),
    ],
    ids=str,
)
def test_ranks_that_differ_are_refused_by_name(changed: dict[str, Any], what: str) -> None:
    def work(rank: Rank) -> None:
        Task(queue=rank.queue(), **(changed if rank.rank == 2 else {}))

    for outcome in run_ranks_to_the_end(3, work):
        assert isinstance(outcome, ValueError)
        assert f"rank 2 and rank 0 do not have the same {what};" in str(outcome)


def test_other_base_weights_and_other_groups_are_refused_by_name() -> None:
    def work(rank: Rank, weights: Sequence[nn.Parameter], names: Iterable[str]) -> None:
        OneByteSPSA([*zip(names, weights, strict=True)], queue=rank.queue())

    for odd, names, what in ((start(seed=9), "wv", "base weights"), (start(), "wu", "parameters")):
        outcomes = run_ranks_to_the_end(
            2, lambda r, odd=odd, names=names: work(r, [start(), odd if r.rank else start()], names if r.rank else "wv")
        )
        assert all(f"rank 1 and rank 0 do not have the same {what}" in str(outcome) for outcome in outcomes)


def test_schedules_that_differ_between_ranks_show_at_the_next_snapshot() -> None:
    def work(rank: Rank) -> None:
        task = Task(queue=rank.queue(), snapshot_every=3)
        task.optimizer.param_groups[0]["lr"] *= 1 + (rank.rank == 1)
        for number in range(3):
            assert task.optimizer.replica.rounds == number
            task.optimizer.step(lambda: half_square(*task.parameters))

    for outcome in run_ranks_to_the_end(3, work):
        assert isinstance(outcome, ModelMismatchError)
        assert "after 3 rounds, rank 1 and rank 0 have other weights. Their learning rates" in str(outcome)


def test_a_failed_exchange_leaves_weights_and_log_as_they_were(tmp_path: Path) -> None:
    def work(rank: Rank) -> None:
        queue = rank.queue(timeout_s=1.0)
        task = Task(queue=queue, log=tmp_path / f"log{rank.rank}")
        found = task.train(2)
        if rank.rank == 0:
            with pytest.raises(PeerLateError, match="onebyte/round"):
                task.train(1)
            assert task.optimizer.replica.model_hash() == found
            assert task.optimizer.log is not None
            assert task.optimizer.log.rounds == 2
            rank.store.set("done", "1")
        rank.store.wait(["done"])

    run_ranks(2, work)


class Script:
    """An exchange that says what is committed."""

    def __init__(self, replica: Replica, answers: list[list[Change]]) -> None:
        self.replica, self.answers = replica, answers
        self.closed = False

    def begin(self) -> Turn:
        return Turn(self.replica.rounds, 2, 1 if len(self.answers) % 2 else 0)

    def commit(self, turn: Turn, codes: bytes, rate: float) -> Sequence[Change]:
        assert len(codes) == turn.samples
        return self.answers.pop(0)

    def metrics(self) -> dict[str, float]:
        return {"members": 3.0}

    def close(self) -> None:
        self.closed = True


def test_another_exchange_may_undo_skip_and_catch_up(tmp_path: Path) -> None:
    one, two = (Round(0, 2.0**-10, (Contribution(slot, b"\x50"),)) for slot in (0, 1))
    more = [Round(number, 2.0**-10, (Contribution(0, b"\x40"),)) for number in range(1, 5)]
    answers = [[Change(one)], [Change(one, undone=True), Change(two)], [], [Change(round_) for round_ in more]]
    w = start()
    made: list[Script] = []

    def join(manifest: bytes, log: Log, replica: Replica) -> Script:
        assert log.manifest == manifest
        made.append(Script(replica, answers))
        return made[0]

    optimizer = OneByteSPSA([("w", w)], log=tmp_path / "log", join=join, base=lambda: {"w": start()})
    base = optimizer.replica.base_hash
    losses = [optimizer.step(lambda: half_square(w)) for _ in range(4)]
    assert [math.isnan(loss) for loss in losses] == [True, False, True, False]  # without samples, none is computed
    assert (optimizer.turn.round, optimizer.replica.rounds, optimizer.metrics()["members"]) == (1, 5, 3.0)
    direct = Replica(optimizer.manifest, [start().detach()])
    direct.apply([two, *more])
    assert direct.model_hash() == optimizer.replica.model_hash()
    optimizer.replica.rebuild()
    assert (optimizer.replica.rounds, optimizer.replica.model_hash()) == (0, base)
    with pytest.raises(ModelMismatchError, match="give base="):
        direct.rebuild()
    wrong = Replica(optimizer.manifest, [start().detach()], base=lambda: {"w": start(seed=4).detach()})
    with pytest.raises(ModelMismatchError, match="base: it gives weights"):
        wrong.rebuild()
    with pytest.raises(ValueError, match="round 3 came where round 0 is next"):
        wrong.apply([more[2]])
    optimizer.remove()
    assert made[0].closed
