"""Gossip in whole training runs: records, merges, cuts, resuming, other machines, a machine that is gone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Rank, run_ranks, run_ranks_to_the_end
from torch import Tensor, nn
from worlds import close_world, small_config, thread_world

from thinwire.comm.errors import OwnWeightsError
from thinwire.dist.gossip_train import GossipTrainer
from thinwire.dist.step_reports import NonFiniteError

SIZE = 3
SIX_STEPS = ("train.global_batch=12", "train.steps=6", "schedule={kind: constant}", "checkpoint.every_steps=4")
ROUNDS = "method={kind: gossip, graph: ring, schedule: {kind: single_merge, probability: 0.5}, probe_every: 2}"
OWN_PACE = "method={kind: gossip, graph: ring, algorithm: ad_psgd, schedule: {kind: every, merge_at: end}}"


class Records:
    def __init__(self) -> None:
        self.all: list[dict[str, Any]] = []

    def write(self, record: dict[str, Any]) -> None:
        self.all.append(json.loads(json.dumps(record, allow_nan=False)))

    def close(self) -> None: ...


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def trained(config: Any, size: int = SIZE) -> list[tuple[list[dict[str, Any]], dict[str, Tensor]]]:
    """For each rank: its records, and its weights at the end."""

    def work(rank: Rank) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        world = thread_world(rank)
        try:
            trainer, records = GossipTrainer(config, world), Records()
            trainer.run([records])
            return records.all, weights(trainer.model)
        finally:
            close_world(world)

    return run_ranks(size, work, timeout_s=120)


def test_a_run_ends_in_one_merge_and_continues_bit_for_bit(tmp_path: Path) -> None:
    whole = trained(small_config(tmp_path, "name=whole", ROUNDS, *SIX_STEPS, "train.eval_every=2"))
    stopped = small_config(tmp_path, "name=stopped", ROUNDS, *SIX_STEPS, "train.eval_every=2")
    trained(stopped)
    shutil.rmtree(tmp_path / "runs" / "stopped" / "checkpoints" / "step-00000006")
    continued = trained(stopped)
    for (records, own), (all_records, whole_own) in zip(continued, whole, strict=True):
        assert [r["step"] for r in records] == [5, 6]
        assert [r["loss"] for r in records] == [r["loss"] for r in all_records[4:]]
        assert equal(own, whole_own)
        assert equal(own, whole[0][1])  # merged
    first, other = whole[0][0], whole[1][0]
    assert [r["step"] for r in first] == [1, 2, 3, 4, 5, 6]
    assert first[0]["loss"] != other[0]["loss"]
    assert first[1]["val_loss"] != other[1]["val_loss"]  # each its own model's
    assert first[5]["val_loss"] == other[5]["val_loss"]  # the merged one's
    assert first[5]["own_val_loss"] != other[5]["own_val_loss"]
    assert first[5]["method"]["merges"] == 1
    assert first[5]["method"]["consensus_distance"] >= 0
    by_edge = sum(count for key, count in first[5]["method"].items() if key.startswith("sent_to/"))
    assert 0 < by_edge - sum(r["sent_bytes"] for r in first) < 64  # what machines agree with before they meet
    assert (tmp_path / "runs" / "whole" / "model.safetensors").exists()


def test_a_run_continues_among_other_machines_from_the_mean(tmp_path: Path) -> None:
    settings = (
        "method={kind: gossip, graph: ring, schedule: every}",
        *SIX_STEPS,
        "train.steps=5",
    )
    stopped = small_config(tmp_path, *settings)
    trained(stopped)
    shutil.rmtree(tmp_path / "runs" / "small" / "checkpoints" / "step-00000005")
    for size in (2, 4):
        results = trained(stopped, size)
        shutil.rmtree(tmp_path / "runs" / "small" / "checkpoints" / "step-00000005")
        assert all([r["step"] for r in records] == [5] for records, _ in results)
        assert all(bool(w.isfinite().all()) for _, own in results for w in own.values())


def test_machines_of_own_pace_end_together_and_merge(tmp_path: Path) -> None:
    results = trained(small_config(tmp_path, OWN_PACE, *SIX_STEPS))
    assert all(equal(own, results[0][1]) for _, own in results)
    assert max(records[-1]["step"] for records, _ in results) == 6
    assert len({records[-1]["val_loss"] for records, _ in results}) == 1


@pytest.mark.parametrize("method", [ROUNDS, OWN_PACE], ids=["rounds", "own pace"])
def test_one_machine_that_is_asked_to_stop_stops_all(tmp_path: Path, method: str) -> None:
    config = small_config(
        tmp_path, method, *SIX_STEPS, "train.steps=60", "checkpoint.every_steps=0", "method.deadline_s=1"
    )

    def work(rank: Rank) -> tuple[int, tuple[int, ...]]:
        world = thread_world(rank)
        try:
            trainer = GossipTrainer(config, world)
            if rank.rank == 1:
                trainer.stop.reason = "SIGTERM"
            outcome = trainer.run()
            return outcome.step, outcome.stopped_by
        finally:
            close_world(world)

    outcomes = run_ranks(SIZE, work, timeout_s=120)
    assert all(step < 60 and stopped_by for step, stopped_by in outcomes)
    if method == ROUNDS:
        assert len({step for step, _ in outcomes}) == 1
    assert (tmp_path / "runs" / "small" / "checkpoints" / f"step-{max(s for s, _ in outcomes):08d}").exists()


def test_values_that_are_not_finite_end_one_machine_and_not_the_others(tmp_path: Path) -> None:
    config = small_config(
        tmp_path,
        "method={kind: gossip, graph: ring, schedule: every, deadline_s: 30}",
        *SIX_STEPS,
        "checkpoint.every_steps=0",
    )

    def work(rank: Rank) -> tuple[int, float, frozenset[int]]:
        world = thread_world(rank)
        try:
            trainer, records = GossipTrainer(config, world), Records()
            if rank.rank == 1:
                weight = trainer.model.embedding.weight
                weight.register_hook(lambda g: g * torch.inf if trainer.state.step == 2 else g)
            outcome = trainer.run([records])
            return outcome.step, records.all[-1]["val_loss"], trainer.lost
        finally:
            close_world(world)

    first, second, third = run_ranks_to_the_end(SIZE, work, timeout_s=120)
    assert isinstance(second, NonFiniteError)
    assert second.ranks == (1,)
    assert first[0] == third[0] == 6
    assert first[1] == third[1]
    assert first[2] == third[2] == frozenset({1})


def test_weights_that_are_not_finite_are_refused_by_their_machine(tmp_path: Path) -> None:
    config = small_config(tmp_path, "method={kind: gossip, graph: ring, schedule: every}", *SIX_STEPS)

    def work(rank: Rank) -> dict[str, float]:
        world = thread_world(rank)
        try:
            trainer = GossipTrainer(config, world)

            def spoil(*_: object) -> None:
                trainer.model.embedding.weight.data.fill_(torch.nan)

            if rank.rank == 1:
                trainer.optimizer.register_step_pre_hook(spoil)
            trainer.run()
            return trainer.method.metrics()
        finally:
            close_world(world)

    first, second, third = run_ranks_to_the_end(SIZE, work, timeout_s=120)
    assert isinstance(second, OwnWeightsError)
    assert first["absent"] == third["absent"] == 1
