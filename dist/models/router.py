"""Which experts a token goes to, and what each of them counts for."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinwire.comm.balance.balance import LoadBalance
from thinwire.comm.balance.fused import Routing, route_experts

__all__ = ["Gate", "Router", "Routing"]

Gate = Literal["softmax", "sigmoid"]


class Router(nn.Module):
    """A linear gate, in fp32 whatever the model computes in: z = x W^T, the top_k largest z are selected.

    Fedus et al. 2021 (2101.03961) for fp32. Weights that FSDP2 has gathered in bf16 are taken as they are. Of equal
    logits the expert with the lowest number comes first, on every device, so that counts do not depend on where they
    were made.

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
        self.gate: Gate = gate
        self.renormalise = renormalise
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.balance: LoadBalance | None = None
        self.name = ""

    def balance_with(self, balance: LoadBalance | None, name: str) -> None:
        """Let this count and balance; in eval mode it only gives its bias, if it has one.

        Raises:
            ValueError: it is for another router.
        """
        here = {"num_experts": len(self.weight), "top_k": self.top_k, "score": self.gate}
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
            if self.balance is None:
                return route_experts(logits, self.top_k, score=self.gate, renormalise=self.renormalise)
            if self.training:
                return self.balance.route(self.name, logits, renormalise=self.renormalise)
            bias = self.balance.bias(self.name, logits)
            return route_experts(logits, self.top_k, bias=bias, score=self.gate, renormalise=self.renormalise)
