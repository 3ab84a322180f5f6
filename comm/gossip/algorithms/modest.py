"""MoDeST: in each round a few machines, drawn by a hash, train from one model, and a few of the next average them."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from thinwire.comm.gossip.algorithm import AlgorithmSettings, Parts
from thinwire.comm.gossip.algorithms.modest_machine import ModestMachine


class ModestSettings(AlgorithmSettings):
    """`algorithm: {kind: modest, sample: 4, local_steps: 20}`.

    MoDeST (De Vos, Dhasade, Kermarrec, Lavoie, Pouwelse 2023, 2302.13837), whose later name is Plexus. Round k:

        order_k   all members, by the hash of (seed, member, k)
        S_k       the first `sample` of order_k that answer a ping: they take the model x_k and train for local_steps
        x_{k+1}   the mean of what S_k has trained; each of the first `aggregators` of order_{k+1} that answer a ping
                  computes it, once success * sample models have come, and gives it to S_{k+1}

    Nobody coordinates this: who averages and who trains follows from the hash and from who answers. It is a way to
    train, not only to average: a machine whose turn it is not waits in optimizer.step(), until it is drawn. The step
    that it has just taken then counts for nothing but its optimizer's state; it goes on from the model that it is
    given, as step k * local_steps, so a machine's step is that of the run, and a learning rate schedule holds. After
    the last round the mean goes to all machines, which end with the same weights. Graph and schedule play no part:
    leave both out.

    Differences from the paper: aggregators and members that do not answer are passed over in batches that double; a
    machine that has trained gives its model to others if nobody says within two aggregate_s that it has been used; and
    where every machine of a round dies, so that no round would ever follow, the one with the newest model begins one.

    sample: machines that train in a round, s. aggregators: machines that average the round before, at most s.
    success: the share of s models that is enough; after aggregate_s, three are, and after as long again, any.
    local_steps: optimizer steps of a round.
    ping_s: how long a machine may take to answer; longer than a step, since a machine that trains answers between
      steps.
    aggregate_s: how long models are waited for; longer than local_steps.
    inactive_rounds: a machine that took part in none of so many rounds is no longer pinged until it is heard of; null:
      max(50, 10 n/s), within which a machine is drawn all but surely.
    """

    kind: Literal["modest"] = "modest"
    sample: int = Field(4, ge=1)
    aggregators: int = Field(2, ge=1)
    success: float = Field(0.75, gt=0, le=1)
    local_steps: int = Field(20, ge=1)
    ping_s: float = Field(5.0, gt=0)
    aggregate_s: float = Field(60.0, gt=0)
    inactive_rounds: int | None = Field(None, ge=1)

    in_rounds: ClassVar[bool] = False
    uses_graph: ClassVar[bool] = False

    @model_validator(mode="after")
    def _enough(self) -> ModestSettings:
        if self.aggregators > self.sample:
            raise ValueError(
                f"aggregators: {self.aggregators} are more than sample: {self.sample}; they are the first of those who "
                "train next: give at most sample"
            )
        return self

    def build(self, parts: Parts) -> ModestMachine:
        """The algorithm of one machine.

        Raises:
            ValueError: there are fewer machines than `sample`.
        """
        size = parts.port.size
        if self.sample > size:
            raise ValueError(
                f"method.algorithm.sample: {self.sample} of {size} machines; give at most {size}, or add machines"
            )
        inactive = self.inactive_rounds or max(50, 10 * size // self.sample)
        return ModestMachine(parts, self, inactive)
