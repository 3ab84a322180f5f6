"""Gradient in router logits of the load-balancing loss, the z-loss and the gates' weights, from the logits alone."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from typing import Literal

import torch
from torch import Tensor

from thinwire.kernels.route_on_cpu import tile_elements
from thinwire.kernels.router_gradient_on_gpu import launch
from thinwire.kernels.triton_kernel import triton_is_installed

Score = Literal["softmax", "sigmoid"]

_ONE = torch.ones(())


@dataclass(frozen=True)
class Gates:
    """The weights that route() gave to the selected experts, and the loss's gradient in them.

    selected: (tokens, top_k) int64. weights, gradient: (tokens, top_k) fp32 or fp64. renormalised: whether the weights
    were divided by their sum.
    """

    selected: Tensor
    weights: Tensor
    gradient: Tensor
    renormalised: bool

    def map(self, change: Callable[[Tensor], Tensor]) -> Gates:
        """Each tensor changed."""
        return Gates(change(self.selected), change(self.weights), change(self.gradient), self.renormalised)


def router_gradient(
    logits: Tensor,
    pull: Tensor | None,
    z_scale: Tensor | None,
    valid: Tensor | None,
    *,
    score: Score = "softmax",
    normaliser: Tensor | None = None,
    gates: Gates | None = None,
) -> Tensor:
    """dL/dz of L = sum over valid t of (sum_i w_i p_ti + z lse_t^2), and of what comes back through the gates.

        softmax   dz_ti = p_ti (w_i - sum_j w_j p_tj) + 2 z lse_t p_ti
        sigmoid   dz_ti = p_ti (1 - s_ti) (w_i - sum_j w_j p_tj) + 2 z lse_t softmax(z_t)_i

    p_t = softmax(z_t), or s_t / sum_j s_tj with s = sigmoid(z). With g the gradient in the weights q of the selected:

        softmax   dz_ti += [i selected] q_ti g_ti - p_ti sum_j q_tj g_tj
        sigmoid   dz_ti += [i selected] q_ti (1 - s_ti) g_ti
        renormalised: [i selected] q_ti (g_ti - sum_j q_tj g_tj), for sigmoid times (1 - s_ti)

    The gates' part has tokens that are not valid too. On a GPU this is a Triton kernel (without Triton: PyTorch, with
    a warning), on a CPU PyTorch in tiles that stay in the cache; fp64 takes the reference.

    Args:
        logits: (tokens, experts), fp32, bf16, fp16 or fp64.
        pull: (experts,), w: kappa * a * E / N * f; None = no balancing.
        z_scale: scalar tensor, z: kappa * z_coef / N; None = no z-loss.
        valid: (tokens,) bool; None = all.
        normaliser: (tokens,), of route(); None = it is computed again.
        gates: see Gates; None = nothing comes back through them.
    Returns: as the logits; computed in fp32, or fp64 for fp64 logits.
    """
    if logits.dtype == torch.float64 or logits.numel() == 0:
        return router_gradient_reference(logits, pull, z_scale, valid, score=score, gates=gates)
    logits = logits.contiguous()
    if gates is not None:
        gates = gates.map(Tensor.contiguous)
    if logits.device.type == "cpu":
        return _in_tiles(logits, pull, z_scale, valid, score, normaliser, gates)
    if logits.device.type == "cuda" and triton_is_installed():
        out = torch.empty_like(logits)
        launch(logits, pull, z_scale, valid, normaliser, gates, out, sigmoid=score == "sigmoid")
        return out
    if logits.device.type == "cuda":
        warnings.warn(
            "router_gradient: Triton is not installed, so PyTorch computes it: same result, several times slower; "
            "pip install 'thinwire[triton]' brings it",
            RuntimeWarning,
            stacklevel=2,
        )
    return router_gradient_reference(logits, pull, z_scale, valid, score=score, gates=gates)


def router_gradient_reference(
    logits: Tensor,
    pull: Tensor | None,
    z_scale: Tensor | None,
    valid: Tensor | None,
    *,
    score: Score = "softmax",
    gates: Gates | None = None,
) -> Tensor:
    """The definition of `router_gradient`."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    z = logits.to(wide)
    s = torch.softmax(z, -1) if score == "softmax" else torch.sigmoid(z)
    slope = torch.ones_like(s) if score == "softmax" else 1 - s
    gradient = torch.zeros_like(z)
    if pull is not None:
        w = pull.to(wide)
        p = s / s.sum(-1, keepdim=True).clamp(min=torch.finfo(wide).tiny) if score == "sigmoid" else s
        gradient += p * slope * (w - (p * w).sum(-1, keepdim=True))
    if z_scale is not None:
        gradient += (2 * z_scale.to(wide)) * torch.logsumexp(z, -1, keepdim=True) * torch.softmax(z, -1)
    if valid is not None:
        gradient = torch.where(valid[:, None], gradient, 0.0)
    if gates is not None:
        q, g = gates.weights.to(wide), gates.gradient.to(wide)
        mean = (q * g).sum(-1, keepdim=True)
        of_gate = q * (g - mean) if gates.renormalised else q * g
        gradient.scatter_add_(-1, gates.selected, of_gate * slope.gather(-1, gates.selected))
        if score == "softmax" and not gates.renormalised:
            gradient -= s * mean
    return gradient.to(logits.dtype)


@torch.no_grad()
def _in_tiles(
    logits: Tensor,
    pull: Tensor | None,
    z_scale: Tensor | None,
    valid: Tensor | None,
    score: Score,
    normaliser: Tensor | None,
    gates: Gates | None,
    tile: int = 0,
) -> Tensor:
    """As `router_gradient` on a CPU, not for fp64."""
    tokens, experts = logits.shape
    step = max(1, (tile or tile_elements()) // experts)
    out = torch.empty_like(logits)
    wide = out if out.dtype == torch.float32 else None
    work = [torch.empty(min(step, tokens), experts) for _ in range(3)]
    w = None if pull is None else pull.float()
    z_twice = None if z_scale is None else 2 * z_scale.float()
    for start in range(0, tokens, step):
        here = slice(start, min(start + step, tokens))
        z = logits[here].float()
        gradient, *scratch = (tensor[: len(z)] for tensor in work)
        gradient = gradient if wide is None else wide[here]
        keep = None if valid is None else valid[here].float()
        parts = None if gates is None else gates.map(itemgetter(here))
        norm = None if normaliser is None else normaliser[here]
        of_tile = _softmax_tile if score == "softmax" else _sigmoid_tile
        of_tile(z, w, z_twice, keep, norm, parts, gradient, scratch)
        if wide is None:
            out[here] = gradient
    return out


def _softmax_tile(
    z: Tensor,
    w: Tensor | None,
    z_twice: Tensor | None,
    keep: Tensor | None,
    norm: Tensor | None,
    gates: Gates | None,
    out: Tensor,
    scratch: list[Tensor],
) -> None:
    """out = p * (keep w_i + c_t), c_t = keep (2 z lse_t - <p_t, w>) - <q_t, g_t>, and the selected ones' own."""
    lse = torch.logsumexp(z, -1) if norm is None else norm
    p = torch.sub(z, lse[:, None], out=out).exp_()
    c = torch.zeros_like(lse) if z_twice is None else z_twice * lse
    if w is not None:
        c = c - torch.mv(p, w, out=torch.empty_like(lse))  # autocast leaves alone what has an out
    if keep is not None:
        _leave_out(p, c, keep, gates)
    of_gate = None
    if gates is not None:
        of_gate = gates.weights * gates.gradient
        through = of_gate.sum(-1)
        if gates.renormalised:
            of_gate = of_gate.addcmul_(gates.weights, through[:, None], value=-1)
        else:
            c = c - through
    if w is None:
        p.mul_(c[:, None])
    elif keep is None:
        p.mul_(torch.add(c[:, None], w, out=scratch[0]))
    else:
        p.mul_(torch.mul(keep[:, None], w, out=scratch[0]).add_(c[:, None]))
    if gates is not None and of_gate is not None:
        p.scatter_add_(-1, gates.selected, of_gate)


def _leave_out(p: Tensor, c: Tensor, keep: Tensor, gates: Gates | None) -> None:
    """Nothing pulls what is not a token; that may hold anything, NaN too."""
    c.mul_(keep)
    if not math.isfinite(c.sum().item()):
        c.masked_fill_(keep == 0, 0.0)
        if gates is None:
            p.masked_fill_((keep == 0)[:, None], 0.0)


def _sigmoid_tile(
    z: Tensor,
    w: Tensor | None,
    z_twice: Tensor | None,
    keep: Tensor | None,
    norm: Tensor | None,
    gates: Gates | None,
    out: Tensor,
    scratch: list[Tensor],
) -> None:
    """out = s (1 - s) (w_i - <p_t, w>) / sum_j s_tj, where kept, and the z-loss's and the selected ones' own."""
    s = torch.sigmoid(z, out=scratch[0])
    if w is not None:
        total = (s.sum(-1) if norm is None else norm).clamp(min=torch.finfo(torch.float32).tiny)
        torch.sub(w, (torch.mv(s, w, out=torch.empty_like(total)) / total)[:, None], out=out)
        out.mul_(s).mul_(torch.sub(_ONE, s, out=scratch[1]))
        out.div_(total[:, None])
    else:
        out.zero_()
    if z_twice is not None:
        lse = torch.logsumexp(z, -1)
        p = torch.sub(z, lse[:, None], out=scratch[1]).exp_()
        out.addcmul_(p, (z_twice * lse)[:, None])
    if keep is not None and math.isfinite(out.sum().item()):
        out.mul_(keep[:, None])
    elif keep is not None:
        out.masked_fill_((keep == 0)[:, None], 0.0)
    if gates is not None:
        q, g = gates.weights, gates.gradient
        of_gate = q * g
        if gates.renormalised:
            of_gate.addcmul_(q, of_gate.sum(-1, keepdim=True), value=-1)
        out.scatter_add_(-1, gates.selected, of_gate * (1 - s.gather(-1, gates.selected)))
