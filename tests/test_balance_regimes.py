"""What else may run around a router: compilation, low precision, evaluation, and trainers of other conventions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, get_args

import pytest
import torch
from balance_grid import (
    COEF,
    EXPERTS,
    TOP_K,
    Z_COEF,
    Batch,
    Checkpoint,
    alone,
    big_batch,
    distance,
    make_batches,
    make_net,
)
from ranks import Rank, run_ranks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from thinwire.comm.balance.balance import LoadBalance
from thinwire.comm.balance.functional import balance_loss, expert_counts
from thinwire.comm.balance.settings import ModeName

EVERY: tuple[Checkpoint, ...] = get_args(Checkpoint)


def step(model: nn.Module, batches: Sequence[Batch], scale: float) -> dict[str, Tensor]:
    """All forward passes, then the backward passes, of the task's loss times scale."""
    losses = []
    for x, valid in batches:
        y = model(x, valid)
        losses.append((y if valid is None else y[valid]).square().sum() * scale)
    for loss in losses:
        loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["none", "non_reentrant"])
def test_compiled_as_one_graph_it_is_bit_for_bit_the_same(kind: Checkpoint) -> None:
    """torch.compile(fullgraph=True) through AOTAutograd, two steps; and again without gradients."""
    batches = make_batches("padded", 1, 2, torch.float64)[0]
    seen = []
    for compiled in (False, True):
        balance, net = alone(mode="late", micro_batches=2, z_coef=Z_COEF)
        net.kind = kind
        model: Any = torch.compile(net, backend="aot_eager", fullgraph=True) if compiled else net
        for _ in range(2):
            net.zero_grad()
            step(model, batches, 1.0)
        with torch.no_grad():
            model(*batches[0])
        assert balance.metrics()["messages"] == 4
        seen.append([p.grad for p in net.parameters()])
    assert all(torch.equal(eager, other) for eager, other in zip(*seen, strict=True))


@pytest.mark.parametrize("kind", EVERY)
def test_what_is_evaluated_within_a_step_neither_counts_nor_sends(kind: Checkpoint) -> None:
    """Without gradients, in inference mode, and in eval mode with gradients; before, between and after the passes."""
    batches = make_batches("ragged", 1, 2, torch.float64)
    reference = big_batch(batches)
    balance, net = alone(mode="late", micro_batches=2, z_coef=Z_COEF)
    balance.watch(net)
    net.kind = kind
    net.embedding.register_forward_hook(lambda _, args, out: out.requires_grad_())  # as Hugging Face has it
    other = make_batches("even", 1, 1, torch.float64)[0][0]

    def evaluate() -> None:
        with torch.no_grad():
            net(*other)
        with torch.inference_mode():
            net(*other)
        net.eval()
        net(*other).sum().backward()
        net.train()

    evaluate()
    assert balance.metrics()["messages"] == 0
    losses = []
    for x, valid in batches[0]:
        losses.append(net(x, valid).square().sum() / reference.tokens)
        evaluate()
    net.zero_grad()
    for number, loss in enumerate(losses):
        loss.backward()
        with torch.no_grad():
            net(*other)
        assert balance.metrics()["messages"] == 2, number
    assert distance({n: p.grad for n, p in net.named_parameters() if p.grad is not None}, reference) < 1e-12


def test_checkpoints_within_checkpoints_count_once() -> None:
    """All of the model in one, and each layer in another: whatever their kinds, the same gradient and one message."""
    batches = make_batches("ragged", 1, 2, torch.float64)
    reference = big_batch(batches)
    for kind, reentrant in itertools.product(EVERY, (True, False)):
        balance, net = alone(mode="late", micro_batches=2, z_coef=Z_COEF)
        net.kind = kind
        losses = []
        for x, valid in batches[0]:
            y = checkpoint(net, x.requires_grad_(), valid, use_reentrant=reentrant)
            losses.append(y.square().sum() / reference.tokens)
        for loss in losses:
            loss.backward()
        assert distance({n: p.grad for n, p in net.named_parameters() if p.grad is not None}, reference) < 1e-12
        assert balance.metrics()["messages"] == 2


def test_a_rank_may_evaluate_alone() -> None:
    """The other rank waits for nothing."""

    def work(rank: Rank) -> float:
        net = make_net()
        balance = LoadBalance(num_experts=EXPERTS, top_k=TOP_K, coef=COEF, mode="sync", queue=rank.queue(timeout_s=20))
        net.balance_with(balance)
        x, _ = make_batches("even", 2, 1, torch.float64)[rank.rank][0]
        for _ in range(2):
            net(x, None).sum().backward()
            with torch.no_grad():
                for _ in range(3 * rank.rank):
                    net(x, None)
        return balance.metrics()["messages"]

    assert run_ranks(2, work) == [2.0, 2.0]


@pytest.mark.parametrize(("mode", "messages"), [(None, 1), ("ema", 1), ("sync", 3), ("late", 3), ("carry", 3)])
def test_messages_of_a_step(mode: ModeName | None, messages: int) -> None:
    """What is submitted to the queue, and nothing else: one agreement, and then so many messages per step."""
    names: list[str] = []
    queue = run_ranks(1, lambda rank: rank.queue())[0]
    submit = queue.submit

    def count(operation: str, exchange: Any) -> Any:
        names.append(operation)
        return submit(operation, exchange)

    queue.submit = count  # type: ignore[method-assign]
    decay = 0.9 if mode == "ema" else None
    balance = LoadBalance(
        num_experts=EXPERTS, top_k=TOP_K, coef=COEF, mode=mode, decay=decay, micro_batches=3, queue=queue
    )
    net = make_net()
    net.balance_with(balance)
    batches = make_batches("ragged", 1, 3, torch.float64)[0]
    for kind in EVERY:
        net.kind = kind
        step(net, batches, 1.0)
        with torch.no_grad():
            net(*batches[0])
    assert names.count("balance/counts") == messages * len(EVERY)
    assert len(names) == messages * len(EVERY) + 1


def test_other_conventions_give_the_same_gradient() -> None:
    """A loss that is scaled, gradients that are divided by the micro-batches, and both."""
    batches = make_batches("ragged", 1, 3, torch.float64)
    reference = big_batch(batches)
    for scale, divided in ((1024.0, False), (1.0, True), (1024.0, True)):
        balance, net = alone(
            mode="late",
            micro_batches=3,
            z_coef=Z_COEF,
            loss_scale=lambda scale=scale: scale,
            accumulation="mean" if divided else "sum",
        )
        share = 3 if divided else 1
        gradients = step(net, batches[0], scale * share / reference.tokens)
        assert distance({n: g / (scale * share) for n, g in gradients.items()}, reference) < 1e-12
        assert balance.metrics()["messages"] == 3


class Router(nn.Module):
    """Logits in fp32 or in the dtype of the tokens, and nothing but the balance behind them."""

    def __init__(self, balance: LoadBalance, upcast: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(4, EXPERTS, bias=False)
        self.balance = balance
        self.upcast = upcast

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast("cpu", enabled=False) if self.upcast else torch.enable_grad():
            logits = nn.functional.linear(x.float(), self.linear.weight.float()) if self.upcast else self.linear(x)
        logits.retain_grad()
        selected = logits.detach().topk(TOP_K, -1).indices
        return self.balance("only", logits, selected), logits, selected


@pytest.mark.parametrize("way", ["bf16 model, fp32 router", "autocast, fp32 router", "autocast", "bf16 model"])
def test_low_precision(way: str) -> None:
    """The pull is that of the same logits in fp64, rounded once to their dtype; in sequences as in rows."""
    balance = alone(mode="sync")[0]
    router = Router(balance, "fp32 router" in way)
    x = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(1))
    if "bf16" in way:
        router, x = router.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled="autocast" in way):
        out, logits, selected = router(x)
    assert out.dtype == logits.dtype == (torch.float32 if "fp32" in way else torch.bfloat16)
    assert out.shape == (2, 8, EXPERTS)
    out.backward(torch.zeros_like(out))
    wide = logits.detach().double().requires_grad_()
    counts = expert_counts(selected, EXPERTS).double()
    (COEF * balance_loss(wide, counts / counts.sum())).backward()
    assert wide.grad is not None
    assert logits.grad is not None
    rounding = 1e-5 if logits.dtype == torch.float32 else 2**-8
    torch.testing.assert_close(logits.grad.double(), wide.grad, rtol=rounding, atol=1e-7)
    assert router.linear.weight.grad is not None
    assert bool(router.linear.weight.grad.any())
