"""Checkpointer among several ranks, on shared and separate disks: who writes what, and what a failure leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import alone, among, assert_same
from ranks import Rank, run_ranks, run_ranks_to_the_end

from thinwire.comm.errors import CommError
from thinwire.dist import checkpoint_agreement
from thinwire.dist.checkpoint import (
    Checkpointer,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointSettings,
    Loaded,
)


@pytest.mark.parametrize("layout", [[0, 0, 0], [0, 1, 2], [0, 1, 0]])
def test_each_disk_gets_one_copy_and_every_rank_its_own_state(tmp_path: Path, layout: list[int]) -> None:
    weights = {f"w{i}": torch.randn(50, 50) for i in range(6)}

    def work(rank: Rank) -> Loaded | None:
        folder = tmp_path / f"disk{layout[rank.rank]}"
        checkpoints = among(rank, folder)
        assert sorted(map(sorted, checkpoints.disks)) == sorted(
            [r for r in range(3) if layout[r] == disk] for disk in sorted(set(layout))
        )
        own = {"rng": torch.full((3,), rank.rank), "rank": rank.rank}
        checkpoints.save(1, {"model": weights}, own, {"lr": 0.1})
        checkpoints.save(2, {"model": weights}, own, {"lr": 0.1})
        return among(rank, folder).load_latest({"model": weights})

    for rank, loaded in enumerate(run_ranks(3, work)):
        assert loaded is not None
        assert_same(loaded.shared, {"model": weights})
        assert_same(loaded.per_rank, {"rng": torch.full((3,), rank), "rank": rank})
    for disk in set(layout):
        files = {p.name: p.stat().st_size for p in (tmp_path / f"disk{disk}" / "step-00000002").iterdir()}
        shared = [size for name, size in files.items() if name.startswith("shared-")]
        assert sum(shared) - 6 * 10_000 in range(6 * 64)  # once, whoever wrote it
        assert len(shared) == layout.count(disk)  # and by all, about equally
        assert max(shared) - min(shared) <= 10_064
        own = sorted(name for name in files if name.startswith("rank-") and name.endswith(".json"))
        assert own == [f"rank-{r:05d}.json" for r in range(3) if layout[r] == disk]


@pytest.mark.parametrize("layout", [[0, 0], [0, 1]])
def test_all_ranks_go_back_to_the_newest_generation_that_all_can_read(tmp_path: Path, layout: list[int]) -> None:
    def save(rank: Rank) -> None:
        checkpoints = among(rank, tmp_path / str(layout[rank.rank]), keep=3)
        for step in (1, 2, 3):
            checkpoints.save(step, {"step": step, "w": torch.ones(3)}, {"rank": torch.tensor(rank.rank)})

    run_ranks(2, save)
    data = tmp_path / str(layout[1]) / "step-00000003" / "rank-00001.bin"
    data.write_bytes(data.read_bytes()[:-1] + b"\x07")

    def load(rank: Rank) -> Loaded | None:
        checkpoints = among(rank, tmp_path / str(layout[rank.rank]), keep=3)
        loaded = checkpoints.load_latest()
        checkpoints.save(4, {}, {})
        return loaded

    for loaded in run_ranks(2, load):
        assert loaded is not None
        assert (loaded.step, loaded.shared["step"]) == (2, 2)
        assert len(loaded.refused) == 1
        assert "rank 1: rank-00001.bin is damaged" in loaded.refused[0]
    for disk in set(layout):
        names = sorted(p.name for p in (tmp_path / str(disk)).iterdir())
        assert names == ["step-00000001", "step-00000002", "step-00000004"]


def test_a_kill_between_the_renames_of_two_disks_leaves_a_common_generation(tmp_path: Path) -> None:
    def save(steps: tuple[int, ...]) -> Callable[[Rank], Loaded | None]:
        def work(rank: Rank) -> Loaded | None:
            checkpoints = among(rank, tmp_path / str(rank.rank))
            loaded = checkpoints.load_latest()
            for step in steps:
                checkpoints.save(step, {"step": step, "first": loaded is None}, {})
            return loaded

        return work

    run_ranks(2, save((1, 2)))
    # Rank 1 was killed before its rename of step 2: only rank 0 has it.
    (tmp_path / "1" / "step-00000002").rename(tmp_path / "1" / ".writing-00")
    loaded = run_ranks(2, save((2,)))
    assert [x.step for x in loaded if x] == [1, 1]
    assert all("ranks [1] do not have it" in x.refused[0] for x in loaded if x)
    final = run_ranks(2, save(()))
    assert [(x.step, x.shared["first"]) for x in final if x] == [(2, False)] * 2


def test_a_kill_while_a_step_is_written_again_leaves_the_first_writing(tmp_path: Path) -> None:
    def save(values: tuple[int, ...]) -> Callable[[Rank], Loaded | None]:
        def work(rank: Rank) -> Loaded | None:
            checkpoints = among(rank, tmp_path / str(rank.rank))
            loaded = checkpoints.load_latest()
            for value in values:
                checkpoints.save(5, {"value": value}, {})
            return loaded

        return work

    run_ranks(2, save((1,)))
    first = tmp_path / "first"
    (tmp_path / "0" / "step-00000005").rename(first)
    # Rank 0 has renamed both, rank 1 has done nothing yet.
    other = tmp_path / "other"
    alone(other).save(5, {"value": 2}, {})
    (other / "step-00000005").rename(tmp_path / "0" / "step-00000005")
    first.rename(tmp_path / "0" / "step-00000005.replaced-00")
    loaded = run_ranks(2, save((3,)))
    assert [x.shared for x in loaded if x] == [{"value": 1}] * 2
    assert [x.shared for x in run_ranks(2, save(())) if x] == [{"value": 3}] * 2


def test_a_rank_that_fails_fails_all_and_leaves_the_older_generation(tmp_path: Path) -> None:
    def work(rank: Rank) -> None:
        checkpoints = among(rank, tmp_path)
        checkpoints.save(1, {"x": torch.ones(2)}, {})
        for step, shared, own in (
            (2, {"x": torch.ones(2)}, {"bad": object() if rank.rank == 1 else 1}),
            (3, {"x": torch.ones(2 + rank.rank)}, {}),
            (4, {"x": rank.rank}, {}),
        ):
            with pytest.raises(CheckpointError) as failure:
                checkpoints.save(step, shared, own)
            texts[rank.rank].append(str(failure.value))
        checkpoints.save(5, {"x": torch.ones(2)}, {})

    texts: list[list[str]] = [[], []]
    run_ranks(2, work)
    assert texts[0] == texts[1]
    bad, shape, value = texts[0]
    assert "rank 1: bad is a builtins.object" in bad
    assert "older checkpoints" in bad
    assert "x is torch.float32 of size (2,) on one rank and torch.float32 of size (3,) on another" in shape
    assert "plain values in `shared` on ranks [1] differ" in value
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000005"]


def test_another_world_size_is_refused_unless_all_states_are_asked_for(tmp_path: Path) -> None:
    def save(rank: Rank) -> None:
        among(rank, tmp_path).save(1, {"w": torch.arange(4)}, {"rank": rank.rank, "error": torch.full((2,), rank.rank)})

    def load(rank: Rank) -> Loaded | None:
        with pytest.raises(CheckpointMismatchError, match=r"written by 3 ranks, and this job has \d"):
            among(rank, tmp_path).load_latest()
        return among(rank, tmp_path).load_latest(world_size_changed="all_ranks")

    run_ranks(3, save)
    for size in (1, 2):
        for loaded in run_ranks(size, load):
            assert loaded is not None
            assert loaded.world_size == 3
            assert loaded.per_rank is None
            assert loaded.shared["w"].equal(torch.arange(4))
            assert [tree["rank"] for _, tree in sorted(loaded.per_rank_of_all.items())] == [0, 1, 2]
            assert loaded.per_rank_of_all[2]["error"].equal(torch.full((2,), 2))


def test_a_state_that_is_not_on_this_disk_is_named(tmp_path: Path) -> None:
    def save(rank: Rank) -> None:
        among(rank, tmp_path / str(rank.rank)).save(1, {}, {})

    def load_swapped(rank: Rank) -> None:
        among(rank, tmp_path / str(1 - rank.rank)).load_latest()

    run_ranks(2, save)
    for outcome in run_ranks_to_the_end(2, load_swapped):
        assert isinstance(outcome, CheckpointError)
        assert "rank 0: this disk has the states of ranks [1], not of [0]" in str(outcome)


def test_ranks_without_any_checkpoint_stop_those_that_have_one(tmp_path: Path) -> None:
    alone(tmp_path / "0").save(1, {}, {})
    outcomes = run_ranks_to_the_end(2, lambda rank: among(rank, tmp_path / str(rank.rank)).load_latest())
    for outcome in outcomes:
        assert isinstance(outcome, CheckpointError)
        assert "step-00000001: ranks [1] do not have it" in str(outcome)


def test_slow_work_of_one_rank_does_not_run_into_the_groups_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank works until the others have exchanged many more ticks than their group's deadline is long."""
    monkeypatch.setattr(checkpoint_agreement, "TICK_S", 0.05)
    ticks: list[int] = []

    def work(rank: Rank) -> list[object]:
        group = rank.new_group("short", timeout_s=1.0)
        agreement = checkpoint_agreement.Agreement(group, rank.rank, rank.size)
        if rank.rank == 1:
            gather = agreement._all_gather
            monkeypatch.setattr(agreement, "_all_gather", lambda *a: (ticks.append(1), gather(*a))[1])

        def job() -> str:
            while rank.rank == 0 and len(ticks) < 40:
                torch.ones(1000).sum()
            return f"done {rank.rank}"

        return agreement.run("long work", job)

    assert run_ranks(2, work) == [["done 0", "done 1"]] * 2


def test_a_lost_peer_is_a_communication_error(tmp_path: Path) -> None:
    def work(rank: Rank) -> None:
        if rank.rank == 0:
            group = rank.new_group("short", timeout_s=1.0)
            Checkpointer(tmp_path, CheckpointSettings(), group=group, rank=0, world_size=2)
        else:
            rank.new_group("short", timeout_s=1.0)

    first, second = run_ranks_to_the_end(2, work)
    assert isinstance(first, CommError)
    assert "creation of the checkpoint folder" in first.operation
    assert second is None
