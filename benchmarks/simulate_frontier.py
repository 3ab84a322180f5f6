"""Frontier, 10 B and 20 B parameters: simulated scaling to 384 GCDs and the best triples, beside what was published.

    python benchmarks/simulate_frontier.py [--models "10 B" "20 B"] [--micro-batches 1 8] [--json FILE] [--plot FILE]

Simulates, from shapes and configs/clusters/frontier.yaml alone, a step of two GPTs on 16 to 384 GCDs: bytes and their
order as thinwire forecasts them (tests hold that to what is sent), and the steps as `thinwire simulate` carries them
out. Xu et al. 2025 (2501.04266) published for 10 to 20 B parameters and 384 GCDs: ZeRO++ over ZeRO-3 1.405, their
scheme (parameters over a pair, gradients over a node, optimizer over the world) over ZeRO++ 1.707, its efficiency 0.94.

Assumed, since it is not published, or only as peaks:
- links at the rates of the file, which are peaks, and free of other jobs; at each level a ring, so a collective takes
  (peers - 1) latencies; all schemes as thinwire would run them, level by level: DeepSpeed's own ZeRO++ does worse;
- 40 % of the peak while computing, activations computed anew in the backward pass, sequences of 2048 tokens;
- tokens of a GCD in a micro-batch: set, for 20 B, one micro-batch and 384 GCDs, so that ZeRO++ gains on ZeRO-3 just
  what was measured. So this ratio is an input; the other two are outcomes.
- what is hidden: "nothing" = every exchange is waited for; "overlap" = one unit is gathered ahead and sums go out
  behind the backward pass, as FSDP2 does it. What the published system hid is not known.
- 16 GCDs, or the fewest whose memory is enough, are what efficiency is counted from.

Rows: the ways by name, on 384 GCDs; then, numbered, the fastest of all legal triples that fit into memory, in
thinwire's wires, each followed by the next that is slower but takes less memory.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from runner import Row, arguments, report

from thinwire.comm.forecast import Exchange, Forecast
from thinwire.dist.cluster_simulation.disturbances import Disturbances
from thinwire.dist.cluster_simulation.ranks import distinct_ranks, every_rank
from thinwire.dist.cluster_simulation.steps import Steps
from thinwire.dist.config import RunConfig
from thinwire.dist.plan.cluster import Cluster, load_cluster
from thinwire.dist.plan.forecasts import Subject
from thinwire.dist.plan.prediction import Prediction, predict, subject_of
from thinwire.dist.plan.program import Program, Send, Wait, Work, build_program
from thinwire.dist.plan.timeline import ComputeTime, exchange_s

CLUSTER = Path(__file__).resolve().parent.parent / "configs" / "clusters" / "frontier.yaml"
GCDS = (16, 32, 64, 128, 256, 384)
ZEROPP_GAIN, TOPO_GAIN, EFFICIENCY = 1.405, 1.707, 0.94  # published
CONTEXT = 2048
MODELS = {
    "10 B": {"layers": 48, "heads": 32, "width": 4096},
    "20 B": {"layers": 44, "heads": 64, "width": 6144},  # the shape of GPT-NeoX-20B
}
WORLD = {"params": "world", "grads": "world", "optim": "world"}
TOPO = {"params": "pair", "grads": "node", "optim": "world"}
BF16 = dict.fromkeys(("pair", "node", "world"), "bf16")
INT4 = dict.fromkeys(("pair", "node", "world"), "int4")
THIN = {
    "gather": "int8",
    "update": "difference",
    "gradients": {"pair": "int8", "node": "int8", "world": "int4"},
}
# What each scheme says of levels and wires.
WAYS: Mapping[str, Mapping[str, Any]] = {
    "ZeRO-3": {**WORLD, "gradients": BF16},
    "HSDP": {"params": "node", "grads": "node", "optim": "node", "gradients": BF16},
    "ZeRO++": {**WORLD, "secondary": "node", "gather": "int8", "gradients": INT4},
    "pair, node, world; 16 bits": {**TOPO, "gradients": BF16},
    "pair, node, world; int8, int4": {**TOPO, "gather": "int8", "update": "int8", "gradients": INT4},
    "pair, node, world; thinwire": {**TOPO, **THIN},
}
PAPERS = "pair, node, world; int8, int4"
SHOWN = 4  # of the best triples
JITTER = 0.03
STEPS = 40

Hiding = Literal["nothing", "overlap"]


@dataclass(frozen=True)
class Model:
    """A GPT on the meta device and what a sequence costs."""

    name: str
    shape: Mapping[str, Any]

    def config(self, way: Mapping[str, Any], ranks: int, micro_batches: int) -> RunConfig:
        """One sequence of CONTEXT tokens in a micro-batch."""
        settings = {
            "name": "frontier",
            "model": {"kind": "gpt", **self.shape, "context": CONTEXT, "vocab": 50304},
            "train": {
                "steps": STEPS,
                "global_batch": ranks * micro_batches,
                "micro_batch": 1,
                "precision": "bf16",
            },
            "method": {"kind": "partition", "weights": "bf16", **way},
            "engine": {"kind": "fsdp2", "activation_checkpointing": True, "prefetch": 1},
        }
        return RunConfig.model_validate_json(json.dumps(settings))

    @cached_property
    def subject(self) -> Subject:
        return subject_of(self.config(WORLD, 1, 1), 1)


@dataclass(frozen=True)
class Step:
    """A step of `tokens` on each GCD. level_s: seconds of exchanges by level, hidden or not."""

    seconds: float
    jittered_s: float
    compute_s: float
    level_s: Mapping[str, float]
    memory_bytes: float
    tokens: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


class Frontier:
    """Steps by model, way and number of GCDs; each is forecast once, whatever the tokens."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._known: dict[tuple[str, str, int, int], Prediction] = {}

    def prediction(self, model: Model, way: Mapping[str, Any], ranks: int, micro_batches: int) -> Prediction:
        key = (model.name, json.dumps(way, sort_keys=True), ranks, micro_batches)
        if key not in self._known:
            config = model.config(way, ranks, micro_batches)
            told = predict(config, self.cluster.at(ranks), replace(model.subject, config=config))
            exchanges = tuple(as_ring(exchange, told.cluster) for exchange in told.forecast.exchanges)
            self._known[key] = replace(told, forecast=Forecast(exchanges, told.forecast.memory_bytes))
        return self._known[key]

    def step(
        self,
        model: Model,
        way: Mapping[str, Any],
        ranks: int,
        micro_batches: int,
        tokens: float,
        hiding: Hiding,
        *,
        jitter: float = 0.0,
    ) -> Step:
        """Args: tokens, of a GCD in a micro-batch."""
        told = self.prediction(model, way, ranks, micro_batches)
        trace = model.subject.trace.checkpointed()
        rate, share = told.cluster.device.flops_per_s, tokens / CONTEXT
        optimizer_s = told.time.compute_s - micro_batches * (trace.forward_flops + trace.backward_flops) / rate
        compute = ComputeTime(share * trace.forward_flops / rate, share * trace.backward_flops / rate, optimizer_s)
        program = build_program(told.forecast, trace, compute, told.cluster, micro_batches=micro_batches, prefetch=1)
        level_s = dict.fromkeys((level.name for level in told.cluster.levels), 0.0)
        for exchange in told.forecast.exchanges:
            (level,) = exchange.sent_bytes
            level_s[level] += exchange.per_step * exchange_s(exchange, told.cluster)
        if hiding == "nothing":
            sent_s = sum(send.seconds for send in program.operations if isinstance(send, Send))
            barrier = replace(next(send for send in program.operations if isinstance(send, Send)), level="world")
            program = Program((Work(program.compute_s), replace(barrier, seconds=sent_s), Wait(barrier.slot)), 0.0)
        memory = dict(told.memory_bytes)
        return Step(
            mean_step(program, told.cluster, 0.0),
            mean_step(program, told.cluster, jitter) if jitter else 0.0,
            compute.step_s(micro_batches),
            level_s,
            sum(memory.values()) + (share - 1) * memory["activations"],
            tokens * micro_batches,
        )

    def fit_tokens(self, model: Model, hiding: Hiding) -> float:
        """Tokens with which ZeRO++ gains on ZeRO-3 what was published; it gains less with more of them."""
        least, most = 16.0, 65536.0
        for _ in range(30):
            middle = (least * most) ** 0.5
            zero3, zeropp = (self.step(model, WAYS[way], 384, 1, middle, hiding) for way in ("ZeRO-3", "ZeRO++"))
            least, most = (middle, most) if zero3.seconds / zeropp.seconds > ZEROPP_GAIN else (least, middle)
        return middle


@dataclass(frozen=True)
class Case:
    """A model and what is assumed of its steps."""

    frontier: Frontier
    model: Model
    micro_batches: int
    tokens: float
    hiding: Hiding

    def step(self, way: Mapping[str, Any], ranks: int = max(GCDS), jitter: float = 0.0) -> Step:
        return self.frontier.step(self.model, way, ranks, self.micro_batches, self.tokens, self.hiding, jitter=jitter)

    def fits(self, step: Step) -> bool:
        return step.memory_bytes <= self.frontier.cluster.device.memory_bytes

    def scaling(self, way: Mapping[str, Any]) -> list[tuple[int, Step]]:
        """Every number of GCDs whose memory is enough."""
        steps = [(ranks, self.step(way, ranks)) for ranks in GCDS]
        return [(ranks, step) for ranks, step in steps if self.fits(step)]

    def rows(self, *, triples: bool) -> Iterator[Row]:
        ways = dict(WAYS)
        if triples:
            ways |= {f"{place}: {label_of(way)}": way for place, way in enumerate(self.best(), 1)}
        zero3 = self.step(WAYS["ZeRO-3"])
        for label, way in ways.items():
            (fewest, _), *_, (most, _) = self.scaling(way)
            first, last = (self.step(way, ranks, JITTER) for ranks in (fewest, most))
            yield {
                "model": self.model.name,
                "micro-batches": self.micro_batches,
                "hidden": self.hiding,
                "way": label,
                "GB": last.memory_bytes / 1e9,
                "compute s": last.compute_s,
                **{f"{level} s": seconds for level, seconds in last.level_s.items()},
                "step s": last.seconds,
                "tokens/s/GCD": last.tokens_per_s,
                "against ZeRO-3": last.tokens_per_s / zero3.tokens_per_s,
                "from": fewest,
                "efficiency": last.tokens_per_s / first.tokens_per_s,
                f"with {JITTER:.0%} jitter": first.jittered_s / last.jittered_s,
            }

    def best(self) -> list[dict[str, Any]]:
        """Of all legal triples that fit, in thinwire's wires: the fastest, and such slower ones as take less memory."""
        found = []
        names = ["rank", *(level.name for level in self.frontier.cluster.levels)]
        for params, grads, optim in itertools.combinations_with_replacement(names, 3):
            for secondary in [None, *names[: names.index(params)]]:
                way = {"params": params, "grads": grads, "optim": optim, "secondary": secondary, **THIN}
                step = self.step(way)
                if self.fits(step):
                    found.append((step.seconds, step.memory_bytes, way))
        chosen: list[tuple[float, float, dict[str, Any]]] = []
        for each in sorted(found, key=lambda each: each[:2]):
            if not chosen or each[1] < chosen[-1][1]:
                chosen.append(each)
        return [way for _, _, way in chosen[:SHOWN]]

    def published(self) -> str:
        """What the paper says, beside what comes out here."""
        zero3, zeropp, papers = (self.step(WAYS[way]) for way in ("ZeRO-3", "ZeRO++", PAPERS))
        (fewest, first), *_, (_, last) = self.scaling(WAYS[PAPERS])
        sending = [sum(step.level_s.values()) for step in (zero3, zeropp)]
        needed = (TOPO_GAIN - 1) / (ZEROPP_GAIN * TOPO_GAIN - 1)
        return (
            f"{self.model.name}, micro-batches {self.micro_batches}, hidden: {self.hiding}, {self.tokens:,.0f} tokens: "
            f"ZeRO++ over ZeRO-3 {zero3.seconds / zeropp.seconds:.2f} (published {ZEROPP_GAIN}), the paper's scheme "
            f"over ZeRO++ {zeropp.seconds / papers.seconds:.2f} (published {TOPO_GAIN}), its efficiency from {fewest} "
            f"GCDs on {last.tokens_per_s / first.tokens_per_s:.2f} (published {EFFICIENCY}). ZeRO++ sends for "
            f"{sending[1] / sending[0]:.2f} of ZeRO-3's seconds; where nothing is hidden, both gains together take "
            f"{needed:.2f} at least, even if the paper's scheme sent nothing"
        )


def main() -> None:
    parser = arguments(str(__doc__).splitlines()[0])
    parser.set_defaults(device="cpu")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 8], help="in a step")
    parser.add_argument("--tokens", type=float, default=0.0, help="of a GCD in a micro-batch; 0 = fitted")
    parser.add_argument("--no-triples", action="store_true", help="the named ways alone, in a quarter of the time")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw throughput against GCDs there")
    options = parser.parse_args()
    frontier = Frontier(load_cluster(CLUSTER))
    models = {name: Model(name, MODELS[name]) for name in dict.fromkeys(["20 B", *options.models])}
    hidings: tuple[Hiding, ...] = ("nothing", "overlap")
    tokens = {hiding: options.tokens or frontier.fit_tokens(models["20 B"], hiding) for hiding in hidings}
    cases = [
        Case(frontier, models[name], count, tokens[hiding], hiding)
        for name, count, hiding in itertools.product(options.models, options.micro_batches, hidings)
    ]
    rows = [row for case in cases for row in case.rows(triples=not options.no_triples)]
    report(str(__doc__).splitlines()[0], rows, device=torch.device("cpu"), path=options.json)
    for case in cases:
        print(case.published())
    if options.plot:
        draw(cases, options.plot)


def as_ring(exchange: Exchange, cluster: Cluster) -> Exchange:
    """With as many latencies as a ring of the level's peers has hops."""
    sizes = {level.name: level.size for level in cluster.levels}
    names = list(sizes)
    shots = {}
    for name, count in exchange.shots.items():
        inner = sizes[names[names.index(name) - 1]] if names.index(name) else 1
        shots[name] = count * (sizes[name] // inner - 1)
    return replace(exchange, shots=shots)


def mean_step(program: Program, cluster: Cluster, jitter: float) -> float:
    """Seconds of a step; without jitter all ranks and steps are alike."""
    ranks = every_rank(cluster) if jitter else distinct_ranks(cluster, ())
    steps, count = Steps(program, ranks, Disturbances(jitter=jitter)), STEPS if jitter else 1
    return float([steps.next() for _ in range(count)][-1].ended_s.max()) / count


def label_of(way: Mapping[str, Any]) -> str:
    label = ", ".join(way[state] for state in ("params", "grads", "optim"))
    return f"{label}; copy: {way['secondary']}" if way["secondary"] else label


def draw(cases: Sequence[Case], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    columns = 2
    figure, panels = plt.subplots(
        len(cases) // columns,
        columns,
        figsize=(6 * columns, 2 * len(cases)),
        dpi=110,
        layout="constrained",
        squeeze=False,
    )
    for axes, case in zip(panels.flat, cases, strict=True):
        for label, way in WAYS.items():
            fitting = [(ranks, step.tokens_per_s) for ranks, step in case.scaling(way)]
            axes.plot(*zip(*fitting, strict=True), marker="o", label=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(GCDS, [str(ranks) for ranks in GCDS])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("GCDs")
        axes.set_ylabel("tokens per second and GCD")
        axes.set_title(f"{case.model.name}, micro-batches: {case.micro_batches}, hidden: {case.hiding}", fontsize=10)
        axes.grid(alpha=0.3)
    panels.flat[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    main()
