"""`method: partition` in the training loop: DDP's losses, its own resumption, other ranks, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from memory import Memory
from ranks import Rank, run_ranks
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch_threads import TorchRank, run_torch_ranks
from worlds import close_world, small_config, thread_world, torch_world

from thinwire.dist.config import ConfigError, RunConfig
from thinwire.dist.train import Trainer

TWO_LEVELS = "method={kind: partition, params: node, grads: node, optim: world}"
QUANTISED = (
    "method={kind: partition, params: node, grads: node, optim: world, gather: int8, "
    "gradients: {node: {kind: int8, rounding: stochastic}, world: {kind: int4, rounding: stochastic, feedback: true}}, "
    "update: {kind: difference, bits: 4}}"
)


class Trained:
    """A rank's run. weights: its shards, before it trained and after."""

    def __init__(self, trainer: Trainer) -> None:
        memory = Memory()
        self.text = trainer.describe()
        self.predicted = trainer.method.predicted_bytes()
        self.began_with = shards(trainer)
        trainer.run([memory])
        self.weights = shards(trainer)
        self.records = memory.records
        self.losses = [record["loss"] for record in memory.records]


def shards(trainer: Trainer) -> dict[str, Tensor]:
    state = trainer.engine.network.state_dict()
    return {n: (t.to_local() if isinstance(t, DTensor) else t).detach().clone() for n, t in state.items()}


def train(config: RunConfig, sizes: Sequence[int] = (2, 4)) -> list[Trained]:
    def work(rank: TorchRank) -> Trained:
        world = torch_world(rank)
        try:
            return Trained(Trainer(config, world))
        finally:
            close_world(world)

    return run_torch_ranks(sizes, work)


def train_by_ddp(config: RunConfig, size: int) -> list[Trained]:
    def work(rank: Rank) -> Trained:
        world = thread_world(rank)
        try:
            return Trained(Trainer(config, world))
        finally:
            close_world(world)

    return run_ranks(size, work)


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def joined(ranks: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Whole weights, from shards in order."""
    return {name: torch.cat([rank[name] for rank in ranks]) for name in ranks[0]}


def test_losses_are_ddps_and_bytes_the_predicted(tmp_path: Path) -> None:
    # Three batches of validation data for four ranks: the last rank must compute all the same.
    common = ["model.layers=2", "train={steps: 4, global_batch: 8, micro_batch: 1, eval_every: 2, eval_batch: 4, "
              "eval_windows: 10, clip_norm: 0.5}"]  # fmt: skip
    ours = train(small_config(tmp_path, "name=ours", TWO_LEVELS, *common))
    ddp = train_by_ddp(small_config(tmp_path, "name=ddp", *common), 4)
    for rank, trained in enumerate(ours):
        assert trained.losses == pytest.approx(ddp[rank].losses, rel=1e-6)
        for record, reference in zip(trained.records, ddp[rank].records, strict=True):
            assert record["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-5)
            assert record["sent_bytes_by_level"] == trained.predicted
        assert [r["val_loss"] for r in trained.records if "val_loss" in r] == pytest.approx(
            [r["val_loss"] for r in ddp[rank].records if "val_loss" in r], rel=1e-6
        )
    assert set(ours[0].predicted) == {"node", "world"}
    assert "optim over world (4 ranks)" in ours[0].text


def test_a_quantised_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = train(small_config(tmp_path, "name=whole", QUANTISED, "train.steps=4"))
    first = train(small_config(tmp_path, "name=parts", QUANTISED, "train.steps=2"))
    second = train(small_config(tmp_path, "name=parts", QUANTISED, "train.steps=4"))
    for rank, trained in enumerate(second):
        assert first[rank].losses + trained.losses == whole[rank].losses
        assert same_bits(trained.weights, whole[rank].weights)
        assert "after 2 steps" in trained.text


def test_other_ranks_and_other_places_go_on_from_the_same_weights(tmp_path: Path) -> None:
    whole = train(small_config(tmp_path, "name=whole", TWO_LEVELS, "train.steps=4"))
    first = train(small_config(tmp_path, "name=parts", TWO_LEVELS, "train.steps=2"))
    zero3 = "method={kind: partition, preset: zero3}"
    second = train(small_config(tmp_path, "name=parts", zero3, "train.steps=4"), (2,))
    assert same_bits(joined([trained.began_with for trained in second]), joined([t.weights for t in first[:2]]))
    assert second[0].losses == pytest.approx(whole[0].losses[2:], rel=1e-5)


def test_a_run_may_change_its_engine(tmp_path: Path) -> None:
    """DDP for two steps, partitioned for two, DDP again: the losses of DDP alone."""
    last = "optimizer={kind: sgd, lr: 0.1}"  # its momentum must come along

    def begins_at(source: str) -> str:
        return f"checkpoint.resume={tmp_path}/runs/{source}/checkpoints"

    whole = train_by_ddp(small_config(tmp_path, "name=whole", last, "train.steps=6"), 2)
    train_by_ddp(small_config(tmp_path, "name=a", last, "train.steps=2"), 2)
    second = train(
        small_config(
            tmp_path, "name=b", last, "train.steps=4", "method={kind: partition, preset: zero3}", begins_at("a")
        ),
        (2,),
    )
    third = train_by_ddp(small_config(tmp_path, "name=c", last, "train.steps=6", begins_at("b")), 2)
    assert second[1].losses + third[1].losses == pytest.approx(whole[1].losses[2:], rel=1e-6)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ([TWO_LEVELS, "engine={kind: ddp}"], "engine.kind: ddp does not train by method partition.* give .*fsdp2"),
        (["engine={kind: fsdp2}"], "engine.kind: fsdp2 does not train by method allreduce.* ddp"),
        (
            ["method={kind: allreduce, exact_within: node}", "engine={kind: deepspeed}"],
            "method.exact_within: node with engine deepspeed.* engine.gradients",
        ),
        (["method={kind: gossip}", "engine={kind: fsdp2}"], "engine: is given, but method gossip"),
        ([TWO_LEVELS, "method.clip_norm=2.0"], "method.clip_norm: is given.* train.clip_norm"),
        ([TWO_LEVELS, "method.weights=bf16"], "method.weights: bf16 .* train.precision=bf16"),
        ([TWO_LEVELS, "engine.bucket_mb=3"], "engine.bucket_mb: unknown key"),
        (["method={kind: partition, preset: zero4}"], "preset: 'zero4' is none of zero1"),
    ],
)
def test_what_does_not_fit_together_is_refused(tmp_path: Path, overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        small_config(tmp_path, *overrides)


def test_the_engine_follows_the_method(tmp_path: Path) -> None:
    assert small_config(tmp_path, TWO_LEVELS).engine.kind == "fsdp2"
    assert small_config(tmp_path, TWO_LEVELS, "engine.prefetch=0").engine.kind == "fsdp2"
    assert small_config(tmp_path, "engine.bucket_mb=3").engine.kind == "ddp"
