"""How gossip enters a training loop: what it refuses, and the one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn
from torch.distributed import ProcessGroup
from torch.optim import SGD, Optimizer

from thinwire.comm.gossip.agent import Agent
from thinwire.comm.gossip.algorithms import AnyAlgorithm
from thinwire.comm.gossip.build import Plan, build_agent, make_plan
from thinwire.comm.gossip.graphs import EachGraph
from thinwire.comm.gossip.graphs.auto import AutoSettings
from thinwire.comm.gossip.graphs.probe import probe_links
from thinwire.comm.gossip.handle import Gossip
from thinwire.comm.gossip.machine import Machine, examine
from thinwire.comm.gossip.optimizer_state import OptimizerState
from thinwire.comm.gossip.post.door import open_post
from thinwire.comm.gossip.post.post import Post
from thinwire.comm.gossip.schedule import EachSchedule
from thinwire.comm.gossip.settings import GossipSettings
from thinwire.comm.gossip.statistics import recalibrate
from thinwire.comm.queue import CommQueue, open_queue
from thinwire.comm.same_weights import check_same_weights
from thinwire.comm.units import format_bytes

_LOOK_AHEAD = 256  # steps among which describe() looks for an exchange


def gossip(
    optimizer: Optimizer,
    *,
    model: nn.Module | None = None,
    graph: str | Mapping[str, Any] | EachGraph = "auto",
    algorithm: str | Mapping[str, Any] | AnyAlgorithm = "dpsgd",
    schedule: str | Mapping[str, Any] | EachSchedule = "every",
    steps: int | None = None,
    statistics: str = "mix",
    calibrate: Callable[[], object] | None = None,
    optimizer_state: str = "keep",
    deadline_s: float = 10.0,
    meet_deadline_s: float = 600.0,
    probes: int = 8,
    probe_every: int = 10,
    seed: int = 0,
    queue: CommQueue | None = None,
    group: ProcessGroup | None = None,
    timeout_s: float = 60.0,
) -> Gossip:
    """Let every rank train a model of its own and average its weights with a few others; no collective, no waiting.

    D-PSGD (Lian et al. 2017, 1705.09056), the default algorithm: x_i <- sum_j w_ij (x_j + u_j), u_j being what rank j's
    optimizer has changed in this step and W the weights of the graph's round. The mean over all ranks is preserved
    exactly, also where messages are late or lost; a rank that is killed takes along its share. The other algorithms are
    in comm/gossip/algorithms/, the graphs in graphs/, the schedules in schedule.py. SingleMerge is Zhu et al. 2025
    (2507.06542): little contact all along, and one global average at the end.

    The exchange happens in optimizer.step(); each rank keeps the state of its own optimizer. All ranks take the same
    number of steps under algorithms in rounds; under asynchronous ones (ad_psgd, acid) each goes at its own pace, and
    the run ends for all when the first has taken `steps`: leave the loop when handle.ended. The ranks' models differ:
    evaluate, and export, in `with handle.agreed():`, or after a merge.

    Args:
        optimizer: any that has its gradients when step() is called; not one with a closure.
        model: what is trained, for its names and buffers; default: the optimizer's parameters, and no buffers. fp32,
            bf16 or fp16, equal on all ranks. With fully_shard() over the ranks of one machine, each shard is averaged
            with its counterparts: give the queue or group of these.
        graph, algorithm, schedule: settings or names, as in GossipSettings.
        steps: optimizer steps of the whole run, which a merge at the end, a window before it or a budget needs. Without
            it call handle.merge() after the last step.
        statistics: of batch normalisation: local, mix or recalibrate.
        calibrate: for `recalibrate`: runs the model on a few training batches.
        optimizer_state: at a merge: keep, reset or mix.
        deadline_s: how long a neighbour may delay this rank, in seconds. One that is later takes part later.
        meet_deadline_s: how long a merge, or state_dict(), waits for the last rank, in seconds.
        probes, probe_every: numbers of 4 bytes that measure the consensus distance, and steps between them.
        seed: of all that is drawn at random, the same on all ranks.
        queue: CommQueue over the ranks that gossip; default: a new one over `group`.
        group: the ranks that gossip when no queue is given; default: all.
        timeout_s: deadline of the queue when none is given, in seconds.
    Raises:
        ValueError: a setting is not allowed; model, optimizer, graph, algorithm and schedule do not fit together; or,
            on every rank, the ranks begin with different weights.
        OwnWeightsError: from optimizer.step(), when this rank's weights are not finite. They have not been sent: its
            neighbours go on without them and report `absent`.

    Example:
        handle = thinwire.gossip(optimizer, model=model, schedule=thinwire.SingleMerge(probability=0.2), steps=1000)
    """
    settings = GossipSettings.model_validate(
        {
            "graph": graph,
            "algorithm": algorithm,
            "schedule": schedule,
            "statistics": statistics,
            "optimizer_state": optimizer_state,
            "deadline_s": deadline_s,
            "meet_deadline_s": meet_deadline_s,
            "probes": probes,
            "probe_every": probe_every,
            "seed": seed,
        }
    )
    return enter(
        optimizer,
        settings,
        model=model,
        steps=steps,
        calibrate=calibrate,
        queue=queue,
        group=group,
        timeout_s=timeout_s,
    )


def enter(
    optimizer: Optimizer,
    settings: GossipSettings,
    *,
    model: nn.Module | None = None,
    steps: int | None = None,
    calibrate: Callable[[], object] | None = None,
    queue: CommQueue | None = None,
    group: ProcessGroup | None = None,
    timeout_s: float = 60.0,
    post: Post | None = None,
) -> Gossip:
    """gossip() with its settings in one piece: what a configuration file gives.

    Args:
        post: between machines that have met already, in place of a queue or group.
    """
    if settings.statistics == "recalibrate" and (model is None or calibrate is None):
        raise ValueError(
            "method.statistics: recalibrate runs the model on training data after a merge; give model= and calibrate=, "
            "or statistics: local or mix"
        )
    machine = examine(optimizer, model, statistics=settings.statistics == "mix")
    _check(settings, optimizer, machine, queue or group)
    numel = machine.replica.numel
    if post is None:
        queue = queue or open_queue(group, timeout_s=timeout_s)
        # Of a sharded machine all ranks must choose alike, and would not all measure the same.
        probed = isinstance(settings.graph, AutoSettings) and not settings.graph.links() and machine.group is None
        probed = probed and settings.algorithm.uses_graph
        links = probe_links(queue, machine.replica.device) if probed else None
        plan = make_plan(settings, queue.size, steps=steps, numel=numel, links=links)
        if settings.algorithm.equal_start:
            place = f"shard {machine.shard[0]} of {machine.shard[1]}"
            check_same_weights(machine.tensors(), queue, method="gossip", place=place)
        post, peers = open_post(queue), queue.peers
    else:
        plan = make_plan(settings, post.size, steps=steps, numel=numel)
        peers = tuple(range(post.size))
    meter = post.meter
    try:
        agent = build_agent(plan, machine.replica, post)
    except BaseException:
        post.close(farewell=False)
        raise
    return Gossip(
        optimizer,
        agent,
        post,
        machine,
        optimizer_state=OptimizerState(optimizer, settings.optimizer_state, list(machine.parameters.values())),
        algorithm=settings.algorithm.kind,
        meet_deadline_s=settings.meet_deadline_s,
        level_of=lambda rank: meter.level_of(peers[rank]),
        graph=plan.graph.name,
        text=describe(plan, agent),
        recalibrate=_recalibration(settings, model, calibrate),
    )


def _recalibration(
    settings: GossipSettings, model: nn.Module | None, calibrate: Callable[[], object] | None
) -> Callable[[], object] | None:
    """What is to be done to the model after each merge, if anything."""
    if settings.statistics != "recalibrate" or model is None or calibrate is None:
        return None
    return partial(recalibrate, model, calibrate)


def describe(plan: Plan, agent: Agent) -> str:
    """Lines for the start of a run: graph, algorithm, schedule, and what the first exchange sends."""
    settings = plan.settings
    if not settings.algorithm.uses_graph:
        return f"{settings.algorithm.kind}, which draws by itself who trains and who averages"
    options = settings.schedule.model_dump(exclude={"kind"}, exclude_none=True)
    chosen = ", ".join(f"{name} {value}" for name, value in options.items())
    exchange = ""
    for turn in (agent.schedule.turn(step) for step in range(min(plan.steps or _LOOK_AHEAD, _LOOK_AHEAD))):
        if turn.mixing is not None and (sent := agent.algorithm.sent_bytes(turn)):
            exchange = f"; the first exchange, after step {turn.step + 1}, sends {format_bytes(sum(sent.values()))}"
            break
    schedule = f"schedule {settings.schedule.kind} ({chosen})"
    return f"{plan.graph.name}, {settings.algorithm.kind}, {schedule}{exchange}{plan.why}"


def _check(settings: GossipSettings, optimizer: Optimizer, machine: Machine, given: object) -> None:
    algorithm = settings.algorithm
    if algorithm.needs_sgd and not isinstance(optimizer, SGD):
        raise ValueError(
            f"optimizer: {type(optimizer).__name__}, but method.algorithm: {algorithm.kind} corrects the step of "
            "torch.optim.SGD; use that, or algorithm: dpsgd"
        )
    groups = optimizer.param_groups
    if algorithm.needs_sgd and (len({group["lr"] for group in groups}) > 1 or any(g["dampening"] for g in groups)):
        raise ValueError(
            f"optimizer: parameter groups with learning rates {[group['lr'] for group in groups]} and dampening "
            f"{[group['dampening'] for group in groups]}, but method.algorithm: {algorithm.kind} corrects steps of one "
            "learning rate without dampening; make these the same, or use algorithm: dpsgd"
        )
    if machine.group is None:
        return
    if given is None:
        raise ValueError(
            "group: the model is sharded over the ranks of a machine, so each rank gossips with its counterparts on "
            'the other machines alone; give their group, such as mesh["machines"].get_group(), or a queue over them'
        )
    if not algorithm.in_rounds:
        raise ValueError(
            f"method.algorithm: {algorithm.kind} lets each rank go at its own pace, but the ranks of a machine hold "
            "one sharded model and must end together; give an algorithm in rounds, such as dpsgd"
        )
