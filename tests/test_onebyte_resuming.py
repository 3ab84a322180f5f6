"""OneByteSPSA goes on: from its state, from its log, with other ranks, after failures; or refuses to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Rank, run_ranks, run_ranks_to_the_end
from torch import Tensor, nn

from thinwire.comm.errors import PeerLateError
from thinwire.comm.onebyte.errors import ModelMismatchError
from thinwire.comm.onebyte.exchange import Change, Turn
from thinwire.comm.onebyte.log import Log
from thinwire.comm.onebyte.optimizer import OneByteSPSA
from thinwire.comm.onebyte.replica import Replica
from thinwire.comm.onebyte.rounds import Contribution, Roster, Round, Snapshot

D = 96


def start(*shape: int, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(*(shape or (D,)), generator=torch.Generator().manual_seed(seed)))


def half_square(*weights: Tensor) -> Tensor:
    return sum((w.detach().double().square().sum() / 2 for w in weights), torch.zeros((), dtype=torch.float64))


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
