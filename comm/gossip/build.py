"""From settings to the machine's part of a run: what a trainer and a simulation both begin with."""

from __future__ import annotations

from dataclasses import dataclass

from thinwire.comm.gossip.agent import Agent
from thinwire.comm.gossip.algorithm import Parts
from thinwire.comm.gossip.budget import BudgetSettings
from thinwire.comm.gossip.graphs import build_graph
from thinwire.comm.gossip.graphs.auto import AutoSettings
from thinwire.comm.gossip.graphs.choose import choose_graph
from thinwire.comm.gossip.graphs.links import Links
from thinwire.comm.gossip.mixing import Graph
from thinwire.comm.gossip.port import Port
from thinwire.comm.gossip.probes import Probes
from thinwire.comm.gossip.replica import Replica, ShapeReplica
from thinwire.comm.gossip.schedule import EverySettings, build_schedule
from thinwire.comm.gossip.settings import GossipSettings
from thinwire.comm.gossip.simulation import Simulation
from thinwire.comm.gossip.turn import Schedule, Turn


@dataclass(frozen=True)
class Plan:
    """What all machines of a run have decided alike.

    steps: optimizer steps of the run; None: nobody has said. why: this graph, where auto chose it.
    """

    settings: GossipSettings
    graph: Graph
    schedule: Schedule
    steps: int | None
    why: str = ""


def make_plan(
    settings: GossipSettings, size: int, *, steps: int | None, numel: int, links: Links | None = None
) -> Plan:
    """Graph and schedule of a run; the same on every machine.

    Args:
        size: machines.
        steps: optimizer steps of the run; None: unknown.
        numel: elements of a machine's vector.
        links: as measured, the same on every machine, for graph: auto; None: choose.py says what it assumes.
    Raises:
        ValueError: graph, algorithm and schedule do not fit together, or not so many machines or steps.
    """
    why = ""
    if isinstance(settings.graph, AutoSettings):
        algorithm = settings.algorithm
        choice = choose_graph(
            size,
            4 * numel,
            settings.graph.links() or links,
            seed=settings.seed,
            static=algorithm.static_graph,
            own_pace=not algorithm.in_rounds,
        )
        graph, why = build_graph(choice.settings, size, settings.seed), f" ({choice.reason})"
    else:
        graph = build_graph(settings.graph, size, settings.seed)
    _check(settings, graph)
    cost_bytes = _cost_bytes(settings, graph, numel) if isinstance(settings.schedule, BudgetSettings) else None
    schedule = build_schedule(settings.schedule, graph, steps, settings.seed, cost_bytes)
    return Plan(settings, graph, schedule, steps, why)


def build_agent(plan: Plan, replica: Replica, port: Port) -> Agent:
    """One machine of a run.

    Args:
        replica: its weights.
        port: its connection to the others.
    Raises:
        ValueError: the algorithm is not defined for this graph.
    """
    settings = plan.settings
    parts = Parts(replica, port, plan.graph, settings.deadline_s, settings.seed, plan.steps)
    return Agent(
        replica,
        port,
        settings.algorithm.build(parts),
        plan.schedule,
        steps=plan.steps,
        in_rounds=settings.algorithm.in_rounds,
        deadline_s=settings.meet_deadline_s,
        probes=Probes(port, count=settings.probes, seed=settings.seed) if settings.probes else None,
        probe_every=settings.probe_every,
        joinable=settings.algorithm.joinable,
    )


def _check(settings: GossipSettings, graph: Graph) -> None:
    algorithm, schedule = settings.algorithm, settings.schedule
    sparse = not (isinstance(schedule, EverySettings) and schedule.steps == 1)
    named = settings.graph != GossipSettings.model_fields["graph"].default or schedule != EverySettings()
    if named and not algorithm.uses_graph:
        raise ValueError(
            f"method.algorithm: {algorithm.kind} draws by itself which machines exchange, and when; leave method.graph "
            "and method.schedule out, or give another algorithm, such as dpsgd"
        )
    if algorithm.every_step and sparse:
        raise ValueError(
            f"method.schedule: {schedule.kind}, but method.algorithm: {algorithm.kind} is defined only for an exchange "
            "after every step; give schedule: every, or another algorithm, such as dpsgd"
        )
    if algorithm.static_graph and (graph.period != 1 or (sparse and not isinstance(schedule, EverySettings))):
        raise ValueError(
            f"method.graph: {graph.name} changes from round to round, or method.schedule: {schedule.kind} leaves edges "
            f"out, but method.algorithm: {algorithm.kind} needs the same neighbours in every round; give a graph such "
            "as ring and schedule: every"
        )


def _cost_bytes(settings: GossipSettings, graph: Graph, numel: int) -> int | None:
    """Payload bytes of one machine's message to one neighbour; None if they vary."""
    if graph.size == 1:
        return 0
    machines = Simulation(graph.size)
    for round in range(graph.period or 64):
        for rank, port in enumerate(machines.ports):
            if graph.mixing(round).targets(rank):
                replica = ShapeReplica([numel])
                algorithm = settings.algorithm.build(Parts(replica, port, graph, settings.deadline_s, settings.seed))
                sent = algorithm.sent_bytes(Turn(round, round, graph.mixing(round)))
                return max(sent.values(), default=None)
    return None
