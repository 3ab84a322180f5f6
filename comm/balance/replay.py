"""Whether a forward pass is the real one, a recomputation in the backward pass, or none that will be learned from.

The only place that asks torch's private state. Activation checkpointing runs a block twice: the second time, in the
backward pass, nothing may be counted or sent again. Its reentrant mode runs the first pass without gradients, so that
`torch.is_grad_enabled()` alone tells neither the two apart nor the first one from an evaluation.
"""

from __future__ import annotations

import sys
from types import CodeType, FrameType

import torch
from torch.utils.checkpoint import CheckpointFunction

_TORCHS: CodeType = CheckpointFunction.forward.__code__


def in_backward() -> bool:
    """Whether the autograd engine is running a backward pass on this thread."""
    return int(torch._C._current_graph_task_id()) >= 0


def will_be_recomputed() -> bool:
    """Whether this is the first, gradient-less pass of a reentrant checkpoint that has a backward pass.

    Asked only where gradients are off: it walks up the stack, past checkpoints within checkpoints. A checkpoint has a
    backward pass where its node has edges; that its inputs require gradients does not say so under torch.no_grad().
    Torch's, DeepSpeed's and Megatron's function are known.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if _is_checkpoint(frame.f_code) and getattr(frame.f_locals.get("ctx"), "next_functions", None):
            return True
        frame = frame.f_back
    return False


def _is_checkpoint(code: CodeType) -> bool:
    name: str = getattr(code, "co_qualname", "")  # from Python 3.11 on
    return code is _TORCHS or name.endswith("CheckpointFunction.forward")
