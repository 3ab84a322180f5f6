"""What training keeps on each rank that has whole weights: weights, gradients, and the optimizer's states."""

from __future__ import annotations

from collections.abc import Sequence

from thinwire.comm.forecast import Parameter
from thinwire.dist.optimizers import AdamWSettings, SGDSettings

_STEP_BYTES = 4  # AdamW counts its steps in an fp32 number for each parameter


def replica_states(optimizer: AdamWSettings | SGDSettings, parameters: Sequence[Parameter]) -> dict[str, int]:
    """Bytes by state of one rank under engine ddp: params, grads, which are views of DDP's buckets, and optim.

    Args:
        parameters: of the model, those that do not learn included; shared ones once.
    """
    return {
        "params": sum(_bytes(p) for p in parameters),
        "grads": sum(_bytes(p) for p in parameters if p.trained),
        "optim": optimizer_bytes(optimizer, parameters),
    }


def optimizer_bytes(optimizer: AdamWSettings | SGDSettings, parameters: Sequence[Parameter]) -> int:
    """Of an optimizer's states after its first step: two tensors for each weight under adamw, one under momentum."""
    trained = [p for p in parameters if p.trained]
    if isinstance(optimizer, AdamWSettings):
        return sum(2 * _bytes(p) + _STEP_BYTES for p in trained)
    return sum(_bytes(p) for p in trained) if optimizer.momentum else 0


def _bytes(parameter: Parameter) -> int:
    return parameter.numel * parameter.dtype.itemsize
