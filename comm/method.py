"""The five members by which the trainer, the checkpoint and the meter know every method, and one of some methods."""

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
        """Take back what state_dict() gave.

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


def agreed_weights(method: Method) -> AbstractContextManager[None]:
    """A context in which the model that `method` trains is the same on every rank."""
    return method.agreed() if isinstance(method, LocalMethod) else nullcontext()
