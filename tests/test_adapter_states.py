"""What adapters keep of all ranks: gathered without pickle, by rank in files, taken over by other numbers of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Rank, run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten
from worlds import close_world, thread_world

from thinwire.dist.adapters.attached import Attached, attach, settings_of
from thinwire.dist.adapters.rank_files import read_rank_states, write_rank_state
from thinwire.dist.adapters.rank_states import gather_at_first

LOWRANK = {"kind": "compress", "compressor": {"kind": "lowrank", "rank": 1}, "dense_below": 8}
LOCAL = {"kind": "local_sgd", "every": 2}


class Job:
    """One rank with a small model, an Adam, and a method."""

    def __init__(self, rank: Rank, method: dict[str, Any]) -> None:
        self.world = thread_world(rank)
        self.model = nn.Linear(6, 4)
        with torch.no_grad():
            for number, parameter in enumerate(self.model.parameters()):
                parameter.copy_(torch.linspace(-1, 1 + number, parameter.numel()).view_as(parameter))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.wrapped = DistributedDataParallel(self.model, process_group=rank.group, init_sync=False)
        self.attached: Attached = attach(settings_of(method, "test"), self.wrapped, self.optimizer, world=self.world)

    def step(self, rank: Rank) -> None:
        self.optimizer.zero_grad()
        x = torch.arange(18.0).view(3, 6) * (1 + rank.rank)
        self.wrapped(x.cos()).square().sum().backward()
        self.optimizer.step()

    def weights(self) -> dict[str, torch.Tensor]:
        return dict(self.model.named_parameters())


def equal(a: Any, b: Any) -> bool:
    (values, form), (others, other_form) = tree_flatten(a), tree_flatten(b)
    return form == other_form and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(values, others, strict=True)
    )


def write(folder: Path, method: dict[str, Any], steps: int) -> list[Any]:
    """The states of two ranks, which are in the folder too."""

    def work(rank: Rank) -> Any:
        job = Job(rank, method)
        try:
            for _ in range(steps):
                job.step(rank)
            own = job.attached.own_state()
            gathered = gather_at_first(own, job.world.queue, torch.device("cpu"))
            write_rank_state(folder, own, job.world.queue, job.weights())
            return own, gathered, {name: p.detach().clone() for name, p in job.weights().items()}
        finally:
            close_world(job.world)

    found = run_ranks(2, work)
    states = [own for own, _, _ in found]
    assert equal(found[0][1], states)
    assert found[1][1] == []
    assert equal(read_rank_states(folder, found[0][2]), states)
    return states


def test_error_memories_go_on_among_other_ranks(tmp_path: Path) -> None:
    states = write(tmp_path, LOWRANK, steps=2)
    errors = [state["method"]["feedback"]["stores"]["error"] for state in states]
    assert not equal(*errors)

    def work(rank: Rank) -> Any:
        job = Job(rank, LOWRANK)
        try:
            job.attached.load_state_dict({"all_ranks": states})
            job.step(rank)
            return job.attached.metrics(), {n: p.detach().clone() for n, p in job.weights().items()}
        finally:
            close_world(job.world)

    merged = run_ranks(3, work)
    assert all(equal(weights, merged[0][1]) for _, weights in merged)


def test_each_rank_gets_its_own_optimizer_back_whatever_the_loop_has_loaded(tmp_path: Path) -> None:
    states = write(tmp_path, LOCAL, steps=2)
    assert not equal(states[0]["optimizer"], states[1]["optimizer"])

    def work(rank: Rank) -> Any:
        job = Job(rank, LOCAL)
        try:
            job.attached.load_state_dict({"all_ranks": states})
            # As Lightning does it, after the callback: what it has kept, which is rank 0's.
            groups = job.optimizer.state_dict()["param_groups"]
            job.optimizer.load_state_dict({"state": states[0]["optimizer"], "param_groups": groups})
            return job.attached.own_state()["optimizer"]
        finally:
            close_world(job.world)

    assert equal(run_ranks(2, work), [state["optimizer"] for state in states])


def test_nothing_is_kept_in_the_middle_of_a_round(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="in the middle of a round of 2 steps, where each rank has weights of its own"):
        write(tmp_path, LOCAL, steps=1)
    assert not list(tmp_path.iterdir())


def test_files_that_are_missing_damaged_or_of_other_weights_are_refused(tmp_path: Path) -> None:
    write(tmp_path, LOWRANK, steps=1)
    with pytest.raises(ValueError, match="written beside other weights than the model has now"):
        read_rank_states(tmp_path, {"weight": torch.zeros(4, 6)})
    first, second = sorted(tmp_path.iterdir())
    second.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"the states of ranks \[1\] of 2 are missing"):
        read_rank_states(tmp_path, {})
    (tmp_path / "elsewhere").rename(second)
    first.write_bytes(first.read_bytes()[:-9])
    with pytest.raises(ValueError, match="cannot be read as a state of thinwire"):
        read_rank_states(tmp_path, {})
    first.rename(tmp_path / "thinwire-rank0-of-3.safetensors")
    with pytest.raises(ValueError, match=r"states of \[2, 3\] ranks"):
        read_rank_states(tmp_path, {})
    assert read_rank_states(tmp_path / "nowhere", {}) == []


def test_another_methods_state_is_refused() -> None:
    def work(rank: Rank) -> None:
        job = Job(rank, LOWRANK)
        try:
            with pytest.raises(ValueError, match="no state of all ranks"):
                job.attached.load_state_dict({})
            with pytest.raises(ValueError, match="not its own state"):
                job.attached.load_state_dict({"all_ranks": [{"method": {"theta": {}}}]})
        finally:
            close_world(job.world)

    run_ranks(1, work)
