"""The fused door: an operator that is the whole router behind its logits, and counts and pulls like inject.py's.

A router that calls it launches one kernel and one small sum where softmax, top-k, gathers, histograms and the separate
door take about ten, and one kernel in the backward pass; beside the logits it keeps top_k + 1 numbers for each token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from thinwire.comm.balance.inject import recorder
from thinwire.kernels.route import route
from thinwire.kernels.router_gradient import Gates, Score, router_gradient

_NOBODY = -1


class Routing(NamedTuple):
    """What a router decides. selected: (..., top_k) int64. weights: (..., top_k), of each selected expert."""

    selected: Tensor
    weights: Tensor


def route_experts(
    logits: Tensor,
    top_k: int,
    *,
    valid_mask: Tensor | None = None,
    bias: Tensor | None = None,
    score: Score = "softmax",
    renormalise: bool = False,
) -> Routing:
    """Select experts and weigh them as LoadBalance.route() does, and balance nothing. Differentiable in the weights.

    Args and raises: as kernels.route.route(), logits of shape (..., experts).
    """
    return apply(logits, valid_mask, bias, top_k, score, renormalise, _NOBODY, "", False)


def apply(
    logits: Tensor,
    valid_mask: Tensor | None,
    bias: Tensor | None,
    top_k: int,
    score: Score,
    renormalise: bool,
    handle: int,
    layer: str,
    grad: bool,
) -> Routing:
    """Call the operator.

    Args:
        handle: the recorder's, of inject.register(); -1 = there is none.
        grad: whether gradients are on, which the operator itself cannot see.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    valid = None if valid_mask is None else valid_mask.reshape(-1)
    selected, weights, *_ = _route(flat, valid, bias, top_k, score, renormalise, handle, layer, grad)
    shape = (*logits.shape[:-1], top_k)
    return Routing(selected.view(shape), weights.view(shape))


@torch.library.custom_op("thinwire::route", mutates_args=())
def _route(
    logits: Tensor,
    valid: Tensor | None,
    bias: Tensor | None,
    top_k: int,
    score: str,
    renormalise: bool,
    handle: int,
    layer: str,
    grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    heard = handle != _NOBODY
    if heard and bias is None:
        bias = recorder(handle).own_bias(layer, logits, grad)
    done = route(logits, top_k, valid, bias, score=score, renormalise=renormalise)  # type: ignore[arg-type]
    unit = recorder(handle).count_tally(layer, logits, done.tally, valid, grad) if heard else -1
    return done.selected, done.weights, done.normaliser, torch.tensor(unit)


@_route.register_fake
def _(
    logits: Tensor,
    valid: Tensor | None,
    bias: Tensor | None,
    top_k: int,
    score: str,
    renormalise: bool,
    handle: int,
    layer: str,
    grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(logits.dtype, torch.float32)
    tokens = logits.shape[0]
    return (
        logits.new_empty(tokens, top_k, dtype=torch.int64),
        logits.new_empty(tokens, top_k, dtype=wide),
        logits.new_empty(tokens, dtype=wide),
        torch.empty((), dtype=torch.int64),
    )


@torch.library.custom_op("thinwire::route_gradient", mutates_args=())
def _gradient(
    of_weights: Tensor,
    logits: Tensor,
    valid: Tensor | None,
    selected: Tensor,
    weights: Tensor,
    normaliser: Tensor,
    unit: Tensor,
    score: str,
    renormalise: bool,
    handle: int,
    layer: str,
) -> Tensor:
    number = int(unit)
    pull, z_scale = recorder(handle).pull_on(layer, number, logits.device) if number >= 0 else (None, None)
    gates = Gates(selected, weights, of_weights, renormalise)
    return router_gradient(
        logits,
        pull,
        z_scale,
        valid,
        score=score,  # type: ignore[arg-type]
        normaliser=normaliser,
        gates=gates,
    )


@_gradient.register_fake
def _(
    of_weights: Tensor,
    logits: Tensor,
    valid: Tensor | None,
    selected: Tensor,
    weights: Tensor,
    normaliser: Tensor,
    unit: Tensor,
    score: str,
    renormalise: bool,
    handle: int,
    layer: str,
) -> Tensor:
    return torch.empty_like(logits)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, valid, _, _, ctx.score, ctx.renormalise, ctx.handle, ctx.layer, _ = inputs
    selected, weights, normaliser, unit = output
    ctx.save_for_backward(logits, valid, selected, weights, normaliser, unit)
    ctx.mark_non_differentiable(selected, normaliser, unit)


def _backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    here = (*ctx.saved_tensors, ctx.score, ctx.renormalise, ctx.handle, ctx.layer)
    return (_gradient(gradients[1], *here), *(None,) * 8)


_route.register_autograd(_backward, setup_context=_keep)
