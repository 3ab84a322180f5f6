"""The loop: it learns, resumes bit for bit, stops in order, and takes up nothing that is not finite."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from memory import Memory
from ranks import Rank, run_ranks, run_ranks_to_the_end
from worlds import close_world, small_config, thread_world

from thinwire.dist.checkpoint import CheckpointError
from thinwire.dist.config import RunConfig
from thinwire.dist.config_errors import ConfigError
from thinwire.dist.metrics import Record
from thinwire.dist.preflight import PreflightError
from thinwire.dist.step_reports import NonFiniteError
from thinwire.dist.stop import StopRequest
from thinwire.dist.train import Outcome, Trainer


class Trained:
    def __init__(self, trainer: Trainer, outcome: Outcome, records: list[Record]) -> None:
        self.outcome = outcome
        self.records = records
        self.weights = {name: p.detach().clone() for name, p in trainer.engine.network.named_parameters()}
        self.predicted = trainer.method.predicted_bytes()
        self.resumed = trainer.state.resumed


def train(config: RunConfig, size: int = 1, *, stop_rank: int = -1, stop_at: int = 0) -> list[Trained]:
    def work(rank: Rank) -> Trained:
        world = thread_world(rank)
        try:
            stop = StopRequest()
            trainer = Trainer(config, world, stop)
            memory = Memory(stop if rank.rank == stop_rank else None, stop_at)
            outcome = trainer.run([memory])
            return Trained(trainer, outcome, memory.records)
        finally:
            close_world(world)

    return run_ranks(size, work, timeout_s=120)


def losses(trained: Trained) -> list[float]:
    return [record["loss"] for record in trained.records]


def same_weights(a: Trained, b: Trained) -> bool:
    return all(torch.equal(a.weights[name], b.weights[name]) for name in a.weights)


def test_a_small_model_learns_more_than_the_frequency_of_bytes(tmp_path: Path) -> None:
    config = small_config(
        tmp_path,
        "model={kind: gpt, layers: 1, heads: 2, width: 64, context: 32}",
        "train={steps: 200, global_batch: 16, eval_windows: 64, eval_every: 100}",
    )
    counts: Counter[int] = Counter()
    for path in config.data.files:
        counts.update(Path(path).read_bytes())
    total = sum(counts.values())
    unigram_entropy = -sum(n / total * math.log(n / total) for n in counts.values())
    (trained,) = train(config)
    last = trained.records[-1]
    assert trained.records[0]["loss"] > unigram_entropy
    assert last["loss"] < 0.85 * unigram_entropy
    assert last["val_loss"] < 0.85 * unigram_entropy
    assert last["val_bits_per_byte"] == pytest.approx(last["val_loss"] / math.log(2), rel=1e-12)
    assert [record["step"] for record in trained.records if "val_loss" in record] == [100, 200]


def test_world_size_and_accumulation_change_the_numbers_by_rounding_only(tmp_path: Path) -> None:
    runs = {
        name: train(small_config(tmp_path, f"name={name}", f"train.micro_batch={micro}"), size)[0]
        for name, size, micro in [("one", 1, "auto"), ("two", 2, "auto"), ("four", 4, "auto"), ("accumulated", 2, 1)]
    }
    for run in runs.values():
        assert losses(run) == pytest.approx(losses(runs["one"]), rel=1e-4)
        assert run.records[-1]["val_loss"] == pytest.approx(runs["one"].records[-1]["val_loss"], rel=1e-3)


def test_evaluation_is_the_same_to_the_last_bit_for_every_world_size(tmp_path: Path) -> None:
    # A learning rate this small changes no weight, so all worlds score the same model.
    found = set()
    for size in (1, 2, 3):
        config = small_config(
            tmp_path,
            f"name=world{size}",
            "optimizer={kind: sgd, lr: 1.0e-30}",
            "train={steps: 1, global_batch: 6, eval_windows: 10, eval_batch: 3}",
        )
        for trained in train(config, size):
            found.add((trained.records[-1]["val_loss"], trained.records[-1]["val_bits_per_byte"]))
    assert len(found) == 1


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("optimizer", ["{kind: adamw, lr: 1e-2}", "{kind: sgd, lr: 0.1}"])
def test_resuming_continues_bit_for_bit(tmp_path: Path, size: int, optimizer: str) -> None:
    def config(name: str, steps: int) -> RunConfig:
        return small_config(tmp_path, f"name={name}", f"train.steps={steps}", f"optimizer={optimizer}", "seed=3")

    whole = train(config("whole", 6), size)
    first = train(config("parts", 3), size)
    second = train(config("parts", 6), size)
    for rank in range(size):
        assert losses(whole[rank]) == losses(first[rank]) + losses(second[rank])
        assert same_weights(whole[rank], second[rank])
        assert same_weights(whole[0], whole[rank])
        assert whole[rank].records[-1]["val_loss"] == second[rank].records[-1]["val_loss"]
        assert "after 3 steps" in second[rank].resumed


def test_checkpoints_on_the_way_can_be_continued_too(tmp_path: Path) -> None:
    (whole,) = train(small_config(tmp_path, "name=whole", "train.steps=5"))
    path = tmp_path / "runs" / "parts" / "checkpoints"
    train(small_config(tmp_path, "name=parts", "train.steps=5", "checkpoint.every_steps=2", "checkpoint.keep=3"))
    assert sorted(p.name for p in path.iterdir() if p.name.startswith("step")) == [
        f"step-{step:08d}" for step in (2, 4, 5)
    ]
    (other,) = train(small_config(tmp_path, "name=branch", "train.steps=5", f"checkpoint.resume={path}/step-00000002"))
    assert losses(other) == losses(whole)[2:]
    assert same_weights(whole, other)


def test_another_runs_checkpoint_is_a_start_with_the_present_settings(tmp_path: Path) -> None:
    train(small_config(tmp_path, "name=source", "train.steps=2"))
    source = tmp_path / "runs" / "source" / "checkpoints"
    branch = ["name=branch", "train.steps=4", f"checkpoint.resume={source}"]

    def work(rank: Rank) -> list[dict[str, Any]]:
        world = thread_world(rank)
        try:
            trainer = Trainer(small_config(tmp_path, *branch, "optimizer.weight_decay=0.25"), world)
            assert trainer.state.step == 2
            return trainer.engine.optimizer.param_groups
        finally:
            close_world(world)

    assert [group["weight_decay"] for group in run_ranks(1, work)[0]] == [0.25, 0.0]
    with pytest.raises(ValueError, match=r"optimizer\.kind: sgd, .* written with adamw"):
        train(small_config(tmp_path, *branch, "optimizer={kind: sgd, lr: 0.1}"))
    (first,) = train(small_config(tmp_path, *branch))
    (again,) = train(small_config(tmp_path, *branch))  # its own checkpoint comes first
    assert "after 4 steps" in again.resumed
    assert same_weights(first, again)
    with pytest.raises(CheckpointError, match=r"nowhere holds no checkpoint.* checkpoint\.resume"):
        train(small_config(tmp_path, "name=lost", f"checkpoint.resume={tmp_path}/nowhere"))


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    (first,) = train(small_config(tmp_path))
    (second,) = train(small_config(tmp_path))
    assert second.records == []
    assert second.outcome == Outcome(4, (), None)
    assert same_weights(first, second)


def test_a_run_with_other_numbers_is_not_continued(tmp_path: Path) -> None:
    train(small_config(tmp_path))
    with pytest.raises(ConfigError, match=r"optimizer\.lr: 0\.01 in the checkpoint, 0\.02 now"):
        train(small_config(tmp_path, "optimizer.lr=0.02"))
    with pytest.raises(ConfigError, match=r"training text: .* in the checkpoint"):
        train(small_config(tmp_path, f"data.files={json.dumps(small_config(tmp_path).data.files[:20])}"))
    train(small_config(tmp_path, "train.eval_every=1", "world.timeout_s=99", "checkpoint.keep=4"))  # no numbers


def test_the_end_of_a_cosine_is_a_number(tmp_path: Path) -> None:
    train(small_config(tmp_path, "schedule.kind=cosine", "train.steps=2"))
    with pytest.raises(ConfigError, match=r"schedule\.decay_steps: 2 in the checkpoint, 3 now"):
        train(small_config(tmp_path, "schedule.kind=cosine", "train.steps=3"))
    (trained,) = train(small_config(tmp_path, "schedule.kind=cosine", "schedule.decay_steps=2", "train.steps=3"))
    assert [record["step"] for record in trained.records] == [3]


@pytest.mark.parametrize("stop_rank", [0, 2])
def test_all_ranks_stop_after_the_same_step_and_the_run_continues(tmp_path: Path, stop_rank: int) -> None:
    config = small_config(tmp_path, "name=stopped", "train.steps=9", "train.global_batch=9")
    stopped = train(config, 3, stop_rank=stop_rank, stop_at=2)
    steps = {trained.outcome.step for trained in stopped}
    assert len(steps) == 1
    step = steps.pop()
    assert 2 < step < 6
    assert all(trained.outcome.stopped_by == (stop_rank,) for trained in stopped)
    assert [record["step"] for record in stopped[0].records] == list(range(1, step + 1))
    rest = train(config, 3)
    whole = train(small_config(tmp_path, "name=whole", "train.steps=9", "train.global_batch=9"), 3)
    assert losses(stopped[1]) + losses(rest[1]) == losses(whole[1])
    assert same_weights(rest[2], whole[2])


def test_records_say_what_was_metered(tmp_path: Path) -> None:
    for dtype, ratio in (("fp32", 1), ("bf16", 2)):
        config = small_config(tmp_path, f"name={dtype}", f"method.dtype={dtype}", "engine.bucket_mb=0.02")
        for trained in train(config, 2):
            for record in trained.records[1:]:  # DDP lays out its buckets anew after the first step
                assert record["sent_bytes_by_level"] == trained.predicted
                assert record["sent_bytes"] == record["received_bytes"] == sum(trained.predicted.values()) > 0
                assert record["compression_ratio"] == pytest.approx(ratio, rel=1e-3)
                assert record["control_sent_bytes"] == 16
                assert record["method"]["buckets"] > 1
                assert record["compute_ms"] + record["exposed_comm_ms"] == pytest.approx(1e3 * record["step_s"])
                assert record["interface_sent_bytes"] > record["sent_bytes"]
            assert [r["seconds"] for r in trained.records] == sorted(r["seconds"] for r in trained.records)


def run_with_fault(config: RunConfig, size: int, break_it: Any) -> tuple[list[Any], list[Trainer]]:
    trainers: list[Any] = [None] * size

    def work(rank: Rank) -> Outcome:
        world = thread_world(rank)
        try:
            trainers[rank.rank] = trainer = Trainer(config, world)
            break_it(rank.rank, trainer)
            return trainer.run()
        finally:
            close_world(world)

    return run_ranks_to_the_end(size, work, timeout_s=120), trainers


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_loss_is_reported_by_all_and_taken_up_by_none(tmp_path: Path, value: float) -> None:
    before: dict[int, torch.Tensor] = {}

    def break_it(rank: int, trainer: Trainer) -> None:
        module = trainer.engine.network

        def spoil(*_: object) -> None:
            if trainer.state.step == 2:
                before[rank] = module.embedding.weight.detach().clone()
                if rank == 1:
                    with torch.no_grad():
                        module.norm.weight[0] = value

        module.register_forward_pre_hook(spoil)

    errors, trainers = run_with_fault(small_config(tmp_path, "train.global_batch=9"), 3, break_it)
    for rank, (error, trainer) in enumerate(zip(errors, trainers, strict=True)):
        assert isinstance(error, NonFiniteError), error
        assert (error.step, error.ranks) == (3, (1,))
        assert "step 3" in str(error)
        assert "rank 1" in str(error)
        assert torch.equal(trainer.engine.network.embedding.weight, before[rank])
        assert torch.isfinite(before[rank]).all()


def test_a_gradient_that_overflows_on_the_wire_is_reported(tmp_path: Path) -> None:
    def break_it(rank: int, trainer: Trainer) -> None:
        if rank == 0:
            trainer.engine.network.embedding.weight.register_hook(lambda gradient: gradient * 1e12)

    errors, _ = run_with_fault(small_config(tmp_path, "method.dtype=fp16"), 2, break_it)
    for error in errors:
        assert isinstance(error, NonFiniteError), error
        assert (error.step, error.ranks) == (1, ())
        assert "overflowed" in str(error)


def test_a_non_finite_loss_with_finite_gradients_is_reported(tmp_path: Path) -> None:
    def break_it(rank: int, trainer: Trainer) -> None:
        compute = trainer._forward_backward
        trainer._forward_backward = lambda: compute() if rank == 0 else compute() * math.inf  # type: ignore[method-assign]

    errors, _ = run_with_fault(small_config(tmp_path), 2, break_it)
    for error in errors:
        assert isinstance(error, NonFiniteError), error
        assert (error.step, error.ranks) == (1, (1,))


def test_ranks_with_different_settings_do_not_start(tmp_path: Path) -> None:
    configs = [small_config(tmp_path, f"optimizer.lr={lr}") for lr in (0.25, 0.5, 0.25, 0.25)]

    def work(rank: Rank) -> Trainer:
        world = thread_world(rank)
        try:
            return Trainer(configs[rank.rank], world)
        finally:
            close_world(world)

    for error in run_ranks_to_the_end(4, work):
        assert isinstance(error, PreflightError), error
        assert "config.optimizer.lr: rank 1 has 0.5; the others have 0.25" in str(error)


def test_bf16_trains_like_fp32(tmp_path: Path) -> None:
    (fp32,) = train(small_config(tmp_path, "name=fp32", "train.steps=30"))
    (bf16,) = train(small_config(tmp_path, "name=bf16", "train.steps=30", "train.precision=bf16"))
    assert losses(bf16) != losses(fp32)
    assert losses(bf16)[-1] == pytest.approx(losses(fp32)[-1], rel=0.03)
    assert all(weight.dtype == torch.float32 for weight in bf16.weights.values())


def test_the_description_says_what_a_step_will_send(tmp_path: Path) -> None:
    config = small_config(tmp_path)

    def work(rank: Rank) -> str:
        world = thread_world(rank)
        try:
            return Trainer(config, world).describe()
        finally:
            close_world(world)

    text = run_ranks(2, work)[0]
    assert "gpt with 20,576 parameters" in text
    assert f"{20_576 * 4:,} bytes over node" in text
