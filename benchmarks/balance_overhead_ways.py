"""The ways to balance that benchmarks/balance_overhead.py compares: thinwire's, and to wait in every layer."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from thinwire.comm.balance.balance import LoadBalance
from thinwire.comm.balance.count_sum import sum_counts
from thinwire.comm.balance.functional import expert_counts
from thinwire.comm.balance.fused import Routing, route_experts
from thinwire.comm.queue import CommQueue
from thinwire.dist.models.moe import MoEGPT
from thinwire.kernels.router_gradient import router_gradient

AddUp = Callable[[CommQueue, Tensor], Tensor]


class Balancing:
    """A way to balance, or none, and what it has cost so far."""

    def __init__(self, balance: LoadBalance | WaitInEveryLayer | None, queue: CommQueue) -> None:
        self._balance = balance
        self._queue = queue

    def enter(self, model: MoEGPT) -> None:
        """From now on the model's routers are balanced so."""
        model.balance_with(cast(LoadBalance | None, self._balance))

    def finish(self) -> None:
        """Wait for what is under way."""
        if isinstance(self._balance, LoadBalance):
            self._balance.finish()

    @property
    def messages(self) -> int:
        """Sent so far."""
        if isinstance(self._balance, LoadBalance):
            return int(self._balance.metrics()["messages"])
        return self._balance.messages if self._balance else 0

    @property
    def waited_s(self) -> float:
        """Seconds for which a forward or backward pass stood still for counts so far."""
        return self._balance.waited_s if isinstance(self._balance, WaitInEveryLayer) else self._queue.exposed_s

    @property
    def sent_bytes(self) -> int:
        """Payload bytes of counts, as metered, in all ways together; torch's all-reduce is not metered."""
        meter = self._queue.meter
        return sum(sum(meter.sent_bytes(name).values()) for name in ("balance/", "every_layer"))

    @property
    def predicted_bytes(self) -> int | None:
        """Of a step; None where nothing predicts them."""
        return sum(self._balance.predicted_bytes().values()) if isinstance(self._balance, LoadBalance) else None


class WaitInEveryLayer:
    """Counts are added up over the ranks in every layer and every micro-batch, and the forward pass waits for them.

    f is that of all ranks' present micro-batch. It takes the place of a LoadBalance.

    Args:
        add_up: (num_experts,) int64 of this rank -> of all ranks.
        pull: coef * num_experts / N, with the convention's factor.
    """

    score = "softmax"

    def __init__(self, queue: CommQueue, add_up: AddUp, num_experts: int, top_k: int, pull: float) -> None:
        self.num_experts = num_experts
        self.top_k = top_k
        self.messages = 0
        self.waited_s = 0.0
        self._queue = queue
        self._add_up = add_up
        self._pull = pull

    def __call__(self, layer: str | int, logits: Tensor, selected: Tensor, valid_mask: Tensor | None = None) -> Tensor:
        """As LoadBalance, but for what activation checkpointing makes of it: the recomputation sends again."""
        if not torch.is_grad_enabled():
            return logits
        pull = logits.new_empty(self.num_experts)
        out: Tensor = _Inject.apply(logits, pull)  # type: ignore[no-untyped-call]
        pull.copy_(self._wait(selected, valid_mask))
        return out

    def route(
        self, layer: str | int, logits: Tensor, valid_mask: Tensor | None = None, *, renormalise: bool = False
    ) -> Routing:
        """As LoadBalance.route()."""
        if not torch.is_grad_enabled():
            return route_experts(logits, self.top_k, valid_mask=valid_mask, renormalise=renormalise)
        pull = logits.new_empty(self.num_experts)
        out = _Inject.apply(logits, pull)  # type: ignore[no-untyped-call]
        routing = route_experts(out, self.top_k, valid_mask=valid_mask, renormalise=renormalise)
        pull.copy_(self._wait(routing.selected, valid_mask))
        return routing

    def bias(self, layer: str | int, logits: Tensor | None = None) -> None:
        """None: tokens select by their scores alone."""

    def _wait(self, selected: Tensor, valid_mask: Tensor | None) -> Tensor:
        """What pulls, now that all ranks' counts are here."""
        counts = expert_counts(selected, self.num_experts, valid_mask)
        began = time.monotonic()
        total = self._add_up(self._queue, counts)
        self.waited_s += time.monotonic() - began
        self.messages += 1
        return self._pull * (total / total.sum())


def one_latency(queue: CommQueue, counts: Tensor) -> Tensor:
    """By thinwire's own exchange of small messages."""
    return queue.submit("every_layer", lambda channel: sum_counts(channel, counts.int())).wait()


def all_reduce(queue: CommQueue, counts: Tensor) -> Tensor:
    """By torch's collective."""
    dist.all_reduce(counts, group=queue.group)
    return counts


class _Inject(torch.autograd.Function):
    """Lets the gradient in. `pull` is filled after the call and before the backward pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, pull: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.pull = pull
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (logits,) = ctx.saved_tensors
        return gradients[0] + router_gradient(logits, ctx.pull, None, None), None
