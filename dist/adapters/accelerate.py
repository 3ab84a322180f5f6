"""Accelerate: a method for the model that prepare() has wrapped, and its state in save_state()."""

from __future__ import annotations

from typing import Any

from thinwire.dist.adapters.attached import (
    AttachableSettings,
    Attached,
    MethodChoice,
    attach,
    ddp_module,
    settings_of,
)
from thinwire.dist.world import World

# Kinds of accelerate.DistributedType under which no DDP model is made, and what to do.
_OTHER_KINDS = {
    "NO": "there is one process, and nothing to exchange; start several: torchrun --nproc-per-node 2",
    "FSDP": "call tw.compress(model, ..., group=...) with the ranks that hold the same shard (FSDP2)",
    "DEEPSPEED": "call tw.deepspeed_comm(...) before accelerator.prepare()",
}


def for_accelerate(
    accelerator: Any,
    model: Any,
    method: MethodChoice,
    *,
    optimizer: Any = None,
    clip_norm: float = 0.0,
    world: World | None = None,
    timeout_s: float = 60.0,
) -> Attached:
    """Let a method carry the gradients of a model that Accelerate has prepared.

    Call it after accelerator.prepare(), on every rank; accelerator.save_state() then keeps its state. Accelerate itself
    takes no hook of others: DistributedDataParallelKwargs(comm_hook=...) drops what is not in its list, and says
    nothing.

    Args:
        accelerator: of accelerate.Accelerator.
        model: as prepare() returned it.
        method: settings, a mapping as under `method:` of a configuration, or a kind: allreduce, compress, local_sgd.
        optimizer: as prepare() returned it; local_sgd needs it, and compress reads its learning rate and momentum.
        clip_norm: largest norm of the true gradient, for method compress; then without accelerator.clip_grad_norm_().
        world: of thinwire.init(), called before Accelerator(), for the machine's levels and one deadline for all.
        timeout_s: deadline of one operation without a world, in seconds.
    Returns: the method: predicted_bytes(), metrics(), describe(), agreed(); registered for checkpointing.
    Raises:
        ValueError: Accelerate or the model is set up so that the method would not run, or would run wrongly.
        PeerLostError, PeerLateError, PeerFailedError: from accelerator.backward(), when a rank is gone or overdue.

    Example:
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        thinwire.for_accelerate(accelerator, model, "allreduce")
    """
    settings = settings_of(method, "for_accelerate")
    check_accelerator(accelerator, settings, accelerator.gradient_accumulation_steps)
    if accelerator.project_configuration.save_on_each_node:
        raise ValueError(
            "ProjectConfiguration(save_on_each_node=True): rank 0 alone holds the states of all ranks, which every "
            "rank reads; leave it out, and save where all nodes can read"
        )
    attached = attach(
        settings,
        ddp_module(model, "model"),
        optimizer,
        scaler=accelerator.scaler,
        clip_norm=clip_norm,
        world=world,
        timeout_s=timeout_s,
    )
    accelerator.register_for_checkpointing(attached)
    return attached


def check_accelerator(accelerator: Any, settings: AttachableSettings, micro_batches: int) -> None:
    """Refuse an Accelerator that makes no DDP model, has dropped a hook, or exchanges more often than once per step.

    Args:
        micro_batches: of each step.
    Raises:
        ValueError: says which, and what to do.
    """
    kind = str(accelerator.distributed_type.value)
    if not kind.startswith("MULTI_"):
        hint = _OTHER_KINDS.get(kind, "use its data-parallel mode")
        raise ValueError(f"accelerator: distributed_type {kind} wraps no model in DistributedDataParallel; {hint}")
    asked = getattr(accelerator.ddp_handler, "comm_hook", None)
    if asked is not None and str(getattr(asked, "value", asked)) != "no":
        raise ValueError(
            f"accelerator: DistributedDataParallelKwargs(comm_hook={asked!r}): DDP takes one hook only, and Accelerate "
            "silently drops those that are not in its own list; leave comm_hook out"
        )
    if micro_batches > 1 and accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False):
        raise ValueError(
            f"accelerator: GradientAccumulationPlugin(sync_each_batch=True) exchanges the accumulated gradient "
            f"{micro_batches} times in each step, and method {settings.kind} would take each for a gradient of its "
            "own; set sync_each_batch=False"
        )
