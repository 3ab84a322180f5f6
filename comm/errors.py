"""What communication can fail with, as types that a caller can catch."""

from __future__ import annotations

from collections.abc import Sequence

from thinwire.comm.rank_names import name_ranks


class CommError(RuntimeError):
    """A named operation of the communication layer failed on this rank.

    Attributes: operation (its name, such as "allreduce/bucket0"), missing_ranks (those that died, stopped, were cut
    off or did not reach the operation; empty when none is known).
    """

    def __init__(self, message: str, *, operation: str, missing_ranks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.operation = operation
        self.missing_ranks = tuple(missing_ranks)


class PeerLostError(CommError):
    """One or more ranks are gone: their process died, was stopped, or cannot be reached."""


class PeerLateError(CommError):
    """Every rank is alive, but at least one had not reached the operation by its deadline."""


class PeerFailedError(CommError):
    """A rank left the job and said why: it raised an exception of its own."""


class NonFiniteWeightsError(ArithmeticError):
    """Weights that the ranks were to average are NaN or infinite, and no rank has taken them up.

    Raised on every rank where all average together; under gossip, by the rank whose weights they are, the others report
    them as the metric `absent`.

    Attributes: ranks whose own weights were not finite; empty if only their mean was not.
    """

    def __init__(
        self, ranks: Sequence[int], outcome: str = "all ranks are back at the weights of the last exchange"
    ) -> None:
        whose = f"the weights of {name_ranks(ranks)} are" if ranks else "every rank's weights are finite, their mean is"
        super().__init__(
            f"{whose} NaN or infinite at the end of a round; {outcome}. "
            "Lower the learning rate, and clear the optimizers' states before going on"
        )
        self.ranks = tuple(ranks)


class NonFiniteGradientError(ArithmeticError):
    """The mean gradient is NaN or infinite; raised on every rank, and no weight or state has changed.

    Attributes: ranks whose own gradients were not finite; empty if only their sum was not.
    """

    def __init__(self, ranks: Sequence[int]) -> None:
        whose = f"the gradients of {name_ranks(ranks)} are" if ranks else "every rank's own is finite, but their sum is"
        super().__init__(f"{whose} NaN or infinite; the step was not taken and the gradients are dropped")
        self.ranks = tuple(ranks)


class OwnWeightsError(NonFiniteWeightsError):
    """NonFiniteWeightsError of a machine that gossips: it has sent nothing, and goes on from what it is given."""

    def __init__(self, rank: int) -> None:
        super().__init__(
            [rank], "no other machine has been sent them; give this one finite weights, such as a checkpoint's"
        )
