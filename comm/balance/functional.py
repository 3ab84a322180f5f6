"""The loss as a function, for those who want to add it to theirs, and as the definition of what LoadBalance does."""

from __future__ import annotations

import torch
from torch import Tensor

from thinwire.kernels.router_gradient import Score


def expert_counts(selected: Tensor, num_experts: int, valid_mask: Tensor | None = None) -> Tensor:
    """c_i: how many times each expert is selected by valid tokens.

    Args:
        selected: (..., top_k) integers from 0 to num_experts - 1.
        valid_mask: (...) bool; default: all.
    Returns: (num_experts,) int64.
    """
    chosen = selected if valid_mask is None else selected[valid_mask]
    return torch.bincount(chosen.flatten(), minlength=num_experts)


def gate_scores(logits: Tensor, score: Score = "softmax") -> Tensor:
    """p: softmax(z), or sigmoid(z) divided by its sum; rows sum to 1."""
    if score == "softmax":
        return torch.softmax(logits, -1)
    s = torch.sigmoid(logits)
    return s / s.sum(-1, keepdim=True)


def balance_loss(
    logits: Tensor,
    fractions: Tensor,
    valid_mask: Tensor | None = None,
    *,
    tokens: float | Tensor | None = None,
    score: Score = "softmax",
) -> Tensor:
    """E * sum_i f_i P_i of one layer, P_i = sum of p_ti over valid tokens / N.

    Qiu et al. 2025 (2501.11873). 1 where f or P is even. With f of the global batch, and N its number of tokens, the
    sum of this over ranks and micro-batches is the global loss. Counts have no gradient.

    Args:
        logits: (..., num_experts).
        fractions: (num_experts,), f, which sum to 1: expert_counts(...) of the batch, divided by their sum.
        valid_mask: (...) bool; default: all.
        tokens: N; default: the valid tokens of these logits.
    Returns: scalar.
    """
    p = gate_scores(logits, score).reshape(-1, logits.shape[-1])
    if valid_mask is not None:
        p = p[valid_mask.reshape(-1)]
    count = max(len(p), 1) if tokens is None else tokens
    return logits.shape[-1] * (fractions.to(p.dtype) * p.sum(0)).sum() / count


def z_loss(logits: Tensor, valid_mask: Tensor | None = None, *, tokens: float | Tensor | None = None) -> Tensor:
    """sum over valid tokens of (logsumexp z_t)^2 / N.

    Zoph et al. 2022, ST-MoE (2202.08906).

    Args:
        logits, valid_mask, tokens: as in balance_loss().
    Returns: scalar.
    """
    lse = torch.logsumexp(logits.reshape(-1, logits.shape[-1]), -1)
    if valid_mask is not None:
        lse = lse[valid_mask.reshape(-1)]
    return lse.square().sum() / (max(len(lse), 1) if tokens is None else tokens)
