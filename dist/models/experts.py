"""Experts: many small MLPs, each for the tokens that selected it. Dropless: none is left out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinwire.comm.balance.fused import Routing
from thinwire.comm.expert_parallel.exchange import ExpertExchange
from thinwire.dist.models.by_expert import ByExpert
from thinwire.dist.models.grouped_product import grouped_product


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
        self._exchange: ExpertExchange | None = None

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Args: x (tokens, width). The weighted sum is taken in the weights' dtype; the result is of x's."""
        tokens, top_k = routing.selected.shape
        sorting = ByExpert(routing.selected.flatten(), self.experts)
        rows = sorting.sort(x, top_k).to(_compute_dtype(x))
        taken = sorting.restore(self._of_rows(rows, sorting.ends)).unflatten(0, (tokens, top_k))
        out: Tensor = (taken * routing.weights.unsqueeze(-1)).sum(1).to(x.dtype)
        return out

    def share(self, exchange: ExpertExchange) -> None:
        """Keep the experts that are this rank's; rows of the others travel from now on."""
        self._exchange = exchange
        for name, whole in list(self.named_parameters()):
            held = whole.detach()[exchange.first : exchange.first + exchange.held].clone()
            setattr(self, name, nn.Parameter(held, requires_grad=whole.requires_grad))

    def _of_rows(self, rows: Tensor, ends: Tensor) -> Tensor:
        if self._exchange is None:
            return self._compute(rows, ends)
        arrived = self._exchange.send(rows, ends)
        sorting = ByExpert(arrived.experts, self._exchange.held)
        results = sorting.restore(self._compute(sorting.sort(arrived.rows), sorting.ends))
        return self._exchange.send_back(results, arrived)

    def _compute(self, rows: Tensor, ends: Tensor) -> Tensor:
        """Each expert that is here on its rows: see grouped_product()."""
        hidden = grouped_product(rows, self.input.to(rows.dtype), ends)
        if self.gated:
            gate, hidden = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * hidden
        else:
            hidden = F.gelu(hidden)
        return grouped_product(hidden, self.output.to(rows.dtype), ends)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """As torch's own products under autocast, which leaves fp64 alone."""
    casts = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if casts else x.dtype
