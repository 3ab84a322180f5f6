"""What every kind of error feedback is to the doors: what to compress, and what the decoded messages then change."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from thinwire.comm.compress.decoded import Decoded
from thinwire.comm.settings import Settings


class Feedback(Protocol):
    """The memory of one rank, by parameter name. All state changes at commit(), and only there.

    One step of a door, on every rank:

        feedback.begin_step(step, scale)
        for each bucket, on the CommQueue's thread:
            memories = [feedback.memories(name, gradient) ...]          # all None, or none of them
            inputs = [feedback.before(name, gradient) ...]              # only where memories are None
            sent = collective.mean(...)                                 # Job(memories=, weights=feedback.weights(size))
            if sent is not None:                                        # every rank's input was finite
                feedback.after(name, sent[i] (None with memories), outputs[i]) ...
        once, after all buckets: feedback.commit(), or feedback.rollback() if any mean() gave None

    begin_step() without a commit() drops what the step before it has staged. Tensors are contiguous, fp32, on one
    device and of the parameter's shape. (Arithmetic is in the dtype of the gradient; fp64 works with storage "fp32",
    and serves the tests.) None of the methods looks for NaN or Inf: mean() does, on all ranks at once.

    Attributes:
        server_error: the collective must compress the mean too, and keep the error of that: TwoShot(server_error=True).
        sums_means: the state adds up the means, so a collective that compresses the mean must keep its error: otherwise
            what one mean lacks is missing from all later ones.
    """

    @property
    def server_error(self) -> bool: ...

    @property
    def sums_means(self) -> bool: ...

    def begin_step(self, step: int, scale: float = 1.0) -> None:
        """Name the step, and the factor (GradScaler's) by which its gradients come, and are to leave, multiplied.

        All state is kept free of this factor, so that it may change from step to step.
        """
        ...

    def memories(self, name: str, gradient: Tensor) -> tuple[Tensor, Tensor] | None:
        """(memory, next_memory) for Job.memories, where the collective shall compress gradient + memory (kind ef).

        The gradient is brought to the units of the memory, in place. None: call before().
        """
        ...

    def before(self, name: str, gradient: Tensor) -> Tensor:
        """What to compress. The gradient may be overwritten, and may be what is returned; valid until after()."""
        ...

    def after(self, name: str, sent: Decoded | None, mean: Tensor) -> None:
        """Turn mean = 1/n sum_r weights[r] C_r, in place, into the gradient that the optimizer shall see; stage state.

        Args: sent, what this rank contributed, unweighted, not to be written to until commit(); None with memories.
        """
        ...

    def weights(self, size: int) -> Sequence[float] | None:
        """For each rank of this step, what its contribution is multiplied by: 0 = it is absent. None = all 1."""
        ...

    def density(self, final: float) -> float:
        """The density to compress this step with where the compressor's own is `final`: larger in a warm-up (dgc)."""
        ...

    def commit(self) -> None:
        """Keep what after() has staged since begin_step()."""
        ...

    def rollback(self) -> None:
        """Forget it: the state is bit for bit what it was before begin_step()."""
        ...

    def give_back(self, name: str, offset: int, error: Tensor) -> None:
        """Add `error`, flat, to what the next step compresses at the flat positions offset, offset + 1, ...

        Between steps. It is in the units of one rank's contribution: a server error, which is a mean, counts
        once if every rank gets it, and must be multiplied by the number of ranks if only one does.

        Raises:
            ValueError: the parameter has no memory (yet) or this kind keeps none.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Copies of all committed state: strings, numbers, lists and tensors in dictionaries."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what state_dict() gave, in a group of as many ranks.

        Raises:
            ValueError: it is of another kind, storage or number of ranks.
        """
        ...

    def merge(self, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """From the states of all old ranks, in rank order: the state of this rank in a group of another size.

        Every new rank gets the mean of the errors (of the g_i, h_i, u, v), so that their mean over the ranks is kept:
        with storage "fp32" to rounding, with "int8" without bias. Follow with load_state_dict().

        Raises:
            ValueError: the states are not those of all ranks of one group, or are of another kind or storage.
        """
        ...

    def kept_bytes(self, numel: int) -> int:
        """What is kept between steps of a parameter with so many elements."""
        ...

    def metrics(self) -> dict[str, float]:
        """Norms of this rank's committed state over all parameters, and what else is worth logging: one pass."""
        ...


@dataclass(frozen=True)
class Place:
    """Whose memory a feedback is.

    Attributes:
        rank, size: within the group.
        seed: of the run, the same on every rank.
        learning_rate: that of a parameter in the present step, by its name; what kind ef with units "update" needs.
    """

    rank: int
    size: int
    seed: int = 0
    learning_rate: Callable[[str], float] | None = None


class FeedbackSettings(Settings):
    """Frozen settings with a `kind`, that build what they describe."""

    @abstractmethod
    def build(self, place: Place) -> Feedback:
        """The feedback of one rank, with no memory yet.

        Raises:
            ValueError: the settings do not fit the place.
        """
