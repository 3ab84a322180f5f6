"""The DDP engine for a model whose experts are spread over ranks."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from thinwire.comm.method import Method
from thinwire.comm.queue import CommQueue
from thinwire.dist.engine.ddp import DDPEngine
from thinwire.dist.engine.expert_shards import ExpertShards
from thinwire.dist.engine.optimizer_names import group_names, states_by_name


class ExpertParallelEngine(DDPEngine):
    """An Engine: all on each rank but the experts, which DDP leaves alone.

    A checkpoint holds them whole, as DTensors, so that any number of ranks, other levels, and a run without expert
    parallelism can continue it.

    Args:
        model, optimizer, method, clip_norm, queue: see DDPEngine; the method must be an average of all gradients.
        experts: of the model inside DDP.
    """

    forward_is_collective = True

    def __init__(
        self,
        model: DistributedDataParallel,
        optimizer: Optimizer,
        method: Method,
        *,
        clip_norm: float,
        queue: CommQueue,
        experts: ExpertShards,
    ) -> None:
        super().__init__(model, optimizer, method, clip_norm=clip_norm, queue=queue)
        self._experts = experts

    @property
    def exposed_s(self) -> float:
        """Seconds for which somebody waited for one of the three queues."""
        return self._queue.exposed_s + self._experts.exposed_s

    def describe(self) -> str:
        """A line for the start of a run."""
        return self._experts.describe()

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """The experts' gradients go out with the last one too."""
        self._experts.is_last = last
        return super().micro_batch(last=last)

    def step(self) -> float:
        """What the backward pass has begun to average must have ended."""
        self._experts.average_gradients()
        return super().step()

    def shared_state(self) -> dict[str, Any]:
        """Experts as DTensors."""
        state = super().shared_state()
        names = self._names()
        of_optimizer = {
            number: {key: self._experts.whole(names[number], value) for key, value in values.items()}
            for number, values in state["optimizer"]["state"].items()
        }
        return {
            "model": {name: self._experts.whole(name, tensor) for name, tensor in state["model"].items()},
            "optimizer": {**state["optimizer"], "state": of_optimizer},
        }

    def template(self) -> dict[str, Any]:
        """Also what the optimizer will have of the experts."""
        state = self.shared_state()
        known = state["optimizer"]["state"]
        slots = {
            number: {**self._experts.slots(name), **known.get(number, {})} for number, name in self._names().items()
        }
        return {**state, "optimizer": {**state["optimizer"], "state": slots}}

    def load_state(self, shared: Mapping[str, Any], own: Mapping[str, Any] | None, old: Mapping[int, Any]) -> None:
        """Another engine's weights and optimizer states are welcome."""
        named = states_by_name(shared["optimizer"], group_names(self.network, self.optimizer.param_groups))
        states = {
            name: {key: self._experts.part(name, value) for key, value in values.items()}
            for name, values in named["state"].items()
        }
        model = {name: self._experts.part(name, tensor) for name, tensor in shared["model"].items()}
        super().load_state({"model": model, "optimizer": {**named, "state": states}}, own, old)

    def close(self) -> None:
        """End the experts' queues."""
        self._experts.close()

    def _total_norm(self) -> Tensor:
        return self._experts.total_norm(self.network)

    def _names(self) -> dict[int, str]:
        groups = group_names(self.network, self.optimizer.param_groups)
        return dict(enumerate(name for names in groups for name in names))
