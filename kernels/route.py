"""The forward pass of a router of a mixture of experts: who gets which token, with what weight, and how often."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from thinwire.kernels.route_on_cpu import route_on_cpu
from thinwire.kernels.route_on_gpu import launch
from thinwire.kernels.router_gradient import Score
from thinwire.kernels.triton_kernel import triton_is_installed

LARGEST_TOP_K = 64
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Routed(NamedTuple):
    """What route() finds out.

    selected: (tokens, top_k) int64, experts by falling score. weights: (tokens, top_k), fp32, or fp64 for fp64 logits.
    normaliser: (tokens,), as the weights: log sum_i exp z_ti, or sum_i sigmoid(z_ti); router_gradient() wants it.
    tally: (experts + 3,) int32: selections of each expert, tokens, selections of experts that do not exist (0), tokens
    with a NaN or infinite logit; of valid tokens only. sums: (experts,), as the weights: sum over valid tokens of p_ti,
    if asked for.
    """

    selected: Tensor
    weights: Tensor
    normaliser: Tensor
    tally: Tensor
    sums: Tensor | None


def route(
    logits: Tensor,
    top_k: int,
    valid: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    score: Score = "softmax",
    renormalise: bool = False,
    sums: bool = False,
) -> Routed:
    """Select experts by their scores, weigh them, and count them, in one pass over the logits.

    s_t = softmax(z_t), or sigmoid(z_t) element by element; p_t = s_t / sum_j s_tj. Token t selects the top_k experts of
    largest z_ti, with a bias those of largest s_ti + bias_i (Wang et al. 2024, 2408.15664); of equal ones those of
    lower number; NaN counts as largest. The weights are the s of the selected, divided by their sum to renormalise,
    and never see the bias. Every token is routed; those that are not valid are not counted.

    On a GPU this is a Triton kernel and one sum over its programs (without Triton: PyTorch, with a warning), on a CPU
    PyTorch and NumPy in tiles that stay in the cache; fp64 takes the reference. Computed in fp32, with no float
    atomics: the same call gives the same bits. Not differentiable by itself: see comm/balance/fused.py.

    Args:
        logits: (tokens, experts), fp32, bf16, fp16 or fp64.
        top_k: 1 to the number of experts, and at most 64.
        valid: (tokens,) bool: tokens that are not padding; None = all.
        bias: (experts,) floating.
        sums: whether to add up p too, for the value of the loss.
    Raises:
        ValueError: an argument other than these.
    """
    _check(logits, top_k, valid, bias, score)
    logits, bias = logits.detach(), None if bias is None else bias.detach()
    logits = logits.contiguous()
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if logits.numel() == 0 or wide == torch.float64:
        return route_reference(logits, top_k, valid, bias, score=score, renormalise=renormalise, sums=sums)
    bias = None if bias is None else bias.to(wide).contiguous()
    valid = None if valid is None else valid.contiguous()
    if logits.device.type == "cpu":
        return Routed(*route_on_cpu(logits, top_k, valid, bias, score == "sigmoid", renormalise, sums))
    if logits.device.type == "cuda" and triton_is_installed():
        return Routed(*launch(logits, top_k, valid, bias, score == "sigmoid", renormalise, sums))
    if logits.device.type == "cuda":
        warnings.warn(
            "route: Triton is not installed, so PyTorch routes GPU tensors: same result, several times slower; "
            "pip install 'thinwire[triton]' brings it",
            RuntimeWarning,
            stacklevel=2,
        )
    return route_reference(logits, top_k, valid, bias, score=score, renormalise=renormalise, sums=sums)


def route_reference(
    logits: Tensor,
    top_k: int,
    valid: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    score: Score = "softmax",
    renormalise: bool = False,
    sums: bool = False,
) -> Routed:
    """The definition of `route`; differentiable in its weights."""
    tokens, experts = logits.shape
    z = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    keep = torch.ones(tokens, dtype=torch.bool, device=z.device) if valid is None else valid
    softmax = score == "softmax"
    s = torch.softmax(z, -1) if softmax else torch.sigmoid(z)
    normaliser = torch.logsumexp(z, -1) if softmax else s.sum(-1)
    ranked = z if bias is None else s + bias.to(z.dtype)
    selected = ranked.argsort(dim=-1, descending=True, stable=True)[:, :top_k].contiguous()
    weights = s.gather(-1, selected)
    if renormalise and softmax:
        weights = torch.softmax(z.gather(-1, selected), -1)
    elif renormalise:
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(z.dtype).tiny)
    counts = torch.bincount(selected[keep].flatten(), minlength=experts)
    bad = (~z.isfinite().all(-1) & keep).sum()
    tally = torch.cat((counts, torch.stack((keep.sum(), torch.zeros_like(bad), bad)))).to(torch.int32)
    p = s if softmax else s / normaliser.clamp(min=torch.finfo(z.dtype).tiny)[:, None]
    return Routed(selected, weights, normaliser, tally, p[keep].sum(0) if sums else None)


def _check(logits: Tensor, top_k: int, valid: Tensor | None, bias: Tensor | None, score: str) -> None:
    if logits.dim() != 2 or logits.dtype not in _DTYPES:
        raise ValueError(
            f"route: logits are {logits.dtype} of shape {tuple(logits.shape)}; allowed: fp32, bf16, fp16 or fp64, "
            "(tokens, experts)"
        )
    tokens, experts = logits.shape
    if not 1 <= top_k <= min(experts, LARGEST_TOP_K):
        raise ValueError(
            f"route: top_k is {top_k}; for {experts} experts it must be 1 to {min(experts, LARGEST_TOP_K)}"
        )
    if valid is not None and (valid.shape != (tokens,) or valid.dtype != torch.bool):
        raise ValueError(
            f"route: valid is {valid.dtype} of shape {tuple(valid.shape)}; allowed: bool, ({tokens},), true where a "
            "token is not padding"
        )
    if bias is not None and (bias.shape != (experts,) or not bias.is_floating_point()):
        raise ValueError(
            f"route: bias is {bias.dtype} of shape {tuple(bias.shape)}; allowed: floating, ({experts},), one number "
            "for each expert"
        )
    for name, tensor in (("valid", valid), ("bias", bias)):
        if tensor is not None and tensor.device != logits.device:
            raise ValueError(f"route: {name} is on {tensor.device} but logits on {logits.device}; use one device")
    if score not in ("softmax", "sigmoid"):
        raise ValueError(f"route: score is {score!r}; allowed: softmax or sigmoid")
