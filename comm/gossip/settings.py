"""Settings of `method: gossip`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from thinwire.comm.gossip.algorithms import AnyAlgorithm
from thinwire.comm.gossip.algorithms.dpsgd import DPSGDSettings
from thinwire.comm.settings import Settings


class GossipSettings(Settings):
    """`method: {kind: gossip, ...}`: each machine trains for itself and averages its weights with a few neighbours.

    algorithm: what is done with the neighbours' weights; a name alone means its defaults.
    deadline_s: how long a neighbour may delay this machine, in seconds.
    seed: of all that is drawn at random, the same everywhere.
    """

    kind: Literal["gossip"] = "gossip"
    algorithm: AnyAlgorithm = DPSGDSettings()
    deadline_s: float = Field(10.0, gt=0)
    seed: int = Field(0, ge=0, lt=1 << 63)
