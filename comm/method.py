"""The five members by which the trainer, the checkpoint and the meter know every method."""

from __future__ import annotations

from collections.abc import Mapping
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
