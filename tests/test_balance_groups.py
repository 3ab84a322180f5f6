"""LoadBalance in the groups that trainers make, in a plain training loop, and from checkpoints of other settings."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from ranks import Rank, run_ranks
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch_threads import TorchRank, run_torch_ranks

from thinwire.comm.balance.balance import LoadBalance
from thinwire.comm.balance.functional import balance_loss, expert_counts
from thinwire.comm.balance.load_metrics import load_metrics

EXPERTS, TOP_K, WIDTH, COEF = 6, 2, 4, 0.3
TOKENS = (12, 30)  # of the two data ranks


def weight(layer: int = 0) -> Tensor:
    return torch.randn(EXPERTS, WIDTH, generator=torch.Generator().manual_seed(layer), dtype=torch.float64)


def data(rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randn(TOKENS[rank], WIDTH, generator=generator, dtype=torch.float64) + rank


def of_one_process(tokens: Tensor, layer: int = 0) -> Tensor:
    w = weight(layer).requires_grad_()
    logits = tokens @ w.T
    counts = expert_counts(logits.topk(TOP_K).indices, EXPERTS).double()
    (COEF * balance_loss(logits, counts / counts.sum())).backward()
    assert w.grad is not None
    return w.grad


def of_this_rank(group: ProcessGroup, tokens: Tensor, layer: int = 0, **options: Any) -> Tensor:
    """This rank's gradient of a router's weight, before the trainer reduces it."""
    balance = LoadBalance(group, num_experts=EXPERTS, top_k=TOP_K, coef=COEF, mode="late", **options)
    w = weight(layer).requires_grad_()
    logits = tokens @ w.T
    out = balance(f"layer {layer}", logits, logits.topk(TOP_K).indices)
    (0.0 * out.sum()).backward()
    assert w.grad is not None
    return w.grad


def reduced(gradient: Tensor, group: ProcessGroup, *, mean: bool) -> Tensor:
    total = gradient.clone()
    dist.all_reduce(total, group=group)
    return total / group.size() if mean else total


def close(ours: Tensor, theirs: Tensor) -> bool:
    return float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-12


def test_every_kind_of_parallelism_is_a_matter_of_the_group() -> None:
    """Four ranks: two data ranks times two of another dimension, which do to tokens and gradients what trainers do."""
    batch = torch.cat((data(0), data(1)))
    right = of_one_process(batch)

    def work(rank: TorchRank) -> dict[str, bool]:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "other"))
        place, other = mesh.get_coordinate() or (0, 0)
        by_data, by_other = mesh.get_group("data"), mesh.get_group("other")
        everyone = cast(ProcessGroup, dist.group.WORLD)
        mine = data(place)
        half = mine[: len(mine) // 3] if other == 0 else mine[len(mine) // 3 :]
        found = {}

        # Expert parallelism within data parallelism, or context parallelism: all have tokens of their own.
        gradient = of_this_rank(everyone, half)
        found["expert, context"] = close(reduced(gradient, everyone, mean=True), right)

        # Tensor parallelism: both ranks of a pair have the same tokens. The data ranks' group; all ranks count each
        # token twice, but are also twice as many.
        gradient = of_this_rank(by_data, mine)
        found["tensor"] = close(reduced(gradient, by_data, mean=True), right)
        gradient = of_this_rank(everyone, mine)
        found["tensor, all ranks"] = close(reduced(gradient, by_data, mean=True), right)

        # With sequence parallelism: the pair shares out its tokens, and adds up the router's gradients, which are then
        # averaged over the data ranks only.
        gradient = of_this_rank(everyone, half, ranks="sum", loss_scale=by_data.size)
        gradient = reduced(reduced(gradient, by_other, mean=False), by_data, mean=True)
        found["sequence"] = close(gradient, right)

        # Pipeline parallelism: the group of one stage.
        gradient = of_this_rank(by_data, mine, layer=1 + other)
        found["pipeline"] = close(reduced(gradient, by_data, mean=True), of_one_process(batch, 1 + other))
        with pytest.raises(ValueError, match=r"layer 'layer 1' on rank 0, layer 'layer 2' on rank 1; .* of one stage"):
            of_this_rank(everyone, mine, layer=1 + other)
        return found

    for found in run_torch_ranks((2, 4), work):
        assert found == dict.fromkeys(found, True)


class Mixture(nn.Module):
    """What a user might write: a router, experts, and the one call."""

    def __init__(self, width: int, name: str, balance: LoadBalance) -> None:
        super().__init__()
        self.router = nn.Linear(width, EXPERTS, bias=True)
        self.experts = nn.Parameter(torch.randn(EXPERTS, width, width) * width**-0.5)
        self.name, self.balance = name, balance
        with torch.no_grad():
            self.router.bias.copy_(torch.linspace(0, 2, EXPERTS))  # begins uneven

    def forward(self, x: Tensor) -> Tensor:
        logits = self.router(x)
        selected = logits.topk(TOP_K).indices
        logits = self.balance(self.name, logits, selected)
        weights = logits.softmax(-1).gather(-1, selected)
        chosen = torch.einsum("td,edh->teh", x, self.experts).gather(
            1, selected[..., None].expand(*selected.shape, x.shape[-1])
        )
        return x + (weights[..., None] * chosen.tanh()).sum(1)


def test_a_plain_loop_with_ddp_and_accumulation_evens_out_the_experts() -> None:
    def train(rank: TorchRank, coef: float) -> tuple[float, float, list[Tensor], int]:
        balance = LoadBalance(num_experts=EXPERTS, top_k=TOP_K, coef=coef, micro_batches=2)
        generator = torch.Generator().manual_seed(7)  # the default one is shared by the threads
        model = nn.Sequential(Mixture(8, "first", balance), Mixture(8, "second", balance))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        balance.watch(model)
        ddp = DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(ddp.parameters(), lr=0.05)
        batches = torch.Generator().manual_seed(rank.rank)
        seen = []
        for _ in range(20):
            for micro_batch in range(2):
                x = torch.randn(32, 8, generator=batches)
                with ddp.no_sync() if micro_batch == 0 else nullcontext():
                    (ddp(x).square().mean() / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(balance.metrics().get("mean_max_violation", 0.0))
        weights = [p.detach() for p in model.parameters()]
        return seen[1], seen[-1], weights, int(balance.metrics()["messages"])

    balanced = run_torch_ranks((2,), lambda rank: train(rank, 0.1))
    without = run_torch_ranks((2,), lambda rank: train(rank, 0.0))
    assert all(torch.equal(a, b) for a, b in zip(balanced[0][2], balanced[1][2], strict=True))
    before, after, _, messages = balanced[0]
    assert messages == 20
    assert before > 0.9
    assert after < 0.5 * before
    assert after < 0.5 * without[0][1]


def steps(balance: LoadBalance, count: int, seed: int = 0) -> Tensor:
    """Gradients of logits, one step after another."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        logits = torch.randn(16, EXPERTS, generator=generator).requires_grad_()
        (0.0 * balance("a", logits, logits.topk(TOP_K).indices).sum()).backward()
        assert logits.grad is not None
        made.append(logits.grad)
    return torch.stack(made)


@pytest.mark.parametrize("new", ["micro", "carry", "stale", "ema"])
def test_a_checkpoint_of_any_mode_goes_on_in_another(new: str) -> None:
    def work(rank: Rank) -> None:
        queue = rank.queue()

        def make(name: str) -> LoadBalance:
            given: dict[str, Any] = {"mode": name} if name != "micro" else {"scope": "micro"}
            decay = {"decay": 0.5} if name == "ema" else {}
            return LoadBalance(num_experts=EXPERTS, top_k=TOP_K, coef=COEF, queue=queue, **given, **decay)

        for old in ("micro", "sync", "late", "carry", "stale", "ema"):
            before, after, fresh = make(old), make(new), make(new)
            steps(before, 3, seed=rank.rank)
            after.load_state_dict(before.state_dict())
            first = steps(after, 1, seed=9 + rank.rank)
            if new in ("stale", "ema"):
                assert bool(first.abs().max() > 1e-6) == (old != "micro"), "knows the last step, if the old mode did"
            assert torch.equal(steps(after, 2)[1], steps(fresh, 2)[1]) == (new != "ema"), "an average remembers"

    run_ranks(2, work)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: state | {"num_experts": 8}, "checkpoint is of 8 experts in each layer, this model has 6"),
        (lambda state: state | {"layers": ["b"]}, r"checkpoint is of the layers \['b'\], this model has \['a'\]"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(change: Callable[[Any], Any], says: str) -> None:
    def work(rank: Rank) -> None:
        balance = LoadBalance(num_experts=EXPERTS, top_k=TOP_K, coef=COEF, layers=["a"], queue=rank.queue())
        steps(balance, 1)
        with pytest.raises(ValueError, match=says):
            balance.load_state_dict(change(balance.state_dict()))

    run_ranks(1, work)


def test_logits_in_bf16_are_counted_exactly_and_pulled_in_fp32() -> None:
    """Where there are many ties; whichever expert the router then takes, that one is counted."""

    def work(rank: Rank) -> None:
        balance = LoadBalance(num_experts=EXPERTS, top_k=TOP_K, coef=COEF, mode="late", queue=rank.queue())
        coarse = (torch.randn(300, EXPERTS, generator=torch.Generator().manual_seed(3)) * 2).round() / 2
        logits = coarse.bfloat16().requires_grad_()
        selected = logits.topk(TOP_K).indices
        (0.0 * balance("a", logits, selected).sum()).backward()
        counts = expert_counts(selected, EXPERTS)
        rows = balance.state_dict()["mode"]["before"]
        assert torch.equal(rows[0, :EXPERTS], counts)
        exact = coarse.double().requires_grad_()
        (COEF * balance_loss(exact, counts.double() / counts.sum())).backward()
        assert logits.grad is not None
        assert exact.grad is not None
        assert logits.grad.dtype == torch.bfloat16
        torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=2**-8, atol=0)
        assert load_metrics(rows[:, :EXPERTS])["max_violation"] > 0

    run_ranks(1, work)
