"""Local SGD in whole training runs: stopping within a round, other ranks, what ends a run on all of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Rank, run_ranks, run_ranks_to_the_end
from torch import Tensor, nn
from worlds import close_world, small_config, thread_world

from thinwire.comm.errors import NonFiniteWeightsError
from thinwire.dist.config_errors import ConfigError
from thinwire.dist.step_reports import NonFiniteError
from thinwire.dist.train import Trainer

SIZE = 3


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def trained(config: Any, size: int = SIZE) -> list[tuple[list[dict[str, Any]], dict[str, Tensor], dict[str, Tensor]]]:
    """For each rank: its records, its own weights and those agreed on."""

    def work(rank: Rank) -> tuple[list[dict[str, Any]], dict[str, Tensor], dict[str, Tensor]]:
        world = thread_world(rank)
        try:
            trainer = Trainer(config, world)
            records: list[dict[str, Any]] = []

            class Sink:
                def write(self, record: dict[str, Any]) -> None:
                    records.append(record)

                def close(self) -> None: ...

            trainer.run([Sink()])
            module = trainer.engine.network
            own = weights(module)
            with trainer.method.agreed():
                return records, own, weights(module)
        finally:
            close_world(world)

    return run_ranks(size, work, timeout_s=120)


METHODS = {
    "average": "method={kind: local_sgd, every: 3}",
    "sparseloco": "method={kind: local_sgd, every: 3, outer: sgd, feedback: {kind: ef, decay: 0.95}, "
    "compressor: {kind: topk, k: 64, chunk: 4096, values: 2bit}}",
}
SIX_STEPS = ("train.global_batch=9", "train.steps=6", "schedule={kind: constant}")


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_run_continues_from_the_middle_of_a_round(tmp_path: Path, method: str) -> None:
    whole = trained(small_config(tmp_path, "name=whole", method, *SIX_STEPS, "train.eval_every=4"))
    stopped = small_config(tmp_path, "name=stopped", method, *SIX_STEPS, "checkpoint.every_steps=4")
    newest = tmp_path / "runs" / "stopped" / "checkpoints" / "step-00000006"
    trained(stopped)
    shutil.rmtree(newest)
    continued = trained(stopped)
    for (records, own, agreed), (all_records, whole_own, whole_agreed) in zip(continued, whole, strict=True):
        assert [r["step"] for r in records] == [5, 6]
        assert [r["loss"] for r in records] == [r["loss"] for r in all_records[4:]]
        assert records[-1]["val_loss"] == all_records[-1]["val_loss"]
        assert equal(own, whole_own)
        assert equal(own, agreed)
        assert equal(agreed, whole_agreed)
    assert [bool(r["sent_bytes"]) for r in whole[0][0]] == [False, False, True, False, False, True]
    assert len({r["grad_norm"] for rank in whole for r in rank[0][:1]}) == SIZE


def test_a_run_continues_with_other_ranks_from_the_weights_of_the_last_exchange(tmp_path: Path) -> None:
    settings = (METHODS["sparseloco"], "train.global_batch=12", "schedule={kind: constant}", "train.steps=6")
    stopped = small_config(tmp_path, *settings, "checkpoint.every_steps=4")
    trained(stopped)
    newest = tmp_path / "runs" / "small" / "checkpoints" / "step-00000006"
    shutil.rmtree(newest)
    for size in (2, 4):
        results = trained(stopped, size)
        shutil.rmtree(newest)
        for records, own, _ in results:
            assert [r["step"] for r in records] == [5, 6]  # the round goes on, so that it ends with the run
            assert equal(own, results[0][1])


def test_a_run_ends_with_a_round(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.steps: 4 .* method\.every 3.* nearest: 3 or 6"):
        small_config(tmp_path, METHODS["average"], "train.steps=4")


@pytest.mark.parametrize("at_step", [1, 2])
def test_a_gradient_that_one_rank_alone_finds_infinite_ends_the_run_on_all(tmp_path: Path, at_step: int) -> None:
    config = small_config(tmp_path, METHODS["average"], *SIX_STEPS)

    def work(rank: Rank) -> Any:
        world = thread_world(rank)
        try:
            trainer = Trainer(config, world)
            if rank.rank == 1:
                weight = trainer.engine.network.embedding.weight
                weight.register_hook(lambda g: g * torch.inf if trainer.state.step == at_step else g)
            return trainer.run()
        finally:
            close_world(world)

    for error in run_ranks_to_the_end(SIZE, work, timeout_s=60):
        assert isinstance(error, NonFiniteError if at_step == 1 else NonFiniteWeightsError), error
        assert error.ranks == (1,)
