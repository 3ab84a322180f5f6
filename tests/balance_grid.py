"""A small mixture of experts, the gradient of one big batch of it, and ways to train it on ranks that are threads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from thinwire.comm.balance.balance import LoadBalance

WIDTH, EXPERTS, TOP_K = 4, 5, 2
COEF, Z_COEF = 0.7, 0.05

Way = Literal["ddp", "fsdp2", "sum"]
Layout = Literal["even", "ragged", "padded", "empty"]
Checkpoint = Literal["none", "reentrant", "non_reentrant"]
Balance = Callable[[str, Tensor, Tensor, Tensor | None], Tensor]
Batch = tuple[Tensor, Tensor | None]  # tokens (n, WIDTH) and which of them are no padding


class Layer(nn.Module):
    """A router and dense experts. balance: what the router calls."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH))
        self.balance: Balance | None = None
        self.name = ""

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        logits = self.router(x)
        selected = logits.detach().topk(TOP_K, -1).indices
        if self.balance is not None:
            logits = self.balance(self.name, logits, selected, valid)
        weights = logits.softmax(-1).gather(-1, selected)
        each = torch.einsum("td,edf->tef", x, self.experts).tanh()
        chosen = each.gather(1, selected[..., None].expand(-1, -1, WIDTH))
        out: Tensor = x + (weights[..., None] * chosen).sum(1)
        return out


class Net(nn.Module):
    """Two layers behind a linear one, each of them checkpointed as told by `kind`."""

    def __init__(self) -> None:
        super().__init__()
        self.kind: Checkpoint = "none"
        self.embedding = nn.Linear(WIDTH, WIDTH)
        self.layers = [Layer() for _ in range(2)]
        self.blocks = nn.ModuleList(self.layers)

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        x = self.embedding(x)
        for layer in self.layers:
            if self.kind == "none":
                x = layer(x, valid)
            else:
                x = checkpoint(layer, x, valid, use_reentrant=self.kind == "reentrant")
        return x

    def balance_with(self, balance: Balance | None) -> None:
        """Hand it to the routers."""
        for number, layer in enumerate(self.layers):
            layer.balance, layer.name = balance, str(number)


def make_net(dtype: torch.dtype = torch.float64) -> Net:
    """The same values every time; torch's default generator is that of all ranks, and a recomputation rewinds it."""
    net = Net().to(dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return net


def make_batches(layout: Layout, ranks: int, micro_batches: int, dtype: torch.dtype) -> list[list[Batch]]:
    """Of every rank, its micro-batches. empty: the last rank has no token at all, and alone not in the middle."""
    generator = torch.Generator().manual_seed(7)

    def batch(rank: int, place: int) -> Batch:
        tokens = 8 if layout == "even" else 12 if layout == "padded" else 1 + (7 * rank + 5 * place + 6) % 17
        if layout == "empty" and (rank == ranks - 1 if ranks > 1 else place == micro_batches // 2):
            tokens = 0
        x = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
        kept = 2 + (5 * rank + 3 * place) % 9
        return x, torch.randperm(tokens, generator=generator) < kept if layout == "padded" else None

    return [[batch(rank, place) for place in range(micro_batches)] for rank in range(ranks)]


def alone(dtype: torch.dtype = torch.float64, coef: float = COEF, **settings: Any) -> tuple[LoadBalance, Net]:
    """A balance in a world of one, and a model with it."""
    queue = run_ranks(1, lambda rank: rank.queue())[0]
    balance = LoadBalance(num_experts=EXPERTS, top_k=TOP_K, coef=coef, queue=queue, **settings)
    net = make_net(dtype)
    net.balance_with(balance)
    return balance, net


@dataclass(frozen=True)
class Reference:
    """What one process gets from all tokens at once: gradients by parameter, f by layer, and N."""

    gradients: dict[str, Tensor]
    fractions: list[Tensor]
    tokens: int


def big_batch(batches: Sequence[Sequence[Batch]]) -> Reference:
    """In fp64, by the definition: mean of y^2 over tokens + sum over layers of a E sum_i f_i P_i + z mean(lse^2)."""
    x = torch.cat([x if valid is None else x[valid] for rank in batches for x, valid in rank]).double()
    net = make_net(dtype=batches[0][0][0].dtype).double()
    fractions, total = [], torch.zeros((), dtype=torch.float64)
    count = max(len(x), 1)

    def listen(layer: str, logits: Tensor, selected: Tensor, valid: Tensor | None) -> Tensor:
        nonlocal total
        c = torch.bincount(selected.flatten(), minlength=EXPERTS).double()
        f = c / c.sum() if len(x) else torch.full_like(c, 1 / EXPERTS)
        fractions.append(f)
        total = total + COEF * EXPERTS * (f * logits.softmax(-1).sum(0) / count).sum()
        total = total + Z_COEF * logits.logsumexp(-1).square().sum() / count
        return logits

    net.balance_with(listen)
    task = net(x, None).square().sum() / count
    (task + total).backward()
    return Reference({n: p.grad for n, p in net.named_parameters() if p.grad is not None}, fractions, len(x))


class Trainer:
    """One rank's way to train: all forward passes of a step, then the backward passes.

    Args:
        way: "ddp" and "fsdp2" average gradients over ranks; "sum" adds them up by an all-reduce of its own.
    """

    def __init__(self, way: Way, dtype: torch.dtype = torch.float64) -> None:
        self.way = way
        self.net = make_net(dtype)
        self.size = dist.get_world_size()
        if way == "fsdp2":
            for layer in self.net.layers:
                fully_shard(layer)
            fully_shard(self.net)

    def gradients(
        self, kind: Checkpoint, batches: Sequence[Batch], tokens: int, extra: Callable[[int], Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The gradients that the optimizer would see in one step, whole and on every rank.

        Args:
            tokens: of all ranks.
            extra: of a micro-batch, what is added to the task's loss after the forward pass.
        """
        self.net.zero_grad()
        self.net.kind = kind
        model: nn.Module = self.net
        if self.way == "ddp":
            model = DistributedDataParallel(self.net, static_graph=kind == "reentrant")
        scale = (1 if self.way == "sum" else self.size) / max(tokens, 1)
        losses = []
        for place, (x, valid) in enumerate(batches):
            with _no_sync(model, place < len(batches) - 1):
                y = model(x, valid)
            loss = (y if valid is None else y[valid]).square().sum() * scale
            losses.append(loss if extra is None else loss + extra(place))
        if self.way == "ddp":  # one backward pass: DDP reduces in the first that follows its last forward pass
            losses = [torch.stack(losses).sum()]
        for place, loss in enumerate(losses):
            if isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(place == len(losses) - 1)
            loss.backward()
        return {name: self._whole(p) for name, p in self.net.named_parameters()}

    def _whole(self, parameter: nn.Parameter) -> Tensor:
        gradient = parameter.grad
        assert gradient is not None
        if isinstance(gradient, DTensor):
            return gradient.full_tensor()
        if self.way == "sum":
            dist.all_reduce(gradient)
        return gradient.clone()


def _no_sync(model: nn.Module, quiet: bool) -> contextlib.AbstractContextManager[None]:
    if quiet and isinstance(model, DistributedDataParallel):
        without: contextlib.AbstractContextManager[None] = model.no_sync()
        return without
    return contextlib.nullcontext()


def distance(gradients: dict[str, Tensor], reference: Reference) -> float:
    """The largest error of any parameter's gradient, over the largest entry of that gradient."""
    assert gradients.keys() == reference.gradients.keys()
    errors = []
    for name, right in reference.gradients.items():
        largest = float(right.abs().max())
        errors.append(float((gradients[name].double() - right).abs().max()) / (largest or 1.0))
    return max(errors)
