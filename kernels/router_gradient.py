"""Gradient in router logits of the load-balancing loss and the z-loss, from the logits alone."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Score = Literal["softmax", "sigmoid"]


def router_gradient(
    logits: Tensor, pull: Tensor, z_scale: Tensor | None, valid: Tensor | None, *, score: Score = "softmax"
) -> Tensor:
    """dz_ti = p_ti (w_i - sum_j w_j p_tj) + 2 z lse_t p_ti; 0 for tokens that are not valid.

    p_t = softmax(z_t), or for score sigmoid s_t / sum_j s_tj with s = sigmoid(z), where the first term has another
    factor (1 - s_ti). It is the gradient of sum_t (sum_i w_i p_ti + z lse_t^2).

    Args:
        logits: (tokens, experts).
        pull: (experts,), w: kappa * a * E / N * f.
        z_scale: scalar tensor, z: kappa * z_coef / N; None = no z-loss.
        valid: (tokens,) bool; None = all.
    Returns: as the logits; computed in fp32, or fp64 for fp64 logits.
    """
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    z, w = logits.to(wide), pull.to(wide)
    if score == "softmax":
        p = torch.softmax(z, -1)
        gradient = p * (w - (p @ w)[:, None])
    else:
        s = torch.sigmoid(z)
        p = s / s.sum(-1, keepdim=True).clamp(min=torch.finfo(wide).tiny)
        gradient = p * (1 - s) * (w - (p @ w)[:, None])
    if z_scale is not None:
        p = torch.softmax(z, -1)
        gradient += (2 * z_scale.to(wide)) * torch.logsumexp(z, -1, keepdim=True) * p
    if valid is not None:
        gradient = torch.where(valid[:, None], gradient, 0.0)
    return gradient.to(logits.dtype)
