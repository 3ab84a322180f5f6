"""A gossip run of many machines in one process, in virtual time: the models, data and scripts of a real one."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from thinwire.comm.gossip.agent import Agent
from thinwire.comm.gossip.build import Plan, build_agent, make_plan
from thinwire.comm.gossip.door import describe
from thinwire.comm.gossip.graphs.edges import EdgesSettings
from thinwire.comm.gossip.graphs.links import Link, Links
from thinwire.comm.gossip.machine import Machine, examine
from thinwire.comm.gossip.message import Kind
from thinwire.comm.gossip.optimizer_state import OptimizerState
from thinwire.comm.gossip.port import Script, T
from thinwire.comm.gossip.settings import GossipSettings
from thinwire.comm.gossip.simulated_network import Network, Trunk
from thinwire.comm.gossip.simulation import Simulation, pause
from thinwire.comm.gossip.statistics import normalisations
from thinwire.comm.gossip.turn import Turn
from thinwire.comm.units import format_bytes, parse_delay, parse_rate
from thinwire.dist.gossip_run import GossipRunSettings
from thinwire.dist.local_step import LocalStep
from thinwire.dist.optimizers import build_optimizer
from thinwire.dist.simulated_views import Scorer, View, distances
from thinwire.dist.step_reports import NonFiniteError
from thinwire.dist.task import build_task

if TYPE_CHECKING:
    from thinwire.dist.config import RunConfig

_CONTROL = (Kind.END, Kind.BARRIER, Kind.JOIN_ASK)  # as the post counts them


@dataclass(frozen=True)
class Circumstances:
    """What a configuration does not say of the machines.

    Args:
        machines: how many.
        compute_s: virtual seconds that one forward and backward pass with its optimizer step takes.
        rate_bps, delay_s: of each machine's line, and one way between two. A graph whose edges say what their links are
            has these besides.
        slow: by what factor a machine computes more slowly.
        killed_s: when a machine dies. lost_after_s: how long after that the others know.
        scored: machines whose own models are scored, spread evenly.
    Raises:
        ValueError: a machine that there is not, or a number that makes no sense.
    """

    machines: int
    compute_s: float = 0.1
    rate_bps: float = math.inf
    delay_s: float = 0.0
    slow: Mapping[int, float] = field(default_factory=dict)
    killed_s: Mapping[int, float] = field(default_factory=dict)
    lost_after_s: float = 15.0
    scored: int = 8

    def __post_init__(self) -> None:
        if self.machines < 1:
            raise ValueError(f"--hosts: {self.machines}; give 1 or more")
        if not 0 <= self.compute_s < math.inf:
            raise ValueError(f"--compute-ms: {1e3 * self.compute_s:g}; give the time of a step, 0 or more")
        for option, given in (("--slow", self.slow), ("--kill", self.killed_s)):
            for rank, value in given.items():
                if not 0 <= rank < self.machines:
                    raise ValueError(f"{option}: {rank}={value:g}, but the machines are 0..{self.machines - 1}")
        for rank, factor in self.slow.items():
            if not 0 < factor < math.inf:
                raise ValueError(f"--slow: {rank}={factor:g}; a machine takes some positive multiple of the usual time")
        for rank, at_s in self.killed_s.items():
            if not 0 <= at_s < math.inf:
                raise ValueError(f"--kill: {rank}={at_s:g}; give the virtual second at which it dies")
        if self.machines > 1 and len(self.killed_s) >= self.machines:
            raise ValueError("--kill: it names all machines; leave one alive")
        if self.scored < 1:
            raise ValueError(f"--score: {self.scored}; give 1 or more machines")

    def step_s(self, rank: int) -> float:
        """What a step takes a machine to compute."""
        return self.compute_s * self.slow.get(rank, 1.0)


@dataclass
class SimulatedMachine:
    """One machine. loss: of its last step. computed_s: virtual seconds of computing; ended_s: when it was done."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    parts: Machine
    agent: Agent
    local: LocalStep
    loss: float = math.nan
    computed_s: float = 0.0
    ended_s: float = 0.0


class SimulatedRun:
    """All machines of a run. The scripts that they run are those of real ones, so they end with the same bits.

    That holds for algorithms in rounds where nobody is late; it takes equal numbers of CPU threads (world.threads), as
    sums in another order have other last bits. Where each machine keeps its own pace, the order of events decides.

    Args:
        config: the run; of `world`, only the threads are of use here, and nothing is written to its folder.
    Raises:
        ValueError: the method is not gossip, or a setting fits neither the task nor so many machines.
    """

    def __init__(self, config: RunConfig, circumstances: Circumstances) -> None:
        if not isinstance(config.method, GossipRunSettings):
            raise ValueError(
                f"method.kind: {config.method.kind}, but only gossip can be simulated as it learns: the collectives of "
                "other methods need all ranks at once, each in a process of its own; run it by thinwire lab --hosts N "
                "-- thinwire train CONFIG, or time it by thinwire simulate CONFIG --cluster FILE"
            )
        if config.balance is not None:
            raise ValueError(
                "balance: is given, but simulated machines share a process, and count no loads; give balance=null"
            )
        if config.method.machines is not None:
            raise ValueError(
                "method.machines: is given, but simulated machines have no addresses, and --hosts says how many they "
                "are; remove it, or give method.machines=null"
            )
        self.config, self.circumstances = config, circumstances
        size = circumstances.machines
        config.train.share(size)
        torch.set_num_threads(1 if config.world.threads == "auto" else config.world.threads)
        device = torch.device("cpu")
        task = build_task(config, device)
        self._data = task.data
        self._scorer = Scorer(config.train, task.data.validation, device)
        optimizer = build_optimizer(config.optimizer, task.model)
        statistics = config.method.statistics == "mix"
        first = examine(optimizer, task.model, statistics=statistics)
        if config.method.algorithm.needs_sgd and not isinstance(optimizer, torch.optim.SGD):
            raise ValueError(
                f"optimizer.kind: {config.optimizer.kind}, but method.algorithm: {config.method.algorithm.kind} "
                "corrects the step of SGD; give optimizer.kind=sgd, or method.algorithm=dpsgd"
            )
        links = (
            Links(Link(circumstances.rate_bps, circumstances.delay_s)) if circumstances.rate_bps < math.inf else None
        )
        if config.method.statistics == "recalibrate" and normalisations(task.model):
            raise ValueError(
                "method.statistics: recalibrate, which a simulation does not do, and this model has batch "
                "normalisation; give method.statistics=mix or local"
            )
        plan = make_plan(config.method, size, steps=config.train.steps, numel=first.replica.numel, links=links)
        self.plan = replace(plan, schedule=_Remembered(plan))
        self.numel = first.replica.numel
        self.simulation = Simulation(size, _network(config.method, circumstances))
        self.machines: list[SimulatedMachine] = []
        for rank in range(size):
            model = copy.deepcopy(task.model)
            own = build_optimizer(config.optimizer, model)
            parts = examine(own, model, statistics=statistics)
            agent = build_agent(self.plan, parts.replica, self.simulation.ports[rank])
            state = OptimizerState(own, config.method.optimizer_state, list(parts.parameters.values()))
            agent.after_merge = state.merged
            agent.before_merge = partial(self._keep_unmerged, rank)
            local = LocalStep(config, model, own, task.data, rank=rank, size=size, device=device)
            self.machines.append(SimulatedMachine(model, own, parts, agent, local))
        self._merged_model = task.model  # holds the mean when it is scored
        self._merged_replica = first.replica
        self._due: list[int] = []
        self._unmerged: dict[int, Tensor] = {}  # weights before the last merge, of machines that are scored
        self._unmerged_distance = math.nan
        self._merging: set[int] = set()  # machines that have come to the merge at hand

    def describe(self) -> str:
        """What is simulated: task, method, network, memory."""
        given, train = self.circumstances, self.config.train
        weights = 4 * self.numel
        slowed = "".join(f", machine {rank} {factor:g} times slower" for rank, factor in sorted(given.slow.items()))
        killed = "".join(f", machine {rank} dies at {at_s:g} s" for rank, at_s in sorted(given.killed_s.items()))
        return "\n".join(
            (
                f"{given.machines} machine{'s' * (given.machines > 1)} with {self.numel:,} weights each "
                f"({format_bytes(weights)}); {self._data.describe()}",
                f"{train.steps} steps of {train.global_batch // given.machines} sequences on each; "
                f"method gossip: {describe(self.plan, self.machines[0].agent)}",
                f"{1e3 * given.compute_s:g} ms of computing a step{slowed}{killed}; {self._lines()}",
            )
        )

    def run(self, show: Callable[[View], None] = lambda view: None) -> View:
        """Train on all machines; returns what there is at the end, when nothing is on the wire.

        Args:
            show: gets a view whenever an evaluation is due (train.eval_every): the last machine alive has taken these
                steps, or the first one, where each keeps its own pace.
        Raises:
            NonFiniteError, OwnWeightsError: the loss, the gradient or the weights of a machine are not finite.
        """
        every, steps = self.config.train.eval_every, self.config.train.steps
        self._due = list(range(every, steps, every)) if every else []
        for rank, at_s in self.circumstances.killed_s.items():
            self.simulation.at(
                at_s, partial(self.simulation.kill, rank, noticed_after_s=self.circumstances.lost_after_s)
            )
        self.simulation.run([self._train(rank, show) for rank in range(len(self.machines))])
        view = self.look()
        if not self.plan.schedule.turn(steps - 1).merge or not self._unmerged:
            return view
        scores = []
        for rank in sorted(self._unmerged):
            self._merged_replica.set_weights(self._unmerged[rank])
            scores.append(self._scorer.score(self._merged_model))
        unmerged = [score for score in scores if score is not None]
        return replace(view, unmerged=unmerged, unmerged_distance=self._unmerged_distance)

    def look(self) -> View:
        """What the machines that are alive have now."""
        alive = self.alive()
        ports = self.simulation.ports
        rms_distance, rms_norm = distances([self._learned(rank) for rank in alive])
        scores = [self._scorer.score(self.machines[rank].model) for rank in self._scored(alive)]
        self._merged_replica.set_weights(self.mean(alive))
        return View(
            step=max(self.machines[rank].agent.step for rank in alive),
            least_step=min(self.machines[rank].agent.step for rank in alive),
            seconds=self.simulation.now_s,
            alive=len(alive),
            loss=math.fsum(self.machines[rank].loss for rank in alive) / len(alive),
            rms_distance=rms_distance,
            rms_norm=rms_norm,
            local=[score for score in scores if score is not None],
            merged=self._scorer.score(self._merged_model),
            sent_bytes=[sum(port.sent_bytes.values()) for port in ports],
            messages=sum(port.sent_messages for port in ports),
            edges=self._edges(),
            kinds=self._kinds(),
            exposed_s=[max(0.0, m.ended_s - m.computed_s) for m in self.machines],
        )

    def alive(self) -> list[int]:
        """Machines that are."""
        return [port.rank for port in self.simulation.ports if port.alive]

    def mean(self, ranks: Sequence[int]) -> Tensor:
        """(sum m_i x_i) / (sum m_i), summed in fp64."""
        total, mass = torch.zeros(self.numel, dtype=torch.float64), 0.0
        for machine in (self.machines[rank] for rank in ranks):
            total.add_(machine.parts.replica.weights(), alpha=machine.agent.algorithm.mass)
            mass += machine.agent.algorithm.mass
        return (total / mass).to(torch.float32)

    def _train(self, rank: int, show: Callable[[View], None]) -> Script[None]:
        machine, step_s = self.machines[rank], self.circumstances.step_s(rank)
        agent = machine.agent
        while not agent.ended:
            if step_s:
                yield pause(self.simulation.now_s, step_s)
                machine.computed_s += step_s
            machine.loss, norm = machine.local.gradient(agent.step)
            if not (math.isfinite(machine.loss) and math.isfinite(norm)):
                raise NonFiniteError(agent.step + 1, (rank,), "a machine's own loss or gradient is not finite")
            yield from without_grad(agent.before_step())
            machine.optimizer.step()
            machine.optimizer.zero_grad()
            yield from without_grad(agent.after_step())
            machine.ended_s = self.simulation.now_s
            self._show_what_is_due(show)
        yield from without_grad(agent.cut())

    def _show_what_is_due(self, show: Callable[[View], None]) -> None:
        if not self._due:
            return
        reached = [self.machines[rank].agent.step for rank in self.alive()]
        count = min(reached) if self.plan.settings.algorithm.in_rounds else max(reached)
        if count >= self._due[0]:
            self._due = [step for step in self._due if step > count]
            show(self.look())

    def _keep_unmerged(self, rank: int) -> None:
        """A machine is about to take the global average: look at what it gives up for it."""
        alive = self.alive()
        if not self._merging:  # the first of them
            self._unmerged_distance, _ = distances([self._learned(other) for other in alive])
        self._merging = (self._merging | {rank}) if len(self._merging) + 1 < len(alive) else set()
        if rank in self._scored(alive):
            self._unmerged[rank] = self.machines[rank].parts.replica.weights()

    def _learned(self, rank: int) -> Tensor:
        replica = self.machines[rank].parts.replica
        return replica.weights()[: sum(replica.sizes)]

    def _scored(self, alive: list[int]) -> list[int]:
        count = min(self.circumstances.scored, len(alive))
        return [alive[i * len(alive) // count] for i in range(count)]

    def _edges(self) -> dict[tuple[int, int], int]:
        """Payload bytes by (sender, receiver), but for those of control."""
        edges: dict[tuple[int, int], int] = {}
        for port in self.simulation.ports:
            for (to, kind), count in sorted(port.sent.items()):
                if count and kind not in _CONTROL:
                    edges[port.rank, to] = edges.get((port.rank, to), 0) + count
        return edges

    def _kinds(self) -> dict[str, int]:
        kinds: dict[str, int] = {}
        for port in self.simulation.ports:
            for (_, kind), count in port.sent.items():
                name = f"{'control' if kind in _CONTROL else 'gossip'}/{kind.name.lower()}"
                kinds[name] = kinds.get(name, 0) + count
        return {name: count for name, count in sorted(kinds.items()) if count}

    def _lines(self) -> str:
        given = self.circumstances
        rate = "lines without a limit" if given.rate_bps == math.inf else f"lines of {given.rate_bps / 1e6:g} Mbit/s"
        paths = _paths(self.plan.settings)
        measured = f", {len(paths)} edges as they were measured" if paths else ""
        return f"{rate}, {1e3 * given.delay_s:g} ms one way{measured}"


def without_grad(script: Script[T]) -> Script[T]:
    """The script under torch.no_grad(), without leaving it to others while it waits."""
    while True:
        with torch.no_grad():
            try:
                wait = next(script)
            except StopIteration as end:
                result: T = end.value
                return result
        yield wait


class _Remembered:
    """A schedule whose turns are made once for all machines."""

    def __init__(self, plan: Plan) -> None:
        self._turn = lru_cache(maxsize=256)(plan.schedule.turn)

    def turn(self, step: int) -> Turn:
        return self._turn(step)


def _paths(settings: GossipSettings) -> dict[tuple[int, int], Trunk]:
    """The links that the graph's edges state."""
    if not isinstance(settings.graph, EdgesSettings):
        return {}
    usual = settings.graph
    return {
        edge.ends: Trunk(
            parse_rate(edge.link or usual.link, "link"), parse_delay(edge.latency or usual.latency, "latency")
        )
        for edge in settings.graph.edges
        if edge.link is not None or edge.latency is not None
    }


def _network(settings: GossipSettings, given: Circumstances) -> Network:
    return Network(rate_bps=given.rate_bps, delay_s=given.delay_s, paths=_paths(settings))
