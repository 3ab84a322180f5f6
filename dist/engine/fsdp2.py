"""The FSDP2 engine: each state sharded over a level of its own, by method partition."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from thinwire.comm.method import Method
from thinwire.comm.partition.blocks import find_blocks
from thinwire.comm.partition.door import enter
from thinwire.comm.partition.optimizer import PartitionedOptimizer
from thinwire.comm.partition.settings import PartitionSettings
from thinwire.comm.settings import Settings
from thinwire.dist.engine.engine import keep_options
from thinwire.dist.engine.optimizer_names import group_names, states_by_name
from thinwire.dist.optimizers import OptimizerPlan
from thinwire.dist.world import World


class FSDP2Settings(Settings):
    """How the model is wrapped; what is sent where is method partition's.

    activation_checkpointing: each block forgets its activations and computes them anew in the backward pass.
    compile: torch.compile on each block, by this backend; null = not. inductor needs a C++ compiler or a GPU.
    prefetch: blocks whose weights are gathered while another one computes; 0 = none.
    """

    kind: Literal["fsdp2"] = "fsdp2"
    activation_checkpointing: bool = False
    compile: Literal["inductor", "aot_eager"] | None = None
    prefetch: int = Field(1, ge=0)


class FSDP2Engine:
    """An Engine: fully_shard() over the params level, and a PartitionedOptimizer for what goes beyond.

    Args:
        model: the same on every rank; changed in place.
        clip_norm: largest norm of the mean gradient; 0 = no limit.
        precision: bf16 gathers the weights, and computes, in bf16.
        micro_batches: of each step.
    Raises:
        ValueError: the settings do not fit this model or this world's levels.
    """

    forward_is_collective = True

    def __init__(
        self,
        model: nn.Module,
        settings: FSDP2Settings,
        method: PartitionSettings,
        plan: OptimizerPlan,
        world: World,
        *,
        clip_norm: float,
        precision: Literal["fp32", "bf16"],
        micro_batches: int,
    ) -> None:
        self._groups = group_names(model, plan.groups)
        _rebuild_forward(find_blocks(model), settings)
        with paths_of_the_run():
            self._partitioned: PartitionedOptimizer = enter(
                model,
                world.mesh,
                plan.factory,
                method.model_copy(update={"clip_norm": clip_norm}),
                parameter_groups=plan.groups,
                compute_dtype=torch.bfloat16 if precision == "bf16" else None,
                micro_batches=micro_batches,
                prefetch=settings.prefetch,
                queue=world.queue,
                timeout_s=world.settings.timeout_s,
                **plan.options,
            )
        model.register_forward_hook(_drop_gathered)
        self.network = model
        self.optimizer: Optimizer = self._partitioned
        self.method: Method = self._partitioned

    @property
    def exposed_s(self) -> float:
        """Seconds for which somebody waited for one of the two queues."""
        return self._partitioned.exposed_s

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """What goes beyond the grads level leaves during the last backward pass."""
        assert isinstance(self.network, FSDPModule)
        self.network.set_requires_all_reduce(last)
        return nullcontext()

    def forward(self, inputs: Tensor) -> Tensor:
        """Gathers the weights, block by block."""
        scores: Tensor = self.network(inputs)
        return scores

    def backward(self, loss: Tensor) -> None:
        """Gradients go to their shards; no .grad remains."""
        loss.backward()

    def step(self) -> float:
        """The optimizer clips by itself."""
        norm = self._partitioned.gradient_norm()
        self._partitioned.step()
        return norm

    def shared_state(self) -> dict[str, Any]:
        """DTensors by name, which any number of ranks, levels and states can load."""
        return {"model": self.network.state_dict(), "optimizer": _without_own(self._partitioned.state_dict())}

    def template(self) -> dict[str, Any]:
        """As after a step."""
        return {"model": self.network.state_dict(), "optimizer": _without_own(self._partitioned.state_template())}

    def own_state(self) -> dict[str, Any]:
        """What error feedback has kept on this rank."""
        return {"method": self._partitioned.state_dict()["own"]}

    def load_state(self, shared: Mapping[str, Any], own: Mapping[str, Any] | None, old: Mapping[int, Any]) -> None:
        """Other ranks, levels and states are welcome, and other engines' weights and optimizer states too.

        What error feedback has kept is dropped then, with a warning.
        """
        optimizer = shared["optimizer"]
        kept: dict[str, Any] = {}
        if "masters" in optimizer:
            states = [own] if own is not None else list(old.values())
            kept = {key: value for state in states for key, value in state["method"].items()}
        else:  # another engine's
            present = _without_own(self._partitioned.state_dict())
            optimizer = {**present, "masters": {}, **states_by_name(optimizer, self._groups)}
        self.network.load_state_dict(shared["model"])
        keep_options(self._partitioned, {**optimizer, "own": kept})

    def close(self) -> None:
        """FSDP2 on gloo ends a process by an abort if its groups outlive this."""
        self._partitioned.remove()


def _rebuild_forward(blocks: list[nn.Module], settings: FSDP2Settings) -> None:
    """Put compilation and checkpointing inside each block: FSDP2's gathers stay outside, one for both computations."""
    wanted = [name for name in ("activation_checkpointing", "compile") if getattr(settings, name)]
    if wanted and not blocks:
        raise ValueError(
            f"engine.{wanted[0]}: {getattr(settings, wanted[0])} works block by block, and this model has no "
            "ModuleList of blocks; remove it"
        )
    for block in blocks:
        if settings.compile:
            block.forward = torch.compile(block.forward, backend=settings.compile)
        if settings.activation_checkpointing:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


@contextmanager
def paths_of_the_run() -> Iterator[None]:
    """In a configuration the arguments of partition() stand under `method`: its errors must name them so."""
    try:
        yield
    except ValueError as error:
        argument = re.match(r"[a-z]+", str(error))
        if argument is None or argument[0] not in PartitionSettings.model_fields:
            raise
        raise ValueError(f"method.{error}") from None


def _drop_gathered(model: nn.Module, inputs: object, scores: object) -> None:
    """FSDP2 keeps what the root has gathered for the backward pass: after an evaluation there is none."""
    assert isinstance(model, FSDPModule)
    if not torch.is_grad_enabled():
        model.reshard()


def _without_own(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key != "own"}
