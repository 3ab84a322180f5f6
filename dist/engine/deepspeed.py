"""The DeepSpeed engine: ZeRO stages 0 to 3, with thinwire's collectives under it."""

from __future__ import annotations

import gc
import logging
import math
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.optim import Optimizer

from thinwire.comm.allreduce import AllReduceSettings
from thinwire.comm.errors import NonFiniteGradientError
from thinwire.comm.method import Method
from thinwire.comm.partition.deepspeed_comm import DeepSpeedComm, deepspeed_comm
from thinwire.comm.partition.wires.gradients import GradientWireSettings
from thinwire.comm.partition.wires.weights import GatherWireSettings, SameWeights
from thinwire.comm.settings import Settings
from thinwire.dist.engine.deepspeed_state import DeepSpeedState
from thinwire.dist.engine.engine import merge_method_states
from thinwire.dist.optimizers import OptimizerPlan
from thinwire.dist.world import World

LevelName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
_NEVER = 1 << 62  # steps between two of DeepSpeed's own reports


class DeepSpeedSettings(Settings):
    """ZeRO: Rajbhandari et al. 2019 (1910.02054), as DeepSpeed has it.

    stage: 0 = whole states on each rank; 1 shards the optimizer's, 2 the gradients too, 3 the weights too.
    secondary: a level in which a copy of the weights is kept from one gather until the next step (hpZ); stage 3 only.
    persist_below: in stage 3, weights of fewer elements stay whole on every rank.
    keep_gathered: in stage 3, elements of gathered weights that may stay from one use to the next.
    gather: format of gathered weights, as method.gather of partition.
    gradients: format by name of level; where none is given, that of method.dtype.
    """

    kind: Literal["deepspeed"] = "deepspeed"
    stage: Literal[0, 1, 2, 3] = 3
    secondary: LevelName | None = None
    persist_below: int = Field(100_000, ge=0)
    keep_gathered: int = Field(1_000_000_000, ge=0)
    gather: GatherWireSettings = SameWeights()
    gradients: dict[LevelName, GradientWireSettings] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fits_its_stage(self) -> DeepSpeedSettings:
        if self.secondary is not None and self.stage != 3:
            raise ValueError(
                f"secondary: {self.secondary} with stage {self.stage}, which gathers no weights in its backward pass; "
                "give stage: 3, or secondary: null"
            )
        if self.stage == 0 and self.gather != SameWeights():
            raise ValueError("gather: stage 0 gathers no weights; give stage 1, 2 or 3, or gather: same")
        return self


class DeepSpeedEngine:
    """An Engine: deepspeed.initialize() around the model and the optimizer that the configuration names.

    Args:
        model: the same on every rank; changed in place.
        micro_batches: of each step.
        clip_norm: largest norm of the mean gradient; 0 = no limit.
        seed: of stochastic rounding.
    Raises:
        ValueError: DeepSpeed is not installed; the settings do not fit this world.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: DeepSpeedSettings,
        method: AllReduceSettings,
        plan: OptimizerPlan,
        world: World,
        *,
        micro_batches: int,
        clip_norm: float,
        precision: Literal["fp32", "bf16"],
        seed: int,
    ) -> None:
        if precision != "fp32":
            raise ValueError(
                f"train.precision: {precision} with engine deepspeed, which switches autocast off inside of the model; "
                "give fp32, or engine: {kind: ddp} or method: {kind: partition}"
            )
        ranks_of_copy = _secondary_ranks(settings, world)
        deepspeed = _start(world)
        self._comm: DeepSpeedComm = deepspeed_comm(
            world.mesh,
            gradients=settings.gradients,
            default={"kind": method.dtype},
            gather=settings.gather,
            queue=world.queue,
            seed=seed % (1 << 31),
        )
        zero = {
            "stage": settings.stage,
            "zero_hpz_partition_size": ranks_of_copy,
            "stage3_param_persistence_threshold": settings.persist_below,
            "stage3_max_live_parameters": settings.keep_gathered,
            "stage3_max_reuse_distance": settings.keep_gathered,
        }
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": micro_batches,
            "gradient_clipping": clip_norm,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": _NEVER,
        }
        optimizer = plan.factory(plan.groups, **plan.options)
        try:
            self._engine: Any = deepspeed.initialize(
                model=model, optimizer=optimizer, config=config, dist_init_required=False
            )[0]
        except BaseException:
            self._comm.remove()
            raise
        self.network = model
        self.optimizer: Optimizer = optimizer
        self.method: Method = self._comm
        self.forward_is_collective = settings.stage == 3
        self._queue = world.queue
        self._stage = settings.stage
        self._state = DeepSpeedState(model, optimizer, self._engine, settings.stage)
        self._state.clear_padding()

    @property
    def exposed_s(self) -> float:
        """Seconds for which somebody waited for the queue."""
        return self._queue.exposed_s

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Stages 0 and 1 send gradients with the last one, stages 2 and 3 with each."""
        self._engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def forward(self, inputs: Tensor) -> Tensor:
        """In stage 3, gathers the weights module by module."""
        scores: Tensor = self._engine(inputs)
        return scores

    def backward(self, loss: Tensor) -> None:
        """DeepSpeed divides by the number of ranks; the loss is divided by that of micro-batches already."""
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> float:
        """DeepSpeed's stages 1 to 3 refuse a gradient that is not finite; stage 0 does not, so it is asked first."""
        norm = 0.0
        if self._stage == 0:
            gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(gradients))
            if not math.isfinite(norm):
                self._engine.zero_grad()
                raise NonFiniteGradientError(())
        self._engine.step()
        self._comm.end_step()
        if self._stage > 0:
            if self._engine.optimizer.overflow:
                raise NonFiniteGradientError(())
            norm = float(self._engine.get_global_grad_norm())
        return norm

    def shared_state(self) -> dict[str, Any]:
        """Whole tensors by name, gathered one after another: any stage and number of ranks can load them. Collective.

        Every rank holds all weights and optimizer states in its memory until they are written.
        """
        with self._comm.exact():
            return self._state.whole()

    def template(self) -> dict[str, Any]:
        """Nothing is cut."""
        return self.shared_state()

    def own_state(self) -> dict[str, Any]:
        """Nothing but the number of collectives."""
        return {"method": self._comm.state_dict()}

    def load_state(self, shared: Mapping[str, Any], own: Mapping[str, Any] | None, old: Mapping[int, Any]) -> None:
        """Each rank takes its part of every tensor; then weights go out as after a step."""
        self._comm.load_state_dict(merge_method_states(own, old))
        self._state.load(shared)

    def close(self) -> None:
        """Take the hooks and the collectives out; what DeepSpeed holds would outlive the process groups."""
        self._comm.remove()
        self._engine.destroy()
        del self._engine, self._state
        gc.collect()


def _secondary_ranks(settings: DeepSpeedSettings, world: World) -> int:
    """The ranks of a group of hpZ: 1 = none. DeepSpeed takes neighbours by rank."""
    if settings.secondary is None:
        return 1
    try:
        groups = world.mesh.groups(settings.secondary)
    except ValueError as error:
        raise ValueError(f"engine.secondary: {error}") from None
    size = len(groups[0])
    if size in (1, world.size):
        raise ValueError(
            f"engine.secondary: {settings.secondary} holds {size} of the {world.size} ranks, so a copy in it would be "
            "no use; name a level between, or give null"
        )
    if any(list(group) != list(range(group[0], group[0] + size)) for group in groups):
        raise ValueError(
            f"engine.secondary: DeepSpeed keeps copies among neighbouring ranks, but {settings.secondary} joins "
            f"{groups[0]}; start the ranks of a host one after another, or give null"
        )
    return size


def _start(world: World) -> Any:
    """DeepSpeed on this rank's device, over the process groups that are there.

    Its launcher's variable is told to it, and on a CPU it is kept from compiling a shared-memory collective, which
    nothing would use here.
    """
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        import deepspeed
        from deepspeed.accelerator import get_accelerator, set_accelerator
    except ImportError as error:
        raise ValueError(
            f"engine.kind: deepspeed needs the package, which cannot be imported ({error}); install thinwire[deepspeed]"
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if world.device.type == "cpu" and get_accelerator().device_name() != "cpu":
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        set_accelerator(CPU_Accelerator())
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # or an engine without hpZ would use another's
    deepspeed.init_distributed(
        "nccl" if world.device.type == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False
    )
    return deepspeed
