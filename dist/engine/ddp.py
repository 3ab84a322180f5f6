"""The DDP engine: one replica per rank, gradients through the method that hooks into it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from thinwire.comm.errors import NonFiniteGradientError
from thinwire.comm.method import ClippingMethod, LocalMethod, Method
from thinwire.comm.queue import CommQueue
from thinwire.comm.settings import Settings
from thinwire.dist.engine.engine import keep_options, merge_method_states
from thinwire.dist.engine.optimizer_names import group_names, states_by_name, states_by_number


class DDPSettings(Settings):
    """bucket_mb: gradients go out in pieces of about this many MB (10^6 bytes), as backward makes them ready."""

    kind: Literal["ddp"] = "ddp"
    bucket_mb: float = Field(25.0, gt=0)

    @property
    def bucket_bytes(self) -> int:
        """What DDP makes of it."""
        return int(self.bucket_mb * 1e6)


def wrap_ddp(model: nn.Module, settings: DDPSettings, group: ProcessGroup) -> DistributedDataParallel:
    """The model in DistributedDataParallel, without its first broadcast: preflight has proved the weights equal.

    Args:
        group: all ranks of the job. Only DDP's own book-keeping uses it; gradients go through the method's queue.
    """
    return DistributedDataParallel(
        model,
        process_group=group,
        init_sync=False,
        gradient_as_bucket_view=True,
        bucket_cap_mb=settings.bucket_mb * 1e6 / 2**20,  # torch means MiB; it takes a float
    )


class DDPEngine:
    """An Engine: the whole model on each rank.

    Args:
        model: with the method's hook in it.
        clip_norm: largest norm of the mean gradient, unless the method clips by itself; 0 = no limit.
        queue: the method's.
    """

    forward_is_collective = False

    def __init__(
        self,
        model: DistributedDataParallel,
        optimizer: Optimizer,
        method: Method,
        *,
        clip_norm: float,
        queue: CommQueue,
    ) -> None:
        self.network: nn.Module = model.module
        self.optimizer = optimizer
        self.method = method
        self._model = model
        self._queue = queue
        clipped = isinstance(method, ClippingMethod) and bool(method.clip_norm)
        self._clip_norm = 0.0 if clipped else clip_norm

    @property
    def exposed_s(self) -> float:
        """Seconds for which somebody waited for the queue."""
        return self._queue.exposed_s

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Gradients go out with the last one."""
        return nullcontext() if last else self._model.no_sync()

    def forward(self, inputs: Tensor) -> Tensor:
        """Through DDP."""
        scores: Tensor = self._model(inputs)
        return scores

    def backward(self, loss: Tensor) -> None:
        """Leaves the mean gradient in the parameters' .grad."""
        loss.backward()

    def step(self) -> float:
        """The mean gradient is the same on all ranks, so all refuse it or none."""
        norm = self._total_norm()
        if self._clip_norm:
            torch.nn.utils.clip_grads_with_norm_(self._model.parameters(), self._clip_norm, norm)
        if not math.isfinite(norm) and not isinstance(self.method, LocalMethod):
            raise NonFiniteGradientError(())
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)

    def shared_state(self) -> dict[str, Any]:
        """Under a LocalMethod each rank's optimizer is its own."""
        optimizer = {} if isinstance(self.method, LocalMethod) else self.optimizer.state_dict()
        return {"model": self.network.state_dict(), "optimizer": optimizer}

    def template(self) -> dict[str, Any]:
        """Nothing is cut."""
        return self.shared_state()

    def own_state(self) -> dict[str, Any]:
        """The method's, and under a LocalMethod model and optimizer too."""
        state: dict[str, Any] = {"method": self.method.state_dict()}
        if isinstance(self.method, LocalMethod):
            state |= {"model": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        return state

    def load_state(self, shared: Mapping[str, Any], own: Mapping[str, Any] | None, old: Mapping[int, Any]) -> None:
        """Under a LocalMethod, among other ranks, each begins at what all had agreed on, with one old optimizer.

        Another engine's weights and optimizer states are welcome.
        """
        self.method.load_state_dict(merge_method_states(own, old))  # first: it knows a state that another method wrote
        trained: Mapping[str, Any] = shared
        if isinstance(self.method, LocalMethod):
            rank = self._queue.rank % len(old) if old else 0
            trained = own if own is not None else {**shared, "optimizer": old[rank]["optimizer"]}
        self.network.load_state_dict(trained["model"])
        groups = group_names(self.network, self.optimizer.param_groups)
        keep_options(self.optimizer, states_by_number(states_by_name(trained["optimizer"], groups), groups))

    def close(self) -> None:
        """Nothing is the engine's own."""

    def _total_norm(self) -> Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in self._model.parameters() if p.grad is not None])
