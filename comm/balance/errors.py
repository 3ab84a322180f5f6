"""What a router can do wrong, told to every rank."""

from __future__ import annotations

from collections.abc import Sequence

from thinwire.comm.errors import NonFiniteGradientError
from thinwire.comm.rank_names import name_ranks


class RouterError(ValueError):
    """The routers of one or more ranks selected experts that do not exist. Raised on every rank.

    Attributes: ranks, layers: whose and which.
    """

    def __init__(self, ranks: Sequence[int], layers: Sequence[str], num_experts: int) -> None:
        super().__init__(
            f"selected: {name_ranks(ranks)} selected experts outside 0 .. {num_experts - 1} in {_list(layers)}; "
            "give the router as many outputs as num_experts, and padding by valid_mask, not by expert ids"
        )
        self.ranks = tuple(ranks)
        self.layers = tuple(layers)


class NonFiniteLogitsError(NonFiniteGradientError):
    """Router logits of valid tokens are NaN or infinite. Raised on every rank.

    Attributes: ranks, layers: whose and which.
    """

    def __init__(self, ranks: Sequence[int], layers: Sequence[str]) -> None:
        ArithmeticError.__init__(
            self,
            f"logits: those of {name_ranks(ranks)} are NaN or infinite in {_list(layers)}; look at that rank's data, "
            "lower the learning rate, or add z_coef, which keeps logits small",
        )
        self.ranks = tuple(ranks)
        self.layers = tuple(layers)


FAULTS = (RouterError, NonFiniteLogitsError)
"""What a message may tell of. The next step can go on; but DistributedDataParallel does not outlive an error in a
backward pass: wrap the model anew, or start again from a checkpoint."""


def _list(layers: Sequence[str]) -> str:
    return f"layer {', '.join(layers[:3])}" + (f" and {len(layers) - 3} more" if len(layers) > 3 else "")
