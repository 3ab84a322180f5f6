"""`method: onebyte` of a training run: in a fixed job, or among machines that come and go."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from pydantic import model_validator

from thinwire.comm.onebyte.exchange import Change, Exchange, Turn
from thinwire.comm.onebyte.log import Log
from thinwire.comm.onebyte.membership.door import elastic
from thinwire.comm.onebyte.membership.elastic import Membership
from thinwire.comm.onebyte.membership.settings import MembershipSettings
from thinwire.comm.onebyte.optimizer import Join
from thinwire.comm.onebyte.replica import Replica
from thinwire.comm.onebyte.settings import OneByteSettings
from thinwire.dist.data import shard
from thinwire.dist.world import World

_SLOTS = 1 << 16


class OneByteRunSettings(OneByteSettings):
    """membership: None in a fixed job (torchrun, mpirun, srun or one process).

    Otherwise each machine is started alone, with the same model and method, finds the others by this, and may come and
    go; it reads its own data, train.global_batch sequences in a round.
    """

    membership: MembershipSettings | None = None

    @model_validator(mode="after")
    def _samples_once(self) -> OneByteRunSettings:
        """membership.samples is method.samples, in the resolved configuration too."""
        membership = self.membership
        if membership is not None and membership.samples != self.samples:
            if "samples" in membership.model_fields_set:
                raise ValueError(
                    f"membership.samples: {membership.samples}, but method.samples is {self.samples}; "
                    "give that one alone"
                )
            # The model is frozen for its users; here it is still being made.
            object.__setattr__(self, "membership", membership.model_copy(update={"samples": self.samples}))
        return self

    def of_optimizer(self) -> dict[str, Any]:
        """The keywords of OneByteSPSA."""
        return self.model_dump(exclude={"kind", "membership"})


class AllRoundsDoneError(RuntimeError):
    """The others have committed the run's last rounds, and this machine has taken them up."""


class TimedExchange:
    """An exchange for so many rounds, and the seconds that this machine has waited for it."""

    def __init__(self, inner: Membership, rounds: int) -> None:
        self.inner = inner
        self.waited_s = 0.0
        self._rounds = rounds

    def begin(self) -> Turn:
        """See Exchange. Raises AllRoundsDoneError where no round is left to evaluate."""
        began = time.monotonic()
        try:
            turn = self.inner.begin()
        finally:
            self.waited_s += time.monotonic() - began
        if turn.round >= self._rounds:
            raise AllRoundsDoneError
        return turn

    def commit(self, turn: Turn, codes: bytes, rate: float) -> Sequence[Change]:
        """See Exchange."""
        began = time.monotonic()
        try:
            return self.inner.commit(turn, codes, rate)
        finally:
            self.waited_s += time.monotonic() - began

    def close(self) -> None:
        """See Exchange."""
        self.inner.close()


def joining(settings: OneByteRunSettings, world: World, rounds: int) -> Join | None:
    """How OneByteSPSA finds the others, where they come and go; None in a fixed job.

    Args:
        rounds: of the whole run.
    Raises:
        ValueError: a launcher has started several ranks.
    """
    membership = settings.membership
    if membership is None:
        return None
    if world.size > 1:
        raise ValueError(
            f"method.membership: is given in a job of {world.size} ranks; start each machine alone, or remove it: a "
            "fixed job needs no membership"
        )

    found = elastic(membership)

    def join(manifest: bytes, log: Log, replica: Replica) -> Exchange:
        return TimedExchange(found(manifest, log, replica), rounds)

    return join


def samples_of(turn: Turn, batch: int, world_size: int, *, elastic: bool) -> range:
    """Sample numbers of a turn: the rank's part of the global batch; where nobody knows how many there are, numbers of
    the turn's own, far from each other's.
    """
    if not elastic:
        return shard(turn.round, batch, turn.slot, world_size)
    first = (turn.round * _SLOTS + turn.slot) * batch
    return range(first, first + batch)
