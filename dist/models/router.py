"""Which experts a token goes to, and what each of them counts for."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinwire.comm.balance.balance import LoadBalance

Gate = Literal["softmax", "sigmoid"]


class Routing(NamedTuple):
    """What a router decides. selected: (tokens, top_k) int64. weights: (tokens, top_k), of each selected expert."""

    selected: Tensor
    weights: Tensor


class Router(nn.Module):
    """A linear gate, in fp32 whatever the model computes in: z = x W^T, the top_k largest z are selected.

    Fedus et al. 2021 (2101.03961) for fp32. Of equal logits the expert with the lowest number comes first, on every
    device, so that counts do not depend on where they were made.

    Args:
        width: of a token.
        experts, top_k: how many there are, and how many a token selects.
        gate: "softmax" over all experts, or "sigmoid" of each.
        renormalise: whether the weights of a token's selected experts are divided by their sum.

    Attributes: balance, what counts and balances the loads, and name, under which; see MoEGPT.balance_with().
    """

    def __init__(self, width: int, experts: int, top_k: int, *, gate: Gate, renormalise: bool) -> None:
        super().__init__()
        self.top_k = top_k
        self.gate = gate
        self.renormalise = renormalise
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.balance: LoadBalance | None = None
        self.name = ""

    def balance_with(self, balance: LoadBalance | None, name: str) -> None:
        """Call this in every forward pass, but not in eval mode.

        Raises:
            ValueError: it is for other numbers of experts.
        """
        here = {"num_experts": len(self.weight), "top_k": self.top_k}
        for setting, value in here.items():
            given = value if balance is None else getattr(balance, setting)
            if given != value:
                raise ValueError(f"{setting}: {given}, but the routers of this model have {value}; give that")
        self.balance, self.name = balance, name

    def forward(self, x: Tensor) -> Routing:
        """Args: x (tokens, width), in any floating dtype. The weights are fp32, or fp64 where x is."""
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32)
            logits = F.linear(x.to(dtype), self.weight.to(dtype))
            selected = lowest_first(self._by_which_to_select(logits.detach()), self.top_k)
            if self.balance is not None and self.training:
                logits = self.balance(self.name, logits, selected)
            scores = self._scores(logits)
            weights = scores.gather(-1, selected)
            if self.renormalise:
                weights = weights / weights.sum(-1, keepdim=True)
            return Routing(selected, weights)

    def _by_which_to_select(self, logits: Tensor) -> Tensor:
        """Logits order experts as their scores do; a bias is of scores."""
        bias = self.balance.bias(self.name, logits) if self.balance is not None else None
        return logits if bias is None else self._scores(logits) + bias

    def _scores(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1) if self.gate == "softmax" else logits.sigmoid()


def lowest_first(scores: Tensor, top_k: int) -> Tensor:
    """The places of the largest scores of each row, largest first, of equal ones the lowest first; int64."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
