"""What every compressed collective is: a weighted mean over the ranks, of which each rank sends an approximation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from thinwire.comm.channel import Channel
from thinwire.comm.compress.decoded import Decoded
from thinwire.comm.compress.draw import Draw


@dataclass(frozen=True)
class Job:
    """What one call of a collective exchanges: some tensors of one bucket.

    Attributes:
        names: of the tensors; the same on every rank, as are their shapes.
        inputs: contiguous fp32 tensors, this rank's; never written to.
        outputs: contiguous fp32 tensors of the same shapes that receive the mean; an output may be its own input.
        draws: one for each tensor, this rank's.
        memories: for each tensor (memory, next_memory), fp32 and of its shape: classic error feedback, fused into the
            encoding. C is then applied to input + memory, and next_memory <- input + memory - what was contributed.
            memory itself is never written to. None = no memory.
        weights: for each rank, what its contribution is multiplied by; None = all 1. The sum is divided by the number
            of ranks in any case. A weight of 0 says that the rank takes no part in this step, and it sends no body.
    """

    names: Sequence[str]
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    draws: Sequence[Draw]
    memories: Sequence[tuple[Tensor, Tensor]] | None = None
    weights: Sequence[float] | None = None


class Collective(Protocol):
    """outputs[i] <- 1/n * sum_{r=0..n-1} weights[r] * C(inputs_r[i]), the same bits on every rank.

    Runs on the CommQueue's thread. Decoded contributions are added in rank order, in fp32, this rank's own included.
    """

    def mean(self, channel: Channel, job: Job) -> list[Decoded] | None:
        """Exchange, write the outputs, and return what this rank contributed: C(inputs[i]), unweighted, flat.

        Empty if job.memories took it up. None if any rank's input was not finite: the outputs are then NaN on every
        rank, and no state has changed.

        Raises:
            PayloadError: what a rank sent cannot be read.
        """
        ...

    def commit(self) -> None:
        """Keep the state that the calls since the last commit or rollback have left (warm starts, server errors)."""
        ...

    def rollback(self) -> None:
        """Forget it: the step that these calls belonged to is not taken."""
        ...

    def surrendered(self) -> list[tuple[str, int, Tensor]]:
        """(name, offset, error): state of this rank that it can no longer keep, flat from that offset; told once.

        To be asked for after commit(). Added to what this rank compresses next, it is not lost: Feedback.give_back().
        """
        ...

    def sent_bytes(self, shapes: Mapping[str, Sequence[int]], rank: int, size: int) -> dict[int, int]:
        """Payload bytes that `rank` sends in one call with these tensors, by receiving rank of the channel.

        Exact before the call where the compressor's size is fixed; elsewhere it is that of the last call with these
        names, and before the first what is expected.
        """
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def merge(self, states: Sequence[Mapping[str, Any]], rank: int, size: int) -> dict[str, Any]:
        """From the states of all old ranks, in rank order: that of `rank` in a group of another `size`.

        Follow with load_state_dict(). Nothing is lost: what this rank cannot keep, the next step surrenders.
        """
        ...
