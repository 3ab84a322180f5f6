"""How far experts keep to domains: what is counted of the experts that tokens of each domain select."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Of the experts, so many count as a domain's own.
_DECILE = 10


def frequencies(counts: Tensor) -> Tensor:
    """Of the selections of each domain's tokens, the share of each expert; rows sum to 1, even ones are 1 / E.

    Args:
        counts: (..., domains, experts) integers.
    Returns: as counts, fp64; 0 for a domain that has selected nothing.
    """
    c = counts.double()
    return c / c.sum(-1, keepdim=True).clamp(min=1.0)


def specialisation(counts: Tensor) -> Tensor:
    """I(expert; domain) / H(domain): 0 = experts do not tell domains apart, 1 = the expert tells the domain.

    I = sum_de p_de ln(p_de / (p_d p_e)), with p_de the share of the selections of expert e by tokens of domain d, each
    domain counted as often as the others; so H = ln(domains).

    Args:
        counts: (..., domains, experts) integers; at least two domains, each with a selection.
    Returns: (...), fp64.
    """
    given = frequencies(counts)
    expert = given.mean(-2, keepdim=True)
    terms = given * (given.clamp(min=1e-300) / expert.clamp(min=1e-300)).log()
    return terms.sum(-1).mean(-1) / math.log(counts.shape[-2])


def own_experts(counts: Tensor) -> Tensor:
    """The tenth of the experts (rounded up) that each domain selects most: (..., domains, experts) bool."""
    keep = -(-counts.shape[-1] // _DECILE)
    order = counts.argsort(dim=-1, descending=True, stable=True)[..., :keep]
    return torch.zeros_like(counts, dtype=torch.bool).scatter(-1, order, True)


def overlap(counts: Tensor) -> Tensor:
    """Jaccard's index of the domains' own experts, |A and B| / |A or B|: (..., domains, domains), 1 on the diagonal.

    Args:
        counts: (..., domains, experts) integers.
    """
    own = own_experts(counts)
    a, b = own.unsqueeze(-2), own.unsqueeze(-3)
    return (a & b).sum(-1) / (a | b).sum(-1)
