"""Training by forward passes: it learns, its log is its checkpoint, and what it has no use for is refused."""

from __future__ import annotations

import json
import math
import queue
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from memory import Memory
from ranks import Rank, run_ranks, run_ranks_to_the_end
from safetensors.torch import load_file
from worlds import close_world, small_settings, small_text, thread_world

from thinwire.comm.onebyte.exchange import Turn
from thinwire.comm.onebyte.log import Log, LogError
from thinwire.comm.onebyte.rounds import Round
from thinwire.dist.config import ConfigError, RunConfig
from thinwire.dist.metrics import Record
from thinwire.dist.onebyte_run import AllRoundsDoneError, TimedExchange
from thinwire.dist.step_reports import NonFiniteError
from thinwire.dist.stop import StopRequest
from thinwire.dist.train import Outcome, Trainer
from thinwire.dist.zeroth_order import ZerothOrderTrainer
from thinwire.launch.train import main

ONEBYTE = {"kind": "onebyte", "lr": 2e-3, "samples": 2, "step_size": "ema", "ema_decay": 0.9}


def settings_of(folder: Path, **changes: Any) -> dict[str, Any]:
    settings = small_settings(folder) | {"name": "run", "method": ONEBYTE}
    del settings["optimizer"]
    return settings | changes


def config_of(folder: Path, *, steps: int = 6, **changes: Any) -> RunConfig:
    train = {"steps": steps, "global_batch": 12, "eval_windows": 10, "eval_batch": 3}
    return RunConfig.model_validate_json(json.dumps(settings_of(folder, **({"train": train} | changes))), strict=True)


class Trained:
    def __init__(self, trainer: ZerothOrderTrainer, outcome: Outcome, records: list[Record]) -> None:
        self.outcome, self.records = outcome, records
        self.weights = {name: p.detach().clone() for name, p in trainer.task.network.named_parameters()}
        self.resumed = trainer.state.resumed
        self.predicted = trainer.method.predicted_bytes()
        self.described = trainer.describe()


def train(config: RunConfig, size: int = 1, *, stop_at: int = 0, stop_rank: int = 0) -> list[Trained]:
    def work(rank: Rank) -> Trained:
        world = thread_world(rank)
        try:
            stop = StopRequest()
            trainer = ZerothOrderTrainer(config, world, stop)
            memory = Memory(stop, stop_at if rank.rank == stop_rank else -1)
            return Trained(trainer, trainer.run([memory]), memory.records)
        finally:
            close_world(world)

    return run_ranks(size, work, timeout_s=120)


def same(a: Trained, b: Trained) -> bool:
    return all(torch.equal(a.weights[name], b.weights[name]) for name in a.weights)


def test_a_small_model_learns_without_a_backward_pass(tmp_path: Path) -> None:
    steps = 24
    train_settings = {"steps": steps, "global_batch": 16, "eval_every": steps // 2}
    config = config_of(tmp_path, train=train_settings, method=ONEBYTE | {"lr": 6e-3})
    (trained,) = train(config)
    records = trained.records
    assert [record["step"] for record in records] == list(range(1, steps + 1))
    assert records[-1]["val_loss"] < records[steps // 2 - 1]["val_loss"] < records[0]["loss"] - 0.05
    assert records[-1]["val_loss"] < records[0]["loss"] - 0.15
    assert all(record["method"]["contributions"] == 2 for record in records)
    assert all(record["sent_bytes"] == 0 for record in records)
    stored = load_file(config.folder / "model.safetensors")
    assert all(torch.equal(stored[name], weights) for name, weights in trained.weights.items())
    assert "115,008" not in trained.described
    assert "4 times" in trained.described


def test_ranks_send_a_byte_per_direction_and_stay_equal(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    ranks = train(config, 3)
    assert all(same(ranks[0], other) for other in ranks)
    for rank in ranks:
        assert sum(rank.predicted.values()) == 2 * 2  # two directions, to each of two others
        assert {record["sent_bytes"] for record in rank.records} == {4}
        assert [r["loss"] for r in rank.records] == [r["loss"] for r in ranks[0].records]
        assert rank.records[0]["method"]["contributions"] == 6
    contents = {path.read_bytes() for path in config.folder.glob("onebyte*.log")}
    assert len(list(config.folder.glob("onebyte*.log"))) == 3
    assert len(contents) == 1
    with Log.open(config.folder / "onebyte.log", read_only=True) as log:
        assert log.rounds == 6


def test_each_rank_reads_its_own_share_of_the_batch(tmp_path: Path) -> None:
    config = config_of(tmp_path, train={"steps": 2, "global_batch": 12, "micro_batch": 2})

    def work(rank: Rank) -> list[torch.Tensor]:
        world = thread_world(rank)
        try:
            trainer = ZerothOrderTrainer(config, world)
            read: list[torch.Tensor] = []
            inner = trainer.task.data.training_batch

            def training_batch(samples: range, device: torch.device) -> Any:
                batch = inner(samples, device)
                read.append(batch.inputs)
                return batch

            trainer.task.data.training_batch = training_batch  # type: ignore[method-assign]
            trainer.run()
            return read
        finally:
            close_world(world)

    (alone,) = run_ranks(1, work)
    assert len(alone) == 2 * 6  # each micro batch of each round once, however many losses are computed on it
    config = config_of(tmp_path, train={"steps": 2, "global_batch": 12, "micro_batch": 2}, name="shared")
    shared = run_ranks(3, work)
    for step in range(2):
        together = torch.cat([batch for rank in shared for batch in rank[2 * step : 2 * step + 2]])
        assert torch.equal(together, torch.cat(alone[6 * step : 6 * step + 6]))


def test_the_log_is_the_checkpoint(tmp_path: Path) -> None:
    whole = train(config_of(tmp_path, name="whole"), 2)
    config = config_of(tmp_path, name="parts")
    stopped = train(config, 2, stop_at=2, stop_rank=1)
    assert all(rank.outcome.stopped_by == (1,) for rank in stopped)
    finished = stopped[0].outcome.step
    assert 2 <= finished < 6
    assert not (config.folder / "model.safetensors").exists()
    # Rank 0 was killed before it wrote the last round down; rank 1 lost its disk.
    with Log.open(config.folder / "onebyte.log") as log:
        log.truncate(len(log) - 1)
    went_on = train(config, 2)
    assert all(f"after {finished} rounds" in rank.resumed for rank in went_on)
    assert [r["loss"] for r in went_on[0].records] == [r["loss"] for r in whole[0].records[finished:]]
    assert all(same(rank, whole[0]) for rank in went_on)
    (config.folder / "onebyte.rank1.log").unlink()
    again = train(config, 3)  # more ranks, one of which has no log
    assert all(same(rank, whole[0]) and rank.records == [] for rank in again)
    assert all("nothing is left to do" in rank.described for rank in again)


def test_logs_of_different_runs_are_not_mixed(tmp_path: Path) -> None:
    one, other = config_of(tmp_path, name="one", steps=2), config_of(tmp_path, name="other", steps=2, seed=5)
    train(one)
    train(other)
    other_log = other.folder / "onebyte.log"
    other_log.rename(one.folder / "onebyte.rank1.log")
    for outcome in run_ranks_to_the_end(2, lambda rank: _start(one, rank)):
        assert isinstance(outcome, LogError)
        assert "rank 1 and rank 0 have logs" in str(outcome)
    with pytest.raises(ValueError, match="is the log of another run"):
        train(config_of(tmp_path, name="one", steps=2, seed=6))
    with pytest.raises(ConfigError, match=r"checkpoint.resume: never, but .*onebyte.log has a run"):
        train(config_of(tmp_path, name="one", steps=2, checkpoint={"resume": "never"}))


def _start(config: RunConfig, rank: Rank) -> None:
    world = thread_world(rank)
    try:
        ZerothOrderTrainer(config, world).method.remove()
    finally:
        close_world(world)


def test_a_rank_without_a_finite_loss_is_absent_and_all_of_them_are_an_error(tmp_path: Path) -> None:
    def work(rank: Rank, broken: set[int]) -> list[Record]:
        world = thread_world(rank)
        try:
            trainer = ZerothOrderTrainer(config, world)
            if rank.rank in broken:
                trainer.task.model.register_forward_hook(lambda module, inputs, output: output * math.nan)
            memory = Memory(StopRequest(), 0)
            trainer.run([memory])
            return memory.records
        finally:
            close_world(world)

    train_settings = {"steps": 3, "global_batch": 12, "eval_windows": 0}
    config = config_of(tmp_path, train=train_settings)
    for records in run_ranks(2, lambda rank: work(rank, {1})):
        assert [record["method"]["absent"] for record in records] == [2, 2, 2]
        assert all(math.isfinite(record["loss"]) for record in records)
    config = config_of(tmp_path, name="both", train=train_settings)
    for outcome in run_ranks_to_the_end(2, lambda rank: work(rank, {0, 1})):
        assert isinstance(outcome, NonFiniteError)
        assert outcome.ranks == (0, 1)
        assert "Lower method.lr" in str(outcome)


def test_a_run_begins_at_the_weights_of_another(tmp_path: Path) -> None:
    allreduce = {"kind": "allreduce", "dtype": "fp32"}

    def pretrain(rank: Rank) -> dict[str, torch.Tensor]:
        world = thread_world(rank)
        try:
            trainer = Trainer(config_of(tmp_path, name="base", method=allreduce), world)
            trainer.run()
            return {name: p.detach().clone() for name, p in trainer.engine.network.named_parameters()}
        finally:
            close_world(world)

    (base,) = run_ranks(1, pretrain)
    folder = tmp_path / "runs" / "base" / "checkpoints"
    tuned = config_of(tmp_path, name="tuned", checkpoint={"resume": str(folder)})
    (first,) = train(tuned, stop_at=1)
    assert "begins at the weights of" in first.resumed
    assert 0 < max(float((first.weights[name] - base[name]).abs().max()) for name in base) < 0.02
    (second,) = train(tuned)
    assert "continues" in second.resumed
    exported = tuned.folder / "model.safetensors"
    model = small_settings(tmp_path)["model"]
    (same_start,) = train(config_of(tmp_path, name="same", model=model | {"weights": str(folder)}), stop_at=1)
    assert same(same_start, first)
    (third,) = train(config_of(tmp_path, name="third", steps=1, model=model | {"weights": str(exported)}), stop_at=1)
    assert max(float((third.weights[name] - second.weights[name]).abs().max()) for name in base) < 0.01
    with pytest.raises(ValueError, match=r"model.weights: .* holds another model: .*blocks.1.* nothing there"):
        train(config_of(tmp_path, name="x", model=model | {"weights": str(exported), "layers": 2}))
    with pytest.raises(ValueError, match=r"model.weights: .*none does not exist"):
        train(config_of(tmp_path, name="x", model=model | {"weights": str(tmp_path / "none")}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": {"kind": "sgd"}}, "optimizer: is given, but method onebyte is the optimizer itself: method.lr"),
        ({"engine": {"kind": "ddp"}}, "engine: is given, but method onebyte has no backward pass"),
        ({"train": {"steps": 2, "global_batch": 2, "clip_norm": 1.0}}, "train.clip_norm: is given, .* method.robust"),
        ({"checkpoint": {"every_steps": 5}}, "checkpoint.every_steps: is given, .* a log of every round"),
        ({"checkpoint": {"keep": 3}}, "checkpoint.keep: is given"),
    ],
)
def test_settings_that_a_run_without_backward_has_no_use_for_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(tmp_path, **change)


def test_the_command_trains_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings_of(tmp_path, train={"steps": 3, "global_batch": 4, "eval_windows": 4})))
    assert main(file, []) == 0
    told = capsys.readouterr().out
    assert "method onebyte: in each round, this rank sends nothing" in told
    assert "step 3/3" in told
    folder = tmp_path / "runs" / "run"
    assert "optimizer" not in yaml.safe_load((folder / "config.yaml").read_text())
    assert main(folder / "config.yaml", ["train.steps=4"]) == 0
    assert "after 3 rounds" in capsys.readouterr().out
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    with Log.open(folder / "onebyte.log", read_only=True) as log:
        rates = [record.rate for record in log if isinstance(record, Round)]
    # The learning rate is that of the schedule, as an fp32 number.
    assert rates == [pytest.approx(record["lr"], rel=1e-7) for record in records]


def test_machines_started_alone_find_each_other_and_stay_equal(tmp_path: Path) -> None:
    """Two worlds of one, with texts, batches and numbers of directions of their own."""
    address: queue.Queue[str] = queue.Queue()

    def machine(name: str, samples: int, batch: int) -> Trained:
        def work(rank: Rank) -> Trained:
            world = thread_world(rank)
            try:
                found = {"contacts": [address.get(timeout=60)]} if name == "second" else {"wait_for": 2}
                config = config_of(
                    tmp_path,
                    name=name,
                    method=ONEBYTE | {"samples": samples, "membership": {"sync": False, **found}},
                    data=small_settings(tmp_path)["data"] | {"files": small_text()[len(name) :]},
                    train={"steps": 5, "global_batch": batch, "eval_windows": 4},
                )
                trainer = ZerothOrderTrainer(config, world)
                if name == "first":
                    address.put(trainer._address())
                memory = Memory(StopRequest(), 0)
                return Trained(trainer, trainer.run([memory]), memory.records)
            finally:
                close_world(world)

        return run_ranks(1, work, timeout_s=100)[0]

    with ThreadPoolExecutor(2) as pool:
        second = pool.submit(machine, "second", 3, 4)
        first = machine("first", 2, 8)
        other = second.result()
    assert first.outcome.step == other.outcome.step == 5
    assert same(first, other)
    assert "2 bytes with a header of 24, and listens at 127.0.0.1:" in first.described
    for trained, samples in ((first, 2), (other, 3)):
        told = trained.records[0]["method"]
        assert told["members"] == 2
        last = trained.records[-1]["method"]
        assert last["contribution_bytes"] == last["contributions_sent"] * (24 + samples)
        assert trained.records[-1]["sent_bytes"] > 0
    with (
        Log.open(tmp_path / "runs" / "first" / "onebyte.log", read_only=True) as log,
        Log.open(tmp_path / "runs" / "second" / "onebyte.log", read_only=True) as same_log,
    ):
        rounds = [record for record in log if isinstance(record, Round)]
        assert rounds == [record for record in same_log if isinstance(record, Round)]
        assert {tuple(len(c.codes) for c in round_.contributions) for round_ in rounds} <= {(2, 3), (2,), (3,)}


def test_no_round_after_the_last_is_evaluated() -> None:
    class Ahead:
        def begin(self) -> Turn:
            return Turn(turns.pop(0), 0, 1)

    turns = [5, 6]
    exchange = TimedExchange(Ahead(), rounds=6)  # type: ignore[arg-type]
    assert exchange.begin().round == 5
    with pytest.raises(AllRoundsDoneError):
        exchange.begin()


def test_membership_settings_that_contradict_the_job_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"membership.samples: 4, but method.samples is 2; give that one alone"):
        config_of(tmp_path, method=ONEBYTE | {"membership": {"samples": 4}})
    config = config_of(tmp_path, method=ONEBYTE | {"membership": {}})
    for outcome in run_ranks_to_the_end(2, lambda rank: _start(config, rank)):
        assert isinstance(outcome, ValueError)
        assert "method.membership: is given in a job of 2 ranks" in str(outcome)
