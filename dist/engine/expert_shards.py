"""Expert parallelism in a run: which experts this rank holds, and how they are averaged, clipped and kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

from thinwire.comm.expert_parallel.exchange import ExpertExchange
from thinwire.comm.expert_parallel.gradients import ExpertGradients
from thinwire.dist.models.moe import MoEGPT
from thinwire.dist.world import World

_LIKE_PARAMETERS = ("exp_avg", "exp_avg_sq", "momentum_buffer")  # what our optimizers keep in a parameter's shape


class ExpertShards:
    """The experts of a model, spread over the ranks of each group of a level. Collective.

    Every group of that level holds all experts once, each on one of its ranks, and tokens travel within the group. All
    else stays on every rank. To be made before DDP wraps the model, which must leave the experts alone.

    Args:
        model: the same on every rank; changed in place.
        level: of the mesh.
        wire_dtype: of the gradients that are averaged between the level's groups.
    Attributes: names, of the parameters that are spread; is_last, whether the next backward pass is a step's last one.
    Raises:
        ValueError: there is no such level, or its groups cannot share the experts equally.
    """

    def __init__(self, model: MoEGPT, level: str, world: World, *, wire_dtype: torch.dtype) -> None:
        try:
            groups = [sorted(group) for group in world.mesh.groups(level)]
        except ValueError as error:
            raise ValueError(f"model.expert_parallel: {error}; name one of them, or give null") from None
        if not any(p.requires_grad for name, p in model.named_parameters() if name not in _expert_names(model)):
            raise ValueError(
                f"train.parameters: only experts learn, but with model.expert_parallel: {level} DDP needs a parameter "
                "that every rank has; let the routers, *.router.*, learn too, or give model.expert_parallel=null"
            )
        own = next(group for group in groups if world.rank in group)
        replicas = sorted(group[own.index(world.rank)] for group in groups)
        self._queue = world.queue.beside("experts")
        try:
            exchange = ExpertExchange(self._queue, own, model.moe_layers[0].experts.experts)
        except ValueError as error:
            self._queue.close()
            raise ValueError(f"model.{error}, with model.expert_parallel: {level}") from None
        self._behind = world.queue.beside("experts/gradients")
        self._gradients = ExpertGradients(self._behind, own, replicas, wire_dtype=wire_dtype)
        self._mesh = DeviceMesh(world.device.type, groups, mesh_dim_names=("replicas", "experts"))
        for layer in model.moe_layers:
            layer.experts.share(exchange)
        self.names = _expert_names(model)
        self._parameters = {name: model.get_parameter(name) for name in self.names}
        self._level, self._first, self._held = level, exchange.first, exchange.held
        self.is_last = False
        for parameter in self._parameters.values():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._added_up)
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, self.names)

    @property
    def exposed_s(self) -> float:
        """Seconds for which somebody waited for rows, or for the gradients of experts."""
        return self._queue.exposed_s + self._behind.exposed_s

    def describe(self) -> str:
        """A line for the start of a run."""
        learned = [p.numel() for p in self._parameters.values() if p.requires_grad]
        sent = ", ".join(f"{n:,} bytes over {level}" for level, n in self._gradients.sent_bytes(learned).items())
        return (
            f"experts: {self._held} of each layer on this rank, the others of {self._level} hold the rest; each step, "
            f"beside the rows that travel, this rank sends {sent or 'nothing'} for their gradients and norm"
        )

    def average_gradients(self) -> None:
        """After the last backward pass: the mean over all ranks, as DDP has made it of the other gradients."""
        self.is_last = False
        self._gradients.finish([p.grad for p in self._parameters.values() if p.grad is not None])

    def total_norm(self, model: nn.Module) -> Tensor:
        """Of the mean gradient of the whole model; the same on all ranks."""
        held = [p.grad for p in self._parameters.values() if p.grad is not None]
        others = (p for name, p in model.named_parameters() if name not in self._parameters)
        shared = [p.grad for p in others if p.grad is not None]
        return self._gradients.total_norm(shared, held)

    def whole(self, name: str, value: Any) -> Any:
        """A tensor in the shape of this parameter as a DTensor of all experts; all else as it is."""
        parameter = self._parameters.get(name)
        if parameter is None or not isinstance(value, Tensor) or value.shape != parameter.shape:
            return value
        return DTensor.from_local(value.detach(), self._mesh, (Replicate(), Shard(0)), run_check=False)

    def part(self, name: str, value: Any) -> Any:
        """The inverse: what this rank holds of a tensor of all experts, a DTensor or not; all else as it is."""
        if isinstance(value, DTensor):
            return value.to_local()
        parameter = self._parameters.get(name)
        if parameter is None or not isinstance(value, Tensor) or value.dim() != parameter.dim():
            return value
        return value if value.shape == parameter.shape else value[self._first : self._first + self._held]

    def slots(self, name: str) -> dict[str, Any]:
        """What an optimizer will keep of a parameter, for a checkpoint's template."""
        if name not in self._parameters:
            return {}
        return dict.fromkeys(_LIKE_PARAMETERS, self.whole(name, torch.zeros_like(self._parameters[name])))

    def close(self) -> None:
        """End the queues' threads."""
        self._queue.close()
        self._behind.close()

    def _added_up(self, parameter: Tensor) -> None:
        if self.is_last:
            assert parameter.grad is not None
            self._gradients.start(parameter.grad)


def _expert_names(model: MoEGPT) -> list[str]:
    experts = {id(p) for layer in model.moe_layers for p in layer.experts.parameters()}
    return [name for name, p in model.named_parameters() if id(p) in experts]
