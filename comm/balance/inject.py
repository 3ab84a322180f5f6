"""The door: an operator that leaves the logits as they are, counts in the forward pass, and pulls in the backward pass.

An operator of its own and not an autograd.Function, because torch.compile then takes it as it is: whatever is traced,
counting and pulling happen when the compiled code runs.
"""

from __future__ import annotations

import itertools
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class Recorder(Protocol):
    """What the operator calls back."""

    def count(self, layer: str, logits: Tensor, selected: Tensor, valid: Tensor | None, grad: bool) -> int:
        """Count a forward pass; returns the number of its unit, or -1 where nothing will be learned from it."""
        ...

    def present_bias(self, layer: str, logits: Tensor, grad: bool) -> Tensor:
        """(experts,) fp32: what this forward pass adds to the scores by which tokens select."""
        ...

    def pull(self, layer: str, unit: int, logits: Tensor, valid: Tensor | None) -> Tensor:
        """The gradient to add, in the backward pass."""
        ...

    def own_bias(self, layer: str, logits: Tensor, grad: bool) -> Tensor | None:
        """As present_bias(); None where there is no bias. For fused.py, as are the next two."""
        ...

    def count_tally(self, layer: str, logits: Tensor, tally: Tensor, valid: Tensor | None, grad: bool) -> int:
        """As count(), of what kernels.route has tallied."""
        ...

    def pull_on(self, layer: str, unit: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """What router_gradient() takes as pull and z_scale, in the backward pass."""
        ...


_recorders: WeakValueDictionary[int, Recorder] = WeakValueDictionary()
_handles = itertools.count()


def register(recorder: Recorder) -> int:
    """A number by which compiled code can name an object. It keeps nothing alive."""
    handle = next(_handles)
    _recorders[handle] = recorder
    return handle


def recorder(handle: int) -> Recorder:
    """What register() was given."""
    return _recorders[handle]


def inject(logits: Tensor, selected: Tensor, valid: Tensor | None, handle: int, layer: str, grad: bool) -> Tensor:
    """The logits, through which the recorder's gradient will flow.

    Args:
        logits: (tokens, experts). selected: (tokens, top_k). valid: (tokens,) bool or None.
        grad: whether gradients are on, which the operator itself cannot see.
    """
    out: Tensor = _balance(logits, selected, valid, handle, layer, grad)[0]
    return out


def selection_bias(logits: Tensor, handle: int, layer: str, grad: bool) -> Tensor:
    """The recorder's present bias, by an operator: compiled code asks anew in every forward pass.

    Args:
        logits: (tokens, experts); by them the operator is kept in its place, and on its device.
    """
    out: Tensor = _bias(logits, handle, layer, grad)
    return out


@torch.library.custom_op("thinwire::balance_bias", mutates_args=())
def _bias(logits: Tensor, handle: int, layer: str, grad: bool) -> Tensor:
    return _recorders[handle].present_bias(layer, logits, grad)


@_bias.register_fake
def _(logits: Tensor, handle: int, layer: str, grad: bool) -> Tensor:
    return logits.new_empty(logits.shape[-1], dtype=torch.float32)


@torch.library.custom_op("thinwire::balance", mutates_args=())
def _balance(
    logits: Tensor, selected: Tensor, valid: Tensor | None, handle: int, layer: str, grad: bool
) -> tuple[Tensor, Tensor]:
    unit = _recorders[handle].count(layer, logits, selected, valid, grad)
    return logits.clone(), torch.tensor(unit)


@_balance.register_fake
def _(
    logits: Tensor, selected: Tensor, valid: Tensor | None, handle: int, layer: str, grad: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(logits), torch.empty((), dtype=torch.int64)


@torch.library.custom_op("thinwire::balance_pull", mutates_args=())
def _pull(gradient: Tensor, logits: Tensor, valid: Tensor | None, unit: Tensor, handle: int, layer: str) -> Tensor:
    number = int(unit)
    if number < 0:
        return gradient.clone()
    return gradient + _recorders[handle].pull(layer, number, logits, valid)


@_pull.register_fake
def _(gradient: Tensor, logits: Tensor, valid: Tensor | None, unit: Tensor, handle: int, layer: str) -> Tensor:
    return torch.empty_like(gradient)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, _, valid, ctx.handle, ctx.layer, _ = inputs
    ctx.save_for_backward(logits, valid, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    logits, valid, unit = ctx.saved_tensors
    return _pull(gradient, logits, valid, unit, ctx.handle, ctx.layer), None, None, None, None, None


_balance.register_autograd(_backward, setup_context=_keep)
