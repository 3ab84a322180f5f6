"""What a mode is: when counts are sent, and which of them a micro-batch is balanced against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from thinwire.comm.balance.bus import StatisticsBus
from thinwire.comm.balance.columns import Columns
from thinwire.comm.balance.target import Target
from thinwire.comm.balance.unit import Unit


@dataclass
class Setting:
    """What all modes know.

    micro_batches: of the present step. size: ranks whose tokens make up the batch. near: whether messages stay within
    the bus's near ranks, each group of which then stands for the whole batch.
    """

    bus: StatisticsBus
    columns: Columns
    size: int
    micro_batches: int
    near: bool = False

    @property
    def groups(self) -> float:
        """How many times the tokens of one message make up the batch."""
        return self.size / len(self.bus.inner) if self.near else 1.0


@dataclass(frozen=True)
class KnownStep:
    """What a step turned out to be.

    rows: (layers, columns.width), all ranks' counts. used: (layers, num_experts), the f that it was balanced against
    (its last micro-batch, where they differ). self_weight: the mean weight that a micro-batch's own counts had in
    its f: 1 = the micro-batch's own loss, 0 = nothing of it.
    """

    rows: Tensor
    used: Tensor | None
    self_weight: float


class Mode(Protocol):
    """Every rank makes the same calls in the same order, so messages need no other agreement."""

    def filled(self, unit: Unit) -> None:
        """All layers have counted this micro-batch; its backward pass is still to come."""
        ...

    def end_step(self) -> None:
        """No more micro-batches come in this step; called when the last one has been counted, before its backward."""
        ...

    def begin_step(self) -> None:
        """The first micro-batch of another step is about to be counted."""
        ...

    def abandon(self) -> None:
        """A message told of a fault, here as on all ranks: forget what is under way and the present step."""
        ...

    def target(self, unit: Unit) -> Target:
        """What this micro-batch is balanced against. Called in its backward pass, once per layer."""
        ...

    def last_step(self) -> Tensor | None:
        """Rows of all ranks' counts in the last step whose message was sent, waiting for it; None before the first."""
        ...

    def known_step(self) -> KnownStep | None:
        """The last step whose counts this rank has read, the same one on every rank, without waiting."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What the next step needs of this one; nothing is under way."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what state_dict() gave on this rank, or resized(), or another mode."""
        ...

    def resized(self, states: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """What load_state_dict() takes, of the states of all ranks of a job of another size."""
        ...
