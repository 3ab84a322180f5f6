"""One step of a model on the meta device: what it computes, when each gradient comes, what is kept for backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class StepTrace:
    """A micro-batch's forward and backward pass.

    forward_flops, backward_flops: multiplications and additions of matrix products and attention.
    ready: parameters that learn in the order in which their gradients are complete, each with the share of the backward
        pass's operations that is done by then.
    activation_bytes: kept by forward for backward, each storage once, the weights not counted.
    """

    forward_flops: int
    backward_flops: int
    ready: tuple[tuple[str, float], ...]
    activation_bytes: int


def trace_step(model: nn.Module, inputs: Tensor, targets: Tensor) -> StepTrace:
    """Trace a forward and backward pass; nothing is computed.

    Args:
        model: on the meta device: inputs -> scores (..., classes).
        inputs, targets: of one micro-batch, on the meta device.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    own = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}
    came: list[tuple[str, int]] = []
    counter = FlopCounterMode(display=False)

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    def note(parameter: Tensor) -> None:
        came.append((names[id(parameter)], counter.get_total_flops()))

    hooks: list[Any] = [p.register_post_accumulate_grad_hook(note) for p in model.parameters() if p.requires_grad]
    try:
        with counter:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                scores = model(inputs)
                loss = F.cross_entropy(scores.flatten(0, -2), targets.flatten())
            forward = counter.get_total_flops()
            activation_bytes = sum(kept.values())
            loss.backward()
            total = counter.get_total_flops()
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad()
    backward = total - forward
    ready = tuple((name, (at - forward) / backward if backward else 1.0) for name, at in came)
    return StepTrace(forward, backward, ready, activation_bytes)


def ddp_buckets(
    parameters: Sequence[tuple[str, Tensor]], bucket_bytes: int, first_bucket_bytes: int
) -> list[list[str]]:
    """The buckets that DDP fills from its second step on.

    Args:
        parameters: in the order in which their gradients come.
        bucket_bytes: its bucket_cap_mb, in bytes. first_bucket_bytes: of the first, so that sending begins early.
    """
    tensors = [tensor for _, tensor in parameters]
    indices, _ = torch._C._distributed_c10d._compute_bucket_assignment_by_size(
        tensors, [min(first_bucket_bytes, bucket_bytes), bucket_bytes], [False] * len(tensors)
    )
    return [[parameters[i][0] for i in bucket] for bucket in indices]
