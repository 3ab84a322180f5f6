"""Settings of `method: gossip`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from thinwire.comm.gossip.algorithms import AnyAlgorithm
from thinwire.comm.gossip.algorithms.dpsgd import DPSGDSettings
from thinwire.comm.gossip.graphs import GraphSettings
from thinwire.comm.gossip.graphs.auto import AutoSettings
from thinwire.comm.gossip.optimizer_state import OptimizerStatePolicy
from thinwire.comm.gossip.schedule import EverySettings, GossipScheduleSettings
from thinwire.comm.settings import Settings


class GossipSettings(Settings):
    """`method: {kind: gossip, ...}`: each machine trains for itself and averages its weights with a few neighbours.

    graph: who with whom; a name alone means its defaults; auto: the one with the fewest predicted seconds to consensus.
    algorithm: what is done with the neighbours' weights; a name alone means its defaults.
    schedule: after which steps, over which of the graph's edges, and when all take the global average.
    statistics: of batch normalisation: local, each machine's own; mix, exchanged and averaged as weights are;
      recalibrate, each machine's own, and measured anew after a merge.
    optimizer_state: of each machine, at a merge: keep, reset or mix.
    deadline_s: how long a neighbour may delay this machine, in seconds.
    meet_deadline_s: how long a merge or a checkpoint waits for the last machine, in seconds; it is then left out.
    probes: numbers of 4 bytes by which machines tell how far apart they are; 0 = none. probe_every: steps between them.
    seed: of all that is drawn at random, the same everywhere.
    """

    kind: Literal["gossip"] = "gossip"
    graph: GraphSettings = AutoSettings()
    algorithm: AnyAlgorithm = DPSGDSettings()
    schedule: GossipScheduleSettings = EverySettings()
    statistics: Literal["local", "mix", "recalibrate"] = "mix"
    optimizer_state: OptimizerStatePolicy = "keep"
    deadline_s: float = Field(10.0, gt=0)
    meet_deadline_s: float = Field(600.0, gt=0)
    probes: int = Field(8, ge=0, le=1024)
    probe_every: int = Field(10, gt=0)
    seed: int = Field(0, ge=0, lt=1 << 63)
