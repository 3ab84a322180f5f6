"""What every averaging algorithm is to the rest: one machine's scripts before and after its optimizer's step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from thinwire.comm.gossip.mixing import Graph
from thinwire.comm.gossip.port import Port, Script
from thinwire.comm.gossip.replica import Replica
from thinwire.comm.gossip.turn import Turn
from thinwire.comm.settings import Settings


@dataclass(frozen=True)
class Parts:
    """What an algorithm is made of: every settings class (AlgorithmSettings) has `build(parts) -> Algorithm`.

    deadline_s: how long a neighbour may delay this machine. seed: of all that is drawn at random, the same everywhere.
    steps: optimizer steps of the run; None: nobody has said.
    """

    replica: Replica
    port: Port
    graph: Graph
    deadline_s: float
    seed: int
    steps: int | None = None


class AlgorithmSettings(Settings):
    """The base of an algorithm's settings; it says what the algorithm can do with.

    every_step: it is defined only for an exchange at every step.
    in_rounds: all machines go through the same rounds; not: each at its own pace.
    static_graph: it needs the same mixing in every round.
    needs_sgd: it needs torch.optim.SGD, one learning rate for all parameters, no dampening: it corrects that step.
    equal_start: machines must begin with the same weights.
    uses_graph: graph and schedule say who exchanges, and when. False: the algorithm itself does.
    joinable: a machine can enter a run under way with the weights and half the mass of another. False: what the
        algorithm keeps besides the weights would no longer sum to what it must sum to.
    """

    every_step: ClassVar[bool] = False
    in_rounds: ClassVar[bool] = True
    static_graph: ClassVar[bool] = False
    needs_sgd: ClassVar[bool] = False
    equal_start: ClassVar[bool] = True
    uses_graph: ClassVar[bool] = True
    joinable: ClassVar[bool] = True

    def build(self, parts: Parts) -> Algorithm:
        """The algorithm of one machine.

        Raises:
            ValueError: the graph is not one that the algorithm is defined for.
        """
        raise NotImplementedError


@runtime_checkable
class KeepsStep(Protocol):
    """An Algorithm in which a machine takes only some of the run's steps.

    Attributes: next_step, of the run: the one that this machine is to take next. Once it is past the last, the machine
    has what the run has come to; until then that others are at the end does not end it.
    """

    next_step: int


class Algorithm(Protocol):
    """One machine's part of a decentralized method. It is given its Replica and its Port when it is made.

    Attributes: mass, this machine's share in the mean that is preserved: 1 unless machines have joined.
    """

    @property
    def mass(self) -> float: ...

    def before_step(self, turn: Turn) -> Script[None]:
        """Gradients are there, the optimizer has not stepped."""
        ...

    def after_step(self, turn: Turn) -> Script[None]:
        """The optimizer has stepped."""
        ...

    def asked(self) -> bool:
        """Whether another machine waits for an answer that serve() would give. Never, where machines go in rounds."""
        ...

    def serve(self) -> None:
        """Answer those who ask. Called whenever this machine waits for something else than its algorithm."""
        ...

    def drain(self) -> Script[None]:
        """End what is under way, so that nothing of this machine is on the wire and its state is its replica's."""
        ...

    def sent_bytes(self, turn: Turn) -> dict[int, int]:
        """Payload bytes that this machine sends at such a turn, by machine; where chance decides, those of the last."""
        ...

    def metrics(self) -> dict[str, float]: ...

    def state_dict(self) -> dict[str, Any]:
        """After drain(): everything that a resumed run needs to go on bit for bit."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def merged(self) -> None:
        """All machines have just taken the global average as their weights: forget what belonged to the old ones."""
        ...


@runtime_checkable
class HasCompanion(Protocol):
    """An Algorithm that keeps a companion of its weights: what it preserves is not the mean of the weights alone."""

    def averaged(self) -> Tensor:
        """What enters a global average in place of the weights, so that it is the mean that is preserved; a copy."""
        ...


@runtime_checkable
class SharesMass(Protocol):
    """An Algorithm whose machines can give half of their mass to one that enters."""

    def hold(self, mass: float) -> None:
        """Have this mass from now on. After drain(): nothing may be under way."""
        ...
