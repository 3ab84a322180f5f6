"""Checkpoints of partitioned models: bit for bit on the same ranks, the same weights on any others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim import Optimizer
from torch_threads import TorchRank, run_torch_ranks

from thinwire.comm.partition.door import enter
from thinwire.comm.partition.optimizer import PartitionedOptimizer
from thinwire.comm.partition.settings import PartitionSettings
from thinwire.dist.checkpoint import Checkpointer, CheckpointError, CheckpointSettings
from thinwire.dist.checkpoint_export import export_sharded_safetensors

Pieces: TypeAlias = dict[str, tuple[int, Tensor]]


class Model(nn.Module):
    """Rows that no number of ranks divides, and parameters of fewer rows than ranks."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Linear(5, 13)
        self.blocks = nn.ModuleList([nn.Linear(13, 13)])
        self.last = nn.Linear(13, 1)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 4

    def forward(self, x: Tensor) -> Any:
        x = torch.tanh(self.first(x))
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


class Run:
    """A partitioned model on one rank."""

    def __init__(
        self,
        rank: TorchRank,
        name: str,
        optimizer: Callable[..., Optimizer] = torch.optim.AdamW,
        groups: Sequence[Mapping[str, Any]] | None = None,
        *,
        device: str = "cpu",
        **settings: Any,
    ) -> None:
        self.rank = rank
        names, fanouts = reversed(rank.levels.names), reversed(rank.levels.fanouts)
        mesh = init_device_mesh("cpu", tuple(fanouts), mesh_dim_names=tuple(names))
        self.model = Model().to(device)
        self.optimizer: PartitionedOptimizer = enter(
            self.model,
            mesh,
            optimizer,
            PartitionSettings(**settings),
            parameter_groups=groups,
            compute_dtype=torch.bfloat16 if "weights" in settings else None,
            queue=rank.queue(name=name),
            lr=0.01,
        )

    def train(self, first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last):
            generator = torch.Generator().manual_seed(100 * step + self.rank.rank)
            loss = self.model(torch.randn(4, 5, generator=generator)).square().mean()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
        return losses

    def checkpointer(self, folder: Path) -> Checkpointer:
        return Checkpointer(
            folder, CheckpointSettings(), group=dist.new_group(), rank=self.rank.rank, world_size=self.rank.size
        )

    def save(self, folder: Path) -> None:
        optimizer = self.optimizer.state_dict()
        own = optimizer.pop("own")
        shared = {"model": self.model.state_dict(), "optimizer": optimizer}
        self.checkpointer(folder).save(1, shared, {"own": own})

    def load(self, folder: Path) -> None:
        template = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_template()}
        loaded = self.checkpointer(folder).load_latest(template, world_size_changed="all_ranks")
        assert loaded is not None
        self.model.load_state_dict(loaded.shared["model"])
        trees = [loaded.per_rank] if loaded.per_rank else loaded.per_rank_of_all.values()
        own = {rank: kept for tree in trees for rank, kept in tree["own"].items()}
        self.optimizer.load_state_dict({**loaded.shared["optimizer"], "own": own})

    def weights(self) -> dict[str, Tensor]:
        """This rank's shards."""
        return {name: value.to_local().clone() for name, value in self.model.state_dict().items()}

    def pieces(self) -> Pieces:
        """This rank's part of all weights and states: where in dimension 0 it begins, and what it is."""
        state = self.optimizer.state_dict()
        found: dict[str, Tensor] = {f"weights/{name}": value for name, value in self.model.state_dict().items()}
        for name, own in state["state"].items():
            found |= {f"{name}/{key}": value for key, value in own.items()}
        found |= {f"master/{name}": value for name, value in state["masters"].items()}
        return {name: _piece(value) for name, value in found.items()}


def _piece(value: Tensor) -> tuple[int, Tensor]:
    if not isinstance(value, DTensor):
        return 0, value.clone()
    _, offset = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
    return offset[0], value.to_local().detach().clone()


def put_together(ranks: list[Pieces]) -> dict[str, Tensor]:
    """Whole tensors of all ranks' pieces. Not by full_tensor(), which remembers in one thread what another asked."""
    found = {}
    for name in ranks[0]:
        by_row = {pieces[name][0]: pieces[name][1] for pieces in ranks if pieces[name][1].numel()}
        for pieces in ranks:
            start, piece = pieces[name]
            assert not piece.numel() or torch.equal(by_row[start], piece), name
        parts = [by_row[row] for row in sorted(by_row)]
        found[name] = torch.cat(parts) if parts[0].ndim else parts[0]
    return found


def test_any_other_ranks_levels_and_states_load_the_same_bits(tmp_path: Path) -> None:
    def write(rank: TorchRank) -> Pieces:
        run = Run(rank, "write", params="node", grads="node", optim="world")
        run.train(0, 2)
        run.save(tmp_path / "own")
        state = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}
        dcp.save(state, checkpoint_id=tmp_path / "dcp")
        return run.pieces()

    def read(rank: TorchRank) -> tuple[Pieces, Pieces]:
        run = Run(rank, "read", params="rank", grads="world", optim="world")
        run.load(tmp_path / "own")
        other = Run(rank, "other", params="world", grads="world", optim="world")
        state = {"model": other.model.state_dict(), "optimizer": other.optimizer.state_template()}
        dcp.load(state, checkpoint_id=tmp_path / "dcp")
        other.model.load_state_dict(state["model"])
        other.optimizer.load_state_dict(state["optimizer"])
        return run.pieces(), other.pieces()

    saved = put_together(run_torch_ranks([2, 4], write))
    by_ours, by_torch = zip(*run_torch_ranks([3], read), strict=True)
    for loaded in (put_together(list(by_ours)), put_together(list(by_torch))):
        assert loaded.keys() == saved.keys()
        assert [name for name, value in saved.items() if not torch.equal(loaded[name], value)] == []


CODED: dict[str, Any] = {
    "weights": "bf16",
    "update": {"kind": "difference", "bits": 4},
    "gradients": {"world": {"kind": "int4", "feedback": True, "rounding": "stochastic"}},
}


def test_the_same_ranks_go_on_bit_for_bit_with_coded_wires_and_others_drop_what_feedback_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def same(rank: TorchRank) -> None:
        through = Run(rank, "through", params="node", grads="node", optim="world", **CODED)
        through.train(0, 2)
        through.save(tmp_path)
        expected = through.train(2, 4)
        resumed = Run(rank, "resumed", params="node", grads="node", optim="world", **CODED)
        resumed.load(tmp_path)
        assert resumed.optimizer.state_dict()["own"]
        assert resumed.train(2, 4) == expected
        assert_equal(resumed.pieces(), through.pieces())

    def other(rank: TorchRank) -> None:
        run = Run(rank, "other", params="rank", grads="rank", optim="world", **CODED)
        run.load(tmp_path)
        assert run.optimizer.state_dict()["own"] == {}
        run.train(2, 3)

    run_torch_ranks([2, 4], same)
    assert not caplog.records
    run_torch_ranks([2], other)
    told = {record.getMessage() for record in caplog.records}.pop()
    assert "levels node=2 world=2" in told
    assert "levels world=2" in told


def assert_equal(left: Pieces, right: Pieces) -> None:
    assert left.keys() == right.keys()
    assert [name for name, (_, value) in left.items() if not torch.equal(value, right[name][1])] == []


@pytest.mark.parametrize(
    ("optimizer", "groups"),
    [
        # Its first step keeps the gradient as it is, so a momentum of zeros would not be none.
        (partial(torch.optim.SGD, momentum=0.9, dampening=0.5), None),
        (partial(torch.optim.AdamW, amsgrad=True), [{"params": ["first.*"], "lr": 0.1}, {"params": ["[bl]*"]}]),
    ],
)
def test_any_optimizer_goes_on_and_a_template_leaves_it_as_it_is(
    optimizer: Callable[..., Optimizer], groups: Sequence[Mapping[str, Any]] | None
) -> None:
    def work(rank: TorchRank) -> None:
        through, resumed, asked = (
            Run(rank, name, optimizer, groups, params="rank", grads="rank", optim="world") for name in "abc"
        )
        asked.optimizer.state_template()
        assert asked.train(0, 2) == through.train(0, 2)
        resumed.model.load_state_dict(through.model.state_dict())
        resumed.optimizer.load_state_dict(through.optimizer.state_dict())
        assert resumed.train(2, 4) == through.train(2, 4)
        assert_equal(resumed.pieces(), through.pieces())
        assert_same_form(through.optimizer.state_dict(), asked.optimizer.state_template())

    run_torch_ranks([2], work)


def assert_same_form(state: dict[str, Any], template: dict[str, Any]) -> None:
    assert template["param_groups"] == state["param_groups"]
    assert template["state"].keys() == state["state"].keys()
    for name, own in state["state"].items():
        assert {key: value.shape for key, value in template["state"][name].items()} == {
            key: value.shape for key, value in own.items()
        }


def test_whole_weights_as_one_file_from_rank_0(tmp_path: Path) -> None:
    def work(rank: TorchRank) -> None:
        run = Run(rank, "run", params="node", grads="world", optim="world")
        run.train(0, 1)
        group = dist.new_group()
        path = tmp_path / "model.safetensors"
        export_sharded_safetensors(run.model, path, group=group, rank=rank.rank, world_size=rank.size)
        for name, value in load_file(path).items():
            assert torch.equal(distribute(value, run.model.state_dict()[name]), run.weights()[name])
        with pytest.raises(CheckpointError, match="rank 0: on"):
            export_sharded_safetensors(
                run.model, path / "below a file", group=group, rank=rank.rank, world_size=rank.size
            )

    run_torch_ranks([2, 4], work)


def distribute(whole: Tensor, like: Any) -> Tensor:
    """The shard that `like` has of it."""
    shape, offset = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    return whole[offset[0] : offset[0] + shape[0]]


def test_masters_follow_weights_that_somebody_else_has_changed() -> None:
    def work(rank: TorchRank, update: str) -> None:
        run = Run(rank, update, params="rank", grads="rank", optim="world", update=update)
        run.train(0, 1)
        earlier = {name: value.clone() for name, value in run.model.state_dict().items()}
        run.train(1, 2)
        run.model.load_state_dict(earlier, assign=True)  # other memory
        loaded = run.weights()
        with torch.no_grad():
            run.model.last.bias.add_(1.0)
        run.optimizer.param_groups[0].update(lr=0.0, weight_decay=0.0)
        before = run.weights()
        run.train(2, 3)
        assert not torch.equal(before["last.bias"], loaded["last.bias"])
        assert all(torch.equal(value, before[name]) for name, value in run.weights().items())

    for update in ("same", "difference"):  # masters that are views of the weights, and copies
        run_torch_ranks([2], partial(work, update=update))


def test_masters_come_and_go_with_the_need_for_them(caplog: pytest.LogCaptureFixture) -> None:
    def work(rank: TorchRank) -> None:
        coded = Run(rank, "coded", params="rank", grads="rank", optim="world", update="difference")
        coded.train(0, 2)
        plain = Run(rank, "plain", params="rank", grads="rank", optim="world")
        plain.model.load_state_dict(coded.model.state_dict())
        plain.optimizer.load_state_dict(coded.optimizer.state_dict())
        whole, owned = plain.weights(), coded.pieces()
        masters = {name: owned[f"master/{name}"] for name in whole}
        assert all(torch.equal(whole[n][start : start + len(m)], m) for n, (start, m) in masters.items())
        assert any(not torch.equal(whole[name], value) for name, value in coded.weights().items())
        coded.model.load_state_dict(plain.model.state_dict())
        coded.optimizer.load_state_dict(plain.optimizer.state_dict())
        assert all(torch.equal(m, masters[name][1]) for name in whole for _, m in [coded.pieces()[f"master/{name}"]])
        coded.optimizer.load_state_dict(coded.optimizer.state_dict())
        coded.model.load_state_dict(coded.model.state_dict())
        coded.train(2, 4)

    run_torch_ranks([2], work)
    told = [record.getMessage() for record in caplog.records if "call model.load_state_dict() first" in record.msg]
    assert len(told) == 2 * 2  # units, ranks


def test_a_model_from_the_meta_device_takes_a_checkpoint_once_it_has_memory() -> None:
    def work(rank: TorchRank) -> None:
        states = {"params": "rank", "grads": "rank", "optim": "world", "update": "difference"}
        through = Run(rank, "through", **states)
        through.train(0, 2)
        resumed = Run(rank, "resumed", device="meta", **states)
        with pytest.raises(ValueError, match=r"call model.to_empty\(device=...\) before"):
            resumed.optimizer.state_template()
        resumed.model.to_empty(device="cpu")
        assert_same_form(through.optimizer.state_dict(), resumed.optimizer.state_template())
        resumed.model.load_state_dict(through.model.state_dict())
        resumed.optimizer.load_state_dict(through.optimizer.state_dict())
        assert resumed.train(2, 4) == through.train(2, 4)
        assert_equal(resumed.pieces(), through.pieces())

    run_torch_ranks([2], work)


def test_refuses_the_state_of_another_model_or_other_groups_and_changes_nothing() -> None:
    def work(rank: TorchRank) -> None:
        run = Run(rank, "run", params="rank", grads="rank", optim="world")
        run.train(0, 1)
        before = run.pieces()
        state = run.optimizer.state_dict()
        groups = state["param_groups"]
        other = {**state, "param_groups": [{**groups[0], "params": [*groups[0]["params"][1:], "head.weight"]}]}
        cut = {**state["state"], "last.weight": {"exp_avg": torch.zeros(2, 13)}}
        for bad, why in (
            (other, "another model: head.weight is only in the checkpoint, first.weight only in the model"),
            ({**state, "param_groups": [*groups, {**groups[0], "params": []}]}, "2 groups of 6, 0 parameters"),
            ({**state, "state": cut}, r"last.weight.exp_avg has the shape \(2, 13\)"),
            ({"state": {}, "param_groups": groups}, "masters, steps, draws, feedback is missing"),
            ({"all_ranks": [state, state]}, "states of all ranks of another job"),
        ):
            with pytest.raises(ValueError, match=why):
                run.optimizer.load_state_dict(bad)
            assert_equal(run.pieces(), before)

    run_torch_ranks([2], work)
