"""Experts spread over ranks: the same results, gradients, steps and checkpoints as on one; bytes; refusals."""

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
from worlds import close_world, small_config, torch_world

from thinwire.comm.expert_parallel.exchange import ExpertExchange
from thinwire.comm.expert_parallel.gradients import ExpertGradients
from thinwire.dist.config import ConfigError, RunConfig
from thinwire.dist.engine.expert_parallel import ExpertParallelEngine
from thinwire.dist.models.experts import Experts
from thinwire.dist.models.router import Router
from thinwire.dist.train import Trainer

WIDTH, EXPERTS, TOP_K = 6, 8, 2
TOKENS = (5, 0, 11, 3)  # of each rank
MODEL = (
    "model={kind: moe, layers: 2, heads: 2, width: 32, context: 32, experts: 8, top_k: 2, expert_width: 16, "
    "shared_experts: 1, mlp: swiglu}"
)


def layer(dtype: torch.dtype) -> tuple[Router, Experts]:
    router = Router(WIDTH, EXPERTS, TOP_K, gate="softmax", renormalise=True)
    experts = Experts(EXPERTS, WIDTH, 4, gated=True)
    generator = torch.Generator().manual_seed(0)
    for parameter in (*router.parameters(), *experts.parameters()):
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return router.to(dtype), experts.to(dtype)


def tokens_of(rank: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rank + 1)
    return torch.randn(TOKENS[rank], WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def loss(out: Tensor) -> Tensor:
    return out.cos().sum()


@pytest.mark.parametrize("groups", [[[0, 1, 2, 3]], [[0, 2], [1, 3]]])
def test_results_and_gradients_are_those_of_experts_that_stay(groups: list[list[int]]) -> None:
    router, experts = layer(torch.float64)
    inputs = [tokens_of(rank, torch.float64) for rank in range(4)]
    results = [experts(x, router(x)) for x in inputs]
    sum(map(loss, results), torch.zeros(())).backward()

    def work(rank: Rank) -> tuple[Tensor, Tensor | None, list[Tensor], Tensor, list[int], int]:
        queue = rank.queue()
        group = next(g for g in groups if rank.rank in g)
        exchange = ExpertExchange(queue, group, EXPERTS)
        own_router, own = layer(torch.float64)
        own.share(exchange)
        x = tokens_of(rank.rank, torch.float64)
        routing = own_router(x)
        out = own(x, routing)
        loss(out).backward()
        to = torch.bincount(routing.selected.flatten() // exchange.held, minlength=len(group)).tolist()
        sent = sum(queue.meter.sent_bytes().values())
        queue.close()
        held = [p.grad for p in own.parameters() if p.grad is not None]
        assert own_router.weight.grad is not None
        return out.detach(), x.grad, held, own_router.weight.grad, to, sent

    done = run_ranks(4, work)
    whole = [p.grad for p in experts.parameters()]
    for rank, (out, of_x, held, _, to, sent) in enumerate(done):
        torch.testing.assert_close(out, results[rank].detach(), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(of_x, inputs[rank].grad, rtol=1e-12, atol=1e-14)
        group = next(g for g in groups if rank in g)
        place, of_each = group.index(rank), EXPERTS // len(group)
        assert [len(gradient) for gradient in held] == [of_each] * 2
        # The rows that leave do so once more as gradients of results; for those that come, results and gradients go.
        travel = sum(to) - to[place] + sum(done[r][4][place] for r in group if r != rank)
        assert sent == (len(group) - 1) * of_each * 4 + 2 * travel * WIDTH * 8
    for place in range(len(groups[0])):
        held = EXPERTS // len(groups[0])
        for number, gradient in enumerate(whole):
            total = sum((done[group[place]][2][number] for group in groups), torch.zeros(()))
            torch.testing.assert_close(total, gradient[place * held : (place + 1) * held], rtol=1e-12, atol=1e-14)
    total = sum((one[3] for one in done), torch.zeros(()))
    torch.testing.assert_close(total, router.weight.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("wire_dtype", [torch.float32, torch.bfloat16])
def test_averages_are_the_same_bits_wherever_an_expert_is_held_and_as_many_bytes_as_predicted(
    wire_dtype: torch.dtype,
) -> None:
    groups = [[0, 1], [2, 3]]
    drawn = [torch.randn(3, 5, generator=torch.Generator().manual_seed(rank)) for rank in range(4)]
    shared = torch.full((4,), 2.0)

    def work(rank: Rank) -> tuple[Tensor, Tensor, dict[str, int], dict[str, int]]:
        queue = rank.queue()
        replicas = [rank.rank % 2, rank.rank % 2 + 2]
        gradients = ExpertGradients(queue, groups[rank.rank // 2], replicas, wire_dtype=wire_dtype)
        mine = drawn[rank.rank].clone()
        gradients.start(mine)
        gradients.finish([mine])
        norm = gradients.total_norm([shared], [mine])
        sent = {level: count for level, count in queue.meter.sent_bytes().items() if count}
        queue.close()
        return mine, norm, sent, gradients.sent_bytes([mine.numel()])

    done = run_ranks(4, work)
    for rank in range(4):
        mean, norm, sent, predicted = done[rank]
        near = {"rtol": 1e-2, "atol": 1e-2} if wire_dtype == torch.bfloat16 else {}
        torch.testing.assert_close(mean, (drawn[rank % 2] + drawn[rank % 2 + 2]) / 4, **near)
        assert torch.equal(mean, done[(rank + 2) % 4][0])
        assert torch.equal(norm, done[0][1])
        assert sent == predicted
    whole = torch.cat([shared, done[0][0].flatten(), done[1][0].flatten()])
    torch.testing.assert_close(done[0][1], whole.norm())


class Trained:
    """A rank's run. weights: as in its checkpoint, whole."""

    def __init__(self, trainer: Trainer) -> None:
        memory = Memory()
        self.resumed = trainer.state.resumed
        self.held = [p.shape[0] for n, p in trainer.engine.network.named_parameters() if ".experts." in n]
        self.is_spread = isinstance(trainer.engine, ExpertParallelEngine)
        trainer.run([memory])
        self.records = memory.records
        state = trainer.engine.shared_state()["model"]
        self.weights = {n: t.full_tensor() if isinstance(t, DTensor) else t.clone() for n, t in state.items()}
        self.numbers = [(record["loss"], record["grad_norm"]) for record in self.records]


def train(config: RunConfig, sizes: Sequence[int] = (1,)) -> list[Trained]:
    def work(rank: TorchRank) -> Trained:
        world = torch_world(rank)
        try:
            return Trained(Trainer(config, world))
        finally:
            close_world(world)

    return run_torch_ranks(sizes, work)


def run_of(folder: Path, name: str, *overrides: str) -> RunConfig:
    balance = "balance={coef: 0.5, mode: late}"
    fixed = "train={steps: 4, global_batch: 8, eval_windows: 10, eval_batch: 3, clip_norm: 0.5}"
    return small_config(folder, f"name={name}", MODEL, fixed, balance, *overrides)


def test_runs_are_those_of_experts_that_stay_and_continue_as_such_and_otherwise(tmp_path: Path) -> None:
    (plain,) = train(run_of(tmp_path, "plain"))
    assert min(norm for _, norm in plain.numbers) > 0.5  # so that clipping changes every step
    spread = "model.expert_parallel=node"
    done = train(run_of(tmp_path, "spread", spread, "train.micro_batch=1"), (2, 4))
    for trained in done:
        assert trained.is_spread
        assert trained.held == [4] * 4
        for ours, theirs in zip(trained.numbers, plain.numbers, strict=True):
            assert ours == pytest.approx(theirs, rel=2e-5)
        assert trained.records[-1]["val_loss"] == pytest.approx(plain.records[-1]["val_loss"], rel=1e-5)
        for name, weight in trained.weights.items():
            assert torch.equal(weight, done[0].weights[name]), name
            torch.testing.assert_close(weight, plain.weights[name], rtol=1e-3, atol=2e-5)
    train(run_of(tmp_path, "parts", spread, "train.micro_batch=1", "train.steps=2"), (2, 4))
    again = train(run_of(tmp_path, "parts", spread, "train.micro_batch=1"), (2, 4))
    for name, weight in again[0].weights.items():
        assert torch.equal(weight, done[0].weights[name]), name
    # Elsewhere, from the first two steps: two ranks share all experts; one has them all.
    middle = f"checkpoint.resume={tmp_path}/runs/parts/checkpoints/step-00000002"
    for sizes, setting in (((2,), "model.expert_parallel=world"), ((1,), "model.mlp=swiglu")):
        config = run_of(tmp_path, f"on_{sizes[0]}", setting, middle)
        for trained in train(config, sizes):
            assert "after 2 steps" in trained.resumed
            for ours, theirs in zip(trained.numbers, plain.numbers[2:], strict=True):
                assert ours == pytest.approx(theirs, rel=2e-5)


def test_experts_may_stay_as_they_are(tmp_path: Path) -> None:
    frozen = ("train.parameters=['embedding.*', '*.router.*']", "train.steps=2")
    (plain,) = train(run_of(tmp_path, "plain", *frozen))
    for trained in train(run_of(tmp_path, "spread", "model.expert_parallel=world", *frozen), (2,)):
        for ours, theirs in zip(trained.numbers, plain.numbers, strict=True):
            assert ours == pytest.approx(theirs, rel=2e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("method={kind: partition, preset: zero3}",), "model.expert_parallel: node works with method"),
        (("method={kind: gossip}",), "model.expert_parallel: node works with method"),
    ],
)
def test_other_methods_are_refused(tmp_path: Path, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small_config(tmp_path, MODEL, "model.expert_parallel=node", *overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("model.expert_parallel=world", "train.parameters=['*.experts.*']"),
            "train.parameters: only experts learn, but with model.expert_parallel: world",
        ),
        (("model.expert_parallel=rack",), "model.expert_parallel: the mesh has no level 'rack'"),
        (
            ("model.expert_parallel=world", "model.experts=7"),
            r"model.experts: 7 cannot be shared equally by the 2 ranks of a group; nearest: 6 or 8",
        ),
    ],
)
def test_levels_that_do_not_fit_are_refused(tmp_path: Path, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(small_config(tmp_path, MODEL, *overrides), (2,))
