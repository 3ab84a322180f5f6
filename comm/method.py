"""The five members by which the trainer, the checkpoint and the meter know every method, and those that some have."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Method(Protocol):
    """A communication method that has entered a trainer by one of PyTorch's doors."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that the method must remember for a resumed run to continue bit for bit."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what state_dict() gave on this rank.

        Where the number of ranks has changed since, every rank gets {"all_ranks": [state of old rank 0, of 1, ...]},
        and makes its own state of them: each method says how.

        Raises:
            ValueError: the state is not this method's.
        """
        ...

    def predicted_bytes(self) -> dict[str, int]:
        """Payload bytes that this rank sends in one step, by level: equal to what the meter will count."""
        ...

    def metrics(self) -> dict[str, float]:
        """Numbers worth logging, by name."""
        ...

    def remove(self) -> None:
        """Leave the trainer as it was before the method entered."""
        ...


@runtime_checkable
class LocalMethod(Method, Protocol):
    """A Method under which each rank trains a model of its own, from gradients of its own: the ranks' models differ."""

    def agreed(self) -> AbstractContextManager[None]:
        """Within this context the model holds weights that are the same on every rank: to evaluate and to keep."""
        ...


@runtime_checkable
class ClippingMethod(Method, Protocol):
    """A Method that can clip the true gradient, before it changes it: whoever trains must not clip again then.

    Attributes: clip_norm, the largest norm it lets pass; 0 = it leaves clipping to the trainer.
    """

    clip_norm: float


@runtime_checkable
class DescribedMethod(Method, Protocol):
    """A Method that can say what it will do."""

    def describe(self) -> str:
        """Lines for the start of a run."""
        ...


def agreed_weights(method: Method) -> AbstractContextManager[None]:
    """A context in which the model that `method` trains is the same on every rank."""
    return method.agreed() if isinstance(method, LocalMethod) else nullcontext()
