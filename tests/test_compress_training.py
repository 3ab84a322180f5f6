"""Compression by its name in a configuration: clipping, checkpoints, another number of ranks, levels of the mesh."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from memory import Memory
from ranks import Rank, run_ranks
from torch import Tensor
from worlds import close_world, small_config, thread_world

from thinwire.dist.config import RunConfig, dump_config, load_config
from thinwire.dist.mesh import build_mesh
from thinwire.dist.metrics import Record
from thinwire.dist.train import Trainer

CONFIGS = Path(__file__).parents[1] / "configs"
TOPK = "{kind: topk, density: 0.05, values: int8}"


class Trained:
    def __init__(self, trainer: Trainer, records: list[Record]) -> None:
        self.records = records
        self.losses = [record["loss"] for record in records]
        self.weights: dict[str, Tensor] = {n: p.detach().clone() for n, p in trainer.engine.network.named_parameters()}
        self.state: dict[str, Any] = trainer.method.state_dict()
        self.resumed = trainer.state.resumed
        self.described = trainer.describe()


def train(config: RunConfig, size: int) -> list[Trained]:
    def work(rank: Rank) -> Trained:
        world = thread_world(rank)
        try:
            trainer = Trainer(config, world)
            memory = Memory()
            trainer.run([memory])
            return Trained(trainer, memory.records)
        finally:
            close_world(world)

    return run_ranks(size, work, timeout_s=120)


def config(folder: Path, method: str, *more: str) -> RunConfig:
    return small_config(folder, f"method={{kind: compress, {method}}}", "train.eval_windows=0", *more)


@pytest.mark.parametrize(
    "method",
    [
        f"compressor: {TOPK}, feedback: ef21_sgdm, start_step: 1",
        "compressor: int4",
        "compressor: {kind: lowrank, rank: 2}",
    ],
)
def test_a_resumed_run_continues_bit_for_bit(tmp_path: Path, method: str) -> None:
    whole = train(config(tmp_path, method, "name=whole", "train.steps=6"), 2)
    first = train(config(tmp_path, method, "name=parts", "train.steps=3", "schedule.decay_steps=6"), 2)
    second = train(config(tmp_path, method, "name=parts", "train.steps=6"), 2)
    for rank in range(2):
        assert whole[rank].losses == first[rank].losses + second[rank].losses
        assert all(torch.equal(w, second[rank].weights[name]) for name, w in whole[rank].weights.items())
        assert all(torch.equal(w, whole[0].weights[name]) for name, w in whole[rank].weights.items())


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    before = train(config(tmp_path, f"compressor: {TOPK}", "train.steps=3"), 2)
    errors = [trained.state["feedback"]["stores"]["error"] for trained in before]
    assert any(float(error.abs().max()) > 0 for error in errors[0].values())
    same_step = train(config(tmp_path, f"compressor: {TOPK}", "train.steps=3"), 4)  # nothing left to do: as restored
    for trained in same_step:
        assert "after 3 steps, with the states of 2 ranks merged" in trained.resumed
        for name, error in trained.state["feedback"]["stores"]["error"].items():
            torch.testing.assert_close(error, (errors[0][name] + errors[1][name]) / 2, rtol=1e-6, atol=1e-9)
    after = train(config(tmp_path, f"compressor: {TOPK}", "train.steps=6"), 4)
    assert [record["step"] for record in after[0].records] == [4, 5, 6]
    assert all(torch.equal(w, after[3].weights[name]) for name, w in after[0].weights.items())


def test_the_true_gradient_is_clipped_once_and_by_the_method(tmp_path: Path) -> None:
    """With a compressor that loses nothing."""
    limit = 1e-2
    (before, _), (after, _) = (
        train(config(tmp_path, f"compressor: none, clip: {clip}", f"train.clip_norm={limit}", f"name={clip}"), 2)
        for clip in ("before", "after")
    )
    for clipped, measured in zip(before.records, after.records, strict=True):
        assert clipped["method"]["gradient_norm"] > limit
        assert (
            0.5 * limit < clipped["grad_norm"] <= limit * (1 + 1e-5)
        )  # the mean of the clipped is no longer than they
        assert measured["grad_norm"] > limit  # before the trainer's own clipping
        assert "gradient_norm" not in measured["method"]


def test_the_start_of_a_run_says_what_each_tensor_costs(tmp_path: Path) -> None:
    (trained,) = train(config(tmp_path, f"compressor: {TOPK}, dense_below: 512", "train.steps=1"), 1)
    assert "method compress: each step, this rank sends nothing" in trained.described
    assert "dense bytes  sent bytes  reason" in trained.described
    assert "fewer than 512 elements" in trained.described


def test_a_level_that_is_not_one_of_the_mesh_or_holds_all_ranks_is_refused(tmp_path: Path) -> None:
    levels = "mesh.levels=[{name: pair, size: 2}, {name: world, size: 4}]"
    method = "compressor: int8, exact_within: {level}, clip: after"
    for level, message in [("rack", "has no level 'rack'"), ("world", "world holds all 4 ranks")]:
        wrong = config(tmp_path, method.format(level=level), levels)
        assert "exact_within" in dump_config(wrong)

        def refuse(rank: Rank, wrong: RunConfig = wrong, message: str = message) -> None:
            world = thread_world(rank)
            world = replace(world, mesh=build_mesh(wrong.mesh, rank=rank.rank, hosts=["here"] * rank.size))
            with pytest.raises(ValueError, match=message):
                Trainer(wrong, world)
            close_world(world)

        run_ranks(4, refuse)


def test_every_shipped_configuration_of_compression_can_be_read() -> None:
    shipped = sorted(CONFIGS.glob("compress_*.yaml"))
    assert len(shipped) >= 3
    for path in shipped:
        read = load_config(path)
        assert read.method.kind == "compress"
        assert yaml.safe_load(dump_config(read))["method"]["kind"] == "compress"
