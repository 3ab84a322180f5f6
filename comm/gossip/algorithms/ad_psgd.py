"""AD-PSGD: pairs of machines average their weights at their own pace."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from thinwire.comm.gossip.algorithm import AlgorithmSettings, Parts
from thinwire.comm.gossip.algorithms.dpsgd import WIRE
from thinwire.comm.gossip.algorithms.in_rounds import Wire
from thinwire.comm.gossip.algorithms.own_pace import OwnPace
from thinwire.comm.gossip.codec import Plain
from thinwire.comm.gossip.swaps import Swaps


class ADPSGDSettings(AlgorithmSettings):
    """`algorithm: {kind: ad_psgd, asks: 2}`.

    asks: how many machines may owe an answer at once; more than one, so that a slow one does not keep this one from
    asking others. wire: what weights are rounded to on the way; the mean is exact all the same.
    """

    kind: Literal["ad_psgd"] = "ad_psgd"
    asks: int = Field(default=2, ge=1, le=64)
    wire: Wire = "fp32"

    in_rounds: ClassVar[bool] = False

    def build(self, parts: Parts) -> ADPSGD:
        """The algorithm of one machine."""
        swaps = Swaps(parts.port, Plain(WIRE[self.wire]), asks=self.asks, deadline_s=parts.deadline_s)
        return ADPSGD(parts.replica, parts.port, swaps, seed=parts.seed, deadline_s=parts.deadline_s)


class ADPSGD(OwnPace):
    """AD-PSGD (Lian, Zhang, Zhang, Liu 2018, 1710.06952), with any optimizer in place of SGD.

    x_i <- x_i + u_i, u_i the optimizer's update; then machine i asks one neighbour j, each as likely:

        x_i <- x_i + (s_j - s_i) / 2,   x_j <- x_j + (s_i - s_j) / 2,   s the weights as sent

    which is the mean of both where neither has stepped in between; machines of unlike mass: swaps.py.

    Differs: weights change only between steps, so gradients are never stale; what is late is the exchange: j answers
    after the step that it is at, and i adds its half after the step during which the answer has come. Both add a half
    of the same difference, so the mean is exact, where the paper lets a stale gradient meet averaged weights. No
    machine is only active or only passive: nobody waits, so nothing can deadlock.
    """
