"""Experts: many small MLPs, each for the tokens that selected it. Dropless: none is left out."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinwire.dist.models.grouped_product import grouped_product
from thinwire.dist.models.router import Routing


class Experts(nn.Module):
    """y_t = sum over the experts e that token t selected of weight_te * expert_e(x_t).

    Gale et al. 2022, MegaBlocks (2211.15841): the tokens are sorted by expert, so that no expert has a capacity and no
    token is dropped or padded. An expert is an MLP without biases: gelu or swiglu, see MLP.

    Args:
        experts: how many.
        width: of a token. hidden: of an expert.
        gated: swiglu instead of gelu.
    """

    def __init__(self, experts: int, width: int, hidden: int, *, gated: bool) -> None:
        super().__init__()
        self.experts = experts
        self.gated = gated
        self.input = nn.Parameter(torch.empty(experts, width, hidden * (2 if gated else 1)))
        self.output = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Args: x (tokens, width). The weighted sum is taken in the weights' dtype; the result is of x's."""
        tokens, top_k = routing.selected.shape
        chosen = routing.selected.flatten()
        order = chosen.argsort(stable=True)
        places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        ends = torch.searchsorted(chosen[order], torch.arange(self.experts, device=order.device), right=True)
        rows = _take(x, order // top_k, places, top_k)
        taken = _take(self.compute(rows, ends.int()), places, order, 1).unflatten(0, (tokens, top_k))
        out: Tensor = (taken * routing.weights.unsqueeze(-1)).sum(1).to(x.dtype)
        return out

    def compute(self, rows: Tensor, ends: Tensor) -> Tensor:
        """Each expert on its rows: see grouped_product()."""
        kind = rows.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else rows.dtype
        hidden = grouped_product(rows.to(dtype), self.input.to(dtype), ends)
        if self.gated:
            gate, hidden = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * hidden
        else:
            hidden = F.gelu(hidden)
        return grouped_product(hidden, self.output.to(dtype), ends)


class _Take(torch.autograd.Function):
    """Rows by number, where it is known how to go back: no sum of gradients in an order that might differ."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, numbers: Tensor, back: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.copies = copies
        return rows[numbers]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (back,) = ctx.saved_tensors
        rows = gradient[back].unflatten(0, (len(back) // ctx.copies, ctx.copies))
        return rows.sum(1), None, None, None


def _take(rows: Tensor, numbers: Tensor, back: Tensor, copies: int) -> Tensor:
    """rows[numbers], in which every row comes `copies` times: those of row t are at numbers back[copies * t ...]."""
    out: Tensor = _Take.apply(rows, numbers, back, copies)  # type: ignore[no-untyped-call]
    return out
