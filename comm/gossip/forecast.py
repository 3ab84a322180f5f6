"""What gossip() will send and keep: its schedule and algorithm, asked in advance, of weights that need not exist."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from thinwire.comm.compress.compressors.dense import Dense
from thinwire.comm.forecast import Coding, Exchange, Forecast, Seat, When, codec_label
from thinwire.comm.gossip.algorithm import Algorithm, Parts
from thinwire.comm.gossip.algorithms.acid import A2CiD2Settings
from thinwire.comm.gossip.algorithms.choco import Choco, ChocoSettings
from thinwire.comm.gossip.algorithms.d2 import D2Settings
from thinwire.comm.gossip.algorithms.dadao import DADAOSettings
from thinwire.comm.gossip.algorithms.decentlam import DecentLaMSettings
from thinwire.comm.gossip.algorithms.gradient_tracking import GradientTrackingSettings
from thinwire.comm.gossip.algorithms.modest import ModestSettings
from thinwire.comm.gossip.algorithms.modest_traffic import ModestTraffic
from thinwire.comm.gossip.algorithms.noloco import NoLoCoSettings
from thinwire.comm.gossip.algorithms.own_pace import OwnPace
from thinwire.comm.gossip.algorithms.sgp import SGPSettings
from thinwire.comm.gossip.algorithms.slowmo import SlowMoSettings
from thinwire.comm.gossip.build import Plan, make_plan
from thinwire.comm.gossip.codec import Plain
from thinwire.comm.gossip.graphs.auto import AutoSettings
from thinwire.comm.gossip.graphs.links import Links
from thinwire.comm.gossip.merge import average_bytes
from thinwire.comm.gossip.mixing import Mixing
from thinwire.comm.gossip.probes import probe_bytes
from thinwire.comm.gossip.replica import ShapeReplica
from thinwire.comm.gossip.schedule import Rounds
from thinwire.comm.gossip.settings import GossipSettings
from thinwire.comm.gossip.simulation import Simulation
from thinwire.comm.gossip.turn import Turn
from thinwire.comm.units import format_bytes

_MOST_ROWS = 1 << 16  # of mixings that are looked at: rounds times machines
_UNKNOWN_ROUNDS = 256  # of a run whose length nobody has said
_MOST_COMPARED = {True: 512, False: 128}  # machines, in rounds or each at its own pace
HANDLING = json.dumps({"kind": "round", "of": "gossip"})
"""Label of what a round takes beside sending: reading, checking, mixing and writing weights; see Coding."""
_MERGE_SHOTS = 8  # a cut and two agreements, two messages each, and the average's two


def forecast_gossip(
    settings: GossipSettings,
    sizes: Sequence[int],
    seat: Seat,
    *,
    statistics: int = 0,
    steps: int | None = None,
    links: Links | None = None,
) -> Forecast:
    """What gossip() will send in a step, in the mean over the run, and keep; each rank is a machine.

    Rounds that send the same to the same levels are one exchange, which comes in its share of the steps.

    Args:
        sizes: elements of each tensor that learns. statistics: of the buffers that are exchanged with them.
        steps: optimizer steps of the run; None: nobody has said, and 256 rounds stand for it.
        links: for graph: auto; None: choose.py says what it assumes. A job measures them at its start.
    Raises:
        ValueError: graph, algorithm and schedule do not fit together, or not so many machines or steps.
    """
    most = _MOST_COMPARED[settings.algorithm.in_rounds]
    if isinstance(settings.graph, AutoSettings) and settings.algorithm.uses_graph and seat.size > most:
        raise ValueError(
            f"method.graph: auto compares graphs by their spectra, which takes too long for {seat.size} machines; name "
            "one, such as base_k or ring"
        )
    replica = ShapeReplica(sizes, statistics)
    plan = make_plan(settings, seat.size, steps=steps, numel=replica.numel, links=links)
    port = Simulation(seat.size).ports[seat.rank]
    algorithm = settings.algorithm.build(Parts(replica, port, plan.graph, settings.deadline_s, settings.seed, steps))
    remarks = []
    exchanges: list[Exchange] = []
    measured = isinstance(settings.graph, AutoSettings) and not settings.graph.links() and settings.algorithm.uses_graph
    if measured and seat.size > 1:
        remarks.append(f"graph{plan.why}; a job measures its links at the start, and may choose another graph")
    if seat.size > 1:
        turns, share, is_whole = _turns(plan, seat.size)
        exact = is_whole and not measured
        if not is_whole:
            remarks.append("a part of the rounds stands for all of them: they are too many to be looked at one by one")
        exchanges = [
            *_rounds(settings, algorithm, turns, share, seat, replica, steps=steps, exact=exact),
            *_merges(plan, seat, replica),
            *_probes(settings, seat),
        ]
        remarks += _remarks(settings, replica, seat)
    kept = kept_numel(settings, plan, replica, seat.rank)
    return Forecast(tuple(exchanges), {"gossip": 4 * kept} if kept else {}, tuple(remarks))


def kept_numel(settings: GossipSettings, plan: Plan, replica: ShapeReplica, rank: int) -> int:
    """Elements that the algorithm keeps between steps beside the weights, each as 4 bytes."""
    numel, learned = replica.numel, sum(replica.sizes)
    algorithm = settings.algorithm
    under_way = numel * bool(getattr(algorithm, "overlap", False))
    match algorithm:
        case GradientTrackingSettings():
            return 2 * learned
        case D2Settings():
            return learned
        case SlowMoSettings():
            return numel + learned + numel * algorithm.base.overlap
        case NoLoCoSettings():
            return 2 * numel
        case ModestSettings() | A2CiD2Settings():
            return numel
        case DADAOSettings():
            return 6 * numel
        case SGPSettings(heal=True):
            peers = {peer for mixing in _period(plan) for peer in mixing.targets(rank)}
            sources = {peer for mixing in _period(plan) for peer in mixing.sources(rank)}
            return 2 * numel * (len(peers) + len(sources)) + under_way
        case ChocoSettings() if not isinstance(algorithm.compressor, Dense):
            # The start, this machine's copy, what it leaves out, and each neighbour's copy.
            return numel * (3 + len(plan.graph.mixing(0).sources(rank))) + under_way
        case _:
            return under_way


def _turns(plan: Plan, size: int) -> tuple[list[Turn], float, bool]:
    """Turns with an exchange, the steps that each of them stands for one of, and whether they are all that there are.

    Returns: (turns, exchanges' share: 1 / steps, is_whole).
    """
    assert isinstance(plan.schedule, Rounds)
    every = plan.schedule.every
    slow = plan.settings.algorithm.every if isinstance(plan.settings.algorithm, SlowMoSettings) else 1
    cycle = every * slow * (plan.graph.period or _UNKNOWN_ROUNDS)
    steps = plan.steps if plan.steps is not None else cycle
    is_whole = plan.steps is not None or bool(plan.graph.period)
    rounds = -(-steps // every)
    stride = max(1, -(-rounds * size // _MOST_ROWS)) if not plan.graph.period else 1
    looked_at = range(0, rounds, stride)
    count = sum(len(range(r * every, min((r + 1) * every, steps))) for r in looked_at)
    ends = (step for r in looked_at for step in range(r * every, min((r + 1) * every, steps)))
    return [plan.schedule.turn(step) for step in ends], 1 / count, is_whole and stride == 1


def _rounds(
    settings: GossipSettings,
    algorithm: Algorithm,
    turns: Sequence[Turn],
    share: float,
    seat: Seat,
    replica: ShapeReplica,
    *,
    steps: int | None,
    exact: bool,
) -> Iterator[Exchange]:
    if isinstance(settings.algorithm, ModestSettings):
        traffic = _modest_traffic(settings.algorithm, replica, seat)
        others = [rank for rank in range(seat.size) if rank != seat.rank]
        levels = seat.by_level(dict.fromkeys(others, round(traffic.mean_bytes / len(others))))
        shots = dict.fromkeys(levels, 4)  # a ping and its answer, a model, a mean
        share = 1 / settings.algorithm.local_steps
        yield Exchange("gossip/sample", levels, round(traffic.models), shots, "step", per_step=share, exact=False)
        return
    if isinstance(algorithm, OwnPace):
        yield from _at_own_pace(algorithm, turns, share, seat)
        return
    alike: Counter[tuple[tuple[tuple[str, int], ...], int]] = Counter()
    for turn in turns:
        sent = algorithm.expected_bytes(turn) if isinstance(algorithm, Choco) else algorithm.sent_bytes(turn)
        if given := {peer: count for peer, count in sent.items() if count}:
            alike[tuple(sorted(seat.by_level(given).items())), len(given)] += 1
    coding = _coding(settings, algorithm, replica)
    for (by_level, messages), count in alike.items():
        levels = dict(by_level)
        yield Exchange(
            "gossip",
            levels,
            messages,
            dict.fromkeys(levels, 1),
            _when(settings),
            per_step=count * share,
            coding=(
                # One neighbour's message is part of handling a round; those of others are read and added besides.
                Coding(HANDLING, 0, (messages - 1) * replica.numel, 0, messages - 1, handled=replica.numel),
                *(Coding(label, replica.numel, messages * replica.numel) for label in coding),
            ),
            exact=exact and not _varies(settings),
        )


def _at_own_pace(algorithm: OwnPace, turns: Sequence[Turn], share: float, seat: Seat) -> Iterator[Exchange]:
    """Nobody waits, and chance decides who is asked."""
    sent: defaultdict[int, float] = defaultdict(float)
    asked = 0.0
    for turn in turns:
        for peer, count in algorithm.expected_bytes(turn).items():
            sent[peer] += count * share
        asked += algorithm.expected_messages(turn) * share
    levels = seat.by_level({peer: round(count) for peer, count in sent.items()})
    if levels:
        yield Exchange("gossip/swap", levels, max(1, round(asked)), dict.fromkeys(levels, 2), "beside", exact=False)


def _merges(plan: Plan, seat: Seat, replica: ShapeReplica) -> Iterator[Exchange]:
    assert isinstance(plan.schedule, Rounds)
    if plan.schedule.merge_step is None or plan.steps is None:
        return
    sent = average_bytes(replica.numel, replica.dtype.itemsize, seat.rank, range(seat.size))
    levels = seat.by_level(sent)
    yield Exchange(
        "gossip/merge",
        levels,
        2 * (seat.size - 1),
        dict.fromkeys(levels, _MERGE_SHOTS),
        "step",
        per_step=1 / plan.steps,
    )


def _probes(settings: GossipSettings, seat: Seat) -> Iterator[Exchange]:
    if settings.probes and seat.rank:
        levels = seat.by_level({0: probe_bytes(settings.probes)})
        yield Exchange("gossip/probe", levels, 1, dict.fromkeys(levels, 1), "beside", per_step=1 / settings.probe_every)


def _when(settings: GossipSettings) -> When:
    if isinstance(settings.algorithm, DecentLaMSettings):
        return "backward"  # the exchange is part of the gradient that the optimizer waits for
    algorithm = settings.algorithm.base if isinstance(settings.algorithm, SlowMoSettings) else settings.algorithm
    return "beside" if getattr(algorithm, "overlap", False) else "step"


def _coding(settings: GossipSettings, algorithm: Algorithm, replica: ShapeReplica) -> list[str]:
    """Labels of what is encoded once, and decoded from each neighbour."""
    chosen = settings.algorithm
    if isinstance(chosen, ChocoSettings) and not isinstance(chosen.compressor, Dense):
        return [codec_label(chosen.compressor)]
    wire = getattr(chosen, "wire", "fp32")
    return [] if wire == "fp32" else [f'{{"kind": "{wire}"}}']


def _varies(settings: GossipSettings) -> bool:
    """Whether payloads are as long as the data make them."""
    return isinstance(settings.algorithm, ChocoSettings) and not settings.algorithm.compressor.fixed_size


def _period(plan: Plan) -> Iterator[Mixing]:
    return (plan.graph.mixing(round) for round in range(plan.graph.period or 64))


def _modest_traffic(settings: ModestSettings, replica: ShapeReplica, seat: Seat) -> ModestTraffic:
    return ModestTraffic(settings, seat.size, Plain().expected_bytes(replica.numel, replica.dtype.itemsize))


def _remarks(settings: GossipSettings, replica: ShapeReplica, seat: Seat) -> list[str]:
    if isinstance(settings.algorithm, ModestSettings):
        busiest = format_bytes(_modest_traffic(settings.algorithm, replica, seat).busiest_bytes)
        return [
            "modest: bytes and seconds are the mean over all machines, most of which rest in a round; one that trains "
            f"and then averages sends {busiest} in it, which the next round waits for: rounds take longer than shown"
        ]
    if not settings.algorithm.in_rounds:
        return ["machines keep their own pace: chance decides who exchanges, and what is foretold is the mean"]
    return []
