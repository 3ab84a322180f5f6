"""How far each token's score of each expert is from being selected, as histograms whose sum over ranks tells quantiles.

A margin is d_ti = theta_t - (s_ti + b_i), theta_t the largest biased score that is not selected: below 0 where token t
selects expert i, and then by so much b_i may fall. Bins are fine about 0, where a bias that is nearly right must be
read, and grow from there by a constant factor, so that few suffice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from thinwire.kernels.router_gradient import Score

# Scores are from 0 to 1 and biases differ by less, so margins are hardly larger than 2; below 2^-17 nothing changes.
_LARGEST_EXPONENT, _SMALLEST_EXPONENT = 1, -17


def bin_edges(bins: int) -> Tensor:
    """Edges of the bins, ascending: (bins + 1,) fp64. Margins beyond count in the outermost bins."""
    grow = torch.linspace(_SMALLEST_EXPONENT, _LARGEST_EXPONENT, bins // 2, dtype=torch.float64).exp2()
    return torch.cat((-grow.flip(0), grow.new_zeros(1), grow))


def margin_histogram(logits: Tensor, bias: Tensor, top_k: int, valid: Tensor | None, bins: int, score: Score) -> Tensor:
    """How many valid tokens have a margin in each bin: (num_experts * bins,) int32.

    Args:
        logits: (tokens, num_experts).
        bias: (num_experts,) fp32, by which these tokens selected.
        valid: (tokens,) bool; None = all.
    """
    experts = logits.shape[-1]
    z = logits.float()
    biased = (z.softmax(-1) if score == "softmax" else z.sigmoid()) + bias
    cutoff = biased.topk(top_k + 1, -1).values[:, -1:]
    edges = bin_edges(bins)[1:-1].to(device=z.device, dtype=z.dtype)
    places = torch.bucketize(cutoff - biased, edges, right=True)
    places += bins * torch.arange(experts, device=z.device)
    if valid is not None:
        places = torch.where(valid[:, None], places, experts * bins)
    counts = torch.zeros(experts * bins + 1, dtype=torch.int32, device=z.device)
    places = places.flatten()
    return counts.scatter_add_(0, places, torch.ones_like(places, dtype=torch.int32))[:-1]


def cutoff_shift(histograms: Tensor, share: float) -> Tensor:
    """The quantile `share` of each expert's margins, linear within a bin: what to add to its bias.

    Args:
        histograms: (..., bins) integers.
    Returns: (...) fp64; 0 where nothing was counted.
    """
    edges = bin_edges(histograms.shape[-1]).to(histograms.device)
    below = histograms.double().cumsum(-1)
    wanted = share * below[..., -1:]
    place = (below < wanted).sum(-1, keepdim=True).clamp(max=histograms.shape[-1] - 1)
    inside = histograms.double().gather(-1, place)
    before = below.gather(-1, place) - inside
    part = (wanted - before) / inside.clamp(min=1)
    shift = edges[place] + part * (edges[place + 1] - edges[place])
    return torch.where(wanted > 0, shift, 0.0).squeeze(-1)
