"""From settings to the machine's part of a run: what a trainer and a simulation both begin with."""

from __future__ import annotations

from dataclasses import dataclass

from thinwire.comm.gossip.agent import Agent
from thinwire.comm.gossip.algorithm import Parts
from thinwire.comm.gossip.mixing import Graph
from thinwire.comm.gossip.port import Port
from thinwire.comm.gossip.replica import Replica
from thinwire.comm.gossip.settings import GossipSettings
from thinwire.comm.gossip.turn import Schedule, Turn


@dataclass(frozen=True)
class Plan:
    """What all machines of a run have decided alike."""

    settings: GossipSettings
    graph: Graph
    schedule: Schedule


class EveryStep:
    """Schedule: an exchange after every step."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph

    def turn(self, step: int) -> Turn:
        """As Schedule says."""
        return Turn(step, step, self._graph.mixing(step))


def make_plan(settings: GossipSettings, graph: Graph) -> Plan:
    """Graph and schedule of a run; the same on every machine."""
    return Plan(settings, graph, EveryStep(graph))


def build_agent(plan: Plan, replica: Replica, port: Port) -> Agent:
    """One machine of a run.

    Args:
        replica: its weights.
        port: its connection to the others.
    """
    settings = plan.settings
    parts = Parts(replica, port, plan.graph, settings.deadline_s, settings.seed)
    return Agent(replica, port, settings.algorithm.build(parts), plan.schedule)
