"""What an engine is to the training loop: who holds what of the model, and what its backward pass and step exchange."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from thinwire.comm.method import Method


class Engine(Protocol):
    """A model made ready to be trained by all ranks together.

    For each step: micro_batch() around the forward and backward pass of each micro-batch, then step().

    Attributes:
        network: the model itself, under the names that its own files use; what is evaluated and kept.
        optimizer: the rate of each of its groups is the trainer's to set.
        method: how the ranks communicate.
        forward_is_collective: whether a forward pass, to evaluate too, needs one of every other rank.
    """

    network: nn.Module
    optimizer: Optimizer
    method: Method
    forward_is_collective: bool

    @property
    def exposed_s(self) -> float:
        """Seconds since the start in which this rank computed nothing because it waited for others."""
        ...

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Around forward() and backward() of one micro-batch.

        Args:
            last: whether the step comes next; until then gradients are only added up.
        """
        ...

    def forward(self, inputs: Tensor) -> Tensor:
        """The model's scores, to be learned from."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch's loss, which is already divided by the number of micro-batches."""
        ...

    def step(self) -> float:
        """Clip, update, and forget the gradients; returns the norm before clipping, of the ranks' mean gradient.

        Under a LocalMethod it is the norm of this rank's own, which may be NaN or infinite.

        Raises:
            NonFiniteGradientError: on every rank, before weights or states have changed.
        """
        ...

    def shared_state(self) -> dict[str, Any]:
        """Weights and optimizer, under "model" and "optimizer": equal on every rank, or DTensors, for a checkpoint."""
        ...

    def template(self) -> dict[str, Any]:
        """What shared_state() will look like after a step: its DTensors say how a checkpoint must be cut here."""
        ...

    def own_state(self) -> dict[str, Any]:
        """What this rank alone must remember, the method's under "method"."""
        ...

    def load_state(self, shared: Mapping[str, Any], own: Mapping[str, Any] | None, old: Mapping[int, Any]) -> None:
        """Take back what shared_state() and own_state() gave.

        Args:
            own: this rank's; None where another number of ranks wrote it.
            old: then every old rank's, by rank.
        Raises:
            ValueError: it is another engine's, method's or model's.
        """
        ...

    def close(self) -> None:
        """End threads and process groups that are the engine's own. All ranks have come to the end."""
        ...


def merge_method_states(
    own: Mapping[str, Any] | None, old: Mapping[int, Any], key: str = "method"
) -> Mapping[str, Any]:
    """What a Method's load_state_dict() takes: this rank's state, or those of all ranks that there were.

    Args:
        key: under which it stands there.
    """
    state: Mapping[str, Any] = own[key] if own is not None else {"all_ranks": [old[rank][key] for rank in sorted(old)]}
    return state


def keep_options(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Load an optimizer's state, but go on with the present options: torch would take the checkpoint's."""
    options: Sequence[dict[str, Any]] = [
        {key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(dict(state))
    for group, present in zip(optimizer.param_groups, options, strict=True):
        group.update(present)
