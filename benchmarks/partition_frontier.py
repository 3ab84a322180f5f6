"""Which triple wins on Frontier for 10 B and 20 B parameters, and how it scales to 384 GCDs, beside what was published.

    python benchmarks/partition_frontier.py [--tokens N] [--micro-batches 1 8] [--json FILE] [--plot FILE]

Predicts, from shapes and configs/clusters/frontier.yaml alone, a step of two GPTs on 16 to 384 GCDs: bytes by level as
thinwire predicts them (tests compare that with what is sent), seconds of a level = bytes / bandwidth + exchanges x
(peers - 1) x latency, nothing hidden behind computing (but for the column `if hidden`), and computing = 8 x parameters
x tokens (activations are recomputed) at the share of the peak that the file says, 40 %. All schemes are computed as
thinwire would run them, level by level: DeepSpeed's own ZeRO++ does worse.

Xu et al. 2025 (2501.04266) do not say how many tokens a GCD had. By default that one number is set so that ZeRO++ gains
on ZeRO-3 for 20 B on 384 GCDs what they measured, 1.405. What their scheme (parameters over a pair, gradients over a
node, optimizer over the world) gains on ZeRO++ (they: 1.71), and how it scales (they: 0.94), is then predicted.

Rows: ways by name, on 384 GCDs; then, numbered, the fastest of all legal triples that fit into memory, in thinwire's
wires, each followed by the next that is slower but takes less memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from runner import Row, arguments, report

from thinwire.comm.partition.blocks import find_blocks
from thinwire.comm.partition.levels import Levels, build_levels
from thinwire.comm.partition.placement import place
from thinwire.comm.partition.settings import PartitionSettings
from thinwire.comm.partition.traffic import UnitShapes, predict_flows, unit_shapes
from thinwire.dist.models import build_model
from thinwire.dist.models.gpt import GPTSettings
from thinwire.dist.plan.cluster import Cluster, load_cluster

CLUSTER = Path(__file__).resolve().parent.parent / "configs" / "clusters" / "frontier.yaml"
GCDS = (16, 32, 64, 128, 256, 384)
PUBLISHED_ZEROPP_GAIN, PUBLISHED_TOPO_GAIN, PUBLISHED_EFFICIENCY = 1.405, 1.707, 0.94
FLOPS_PER_PARAMETER = 8  # and token: 2 forward, 2 again, 4 backward
VOCAB, CONTEXT = 50304, 2048
MODELS = {
    "10 B": {"layers": 48, "heads": 32, "width": 4096, "context": CONTEXT},
    "20 B": {"layers": 44, "heads": 64, "width": 6144, "context": CONTEXT},  # the shape of GPT-NeoX-20B
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
SHOWN = 4  # of the best triples
PAPERS = "pair, node, world; int8, int4"


@dataclass(frozen=True)
class Model:
    shape: GPTSettings
    units: tuple[UnitShapes, ...]

    @property
    def numel(self) -> int:
        return sum(size.numel() for unit in self.units for size in unit.trained.values())

    def activation_bytes(self, tokens: float) -> float:
        """Input of every block, what one block keeps for its backward, and the logits, 16 bits and 32."""
        width = self.shape.width
        return tokens * (2 * width * self.shape.layers + 34 * width + 6 * VOCAB)


@dataclass(frozen=True)
class Step:
    """A predicted step of one rank. level_s: seconds of communication by level."""

    compute_s: float
    level_s: Mapping[str, float]
    memory_bytes: float
    tokens: float

    @property
    def sending_s(self) -> float:
        return sum(self.level_s.values())

    @property
    def seconds(self) -> float:
        return self.compute_s + self.sending_s

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Plan:
    """tokens: of a GCD in one micro-batch."""

    cluster: Cluster
    micro_batches: int
    tokens: float

    def step(self, model: Model, ranks: int, way: Mapping[str, Any]) -> Step:
        settings = PartitionSettings.model_validate({"weights": "bf16", **way})
        cluster = self.cluster.at(ranks)
        levels = levels_of(cluster)
        flows = predict_flows(model.units, levels, settings, micro_batches=self.micro_batches)
        level_s = {level.name: 0.0 for level in cluster.levels}
        for flow in flows:
            link, peers = cluster.level(flow.level), levels.fanouts[levels.names.index(flow.level)]
            level_s[flow.level] += link.send_s(flow.payload_bytes, flow.exchanges * (peers - 1))
        tokens = self.tokens * self.micro_batches
        flops = FLOPS_PER_PARAMETER * model.numel * tokens
        return Step(
            compute_s=flops / cluster.device.flops_per_s,
            level_s=level_s,
            memory_bytes=self._states(model, levels, settings) + model.activation_bytes(self.tokens),
            tokens=tokens,
        )

    def _states(self, model: Model, levels: Levels, settings: PartitionSettings) -> float:
        """16-bit weights, fp32 gradients, fp32 master and two moments, the secondary copy, and two units at work."""
        placed = place(
            levels, params=settings.params, grads=settings.grads, optim=settings.optim, secondary=settings.secondary
        )
        largest = max(sum(size.numel() for size in unit.trained.values()) for unit in model.units)
        held = 2 / levels.size(placed.params) + 4 / levels.size(placed.grads) + 12 / levels.size(placed.optim)
        if placed.secondary is not None:
            held += (2 if settings.gather.kind == "same" else 1) / levels.size(placed.secondary)
        return held * model.numel + largest * (2 * 2 + 4)


def main() -> None:
    parser = arguments(str(__doc__).splitlines()[0])
    parser.set_defaults(device="cpu")
    parser.add_argument(
        "--tokens", type=float, default=0.0, help="of a GCD in a micro-batch; 0 = as the docstring says"
    )
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 8], help="in a step")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw throughput against GCDs there")
    options = parser.parse_args()
    cluster = load_cluster(CLUSTER)
    models = {name: read(shape) for name, shape in MODELS.items()}
    tokens = options.tokens or fit_tokens(cluster, models["20 B"])
    print(f"{tokens:,.0f} tokens for each GCD and micro-batch\n")
    plans = [Plan(cluster, count, tokens) for count in options.micro_batches]
    rows: list[Row] = []
    for plan, (name, model) in itertools.product(plans, models.items()):
        rows += compare(name, model, plan)
    report(str(__doc__).splitlines()[0], rows, device=torch.device("cpu"), path=options.json)
    for plan, (name, model) in itertools.product(plans, models.items()):
        print(published(name, model, plan))
    if options.plot:
        draw(models, plans, options.plot)


def read(shape: Mapping[str, Any]) -> Model:
    settings = GPTSettings.model_validate(shape)
    model = build_model(settings, tokenizer_vocab=VOCAB, seed=0, device=torch.device("meta"))
    return Model(settings, tuple(unit_shapes(model, find_blocks(model))))


def levels_of(cluster: Cluster) -> Levels:
    """As partitioning numbers the ranks of this cluster."""
    names, sizes = zip(*((level.name, level.size) for level in cluster.levels), strict=True)
    return build_levels(names, sizes, range(cluster.size), rank=0)


def fit_tokens(cluster: Cluster, model: Model) -> float:
    """Tokens with which ZeRO++ gains on ZeRO-3 what was published: c + z = gain (c + p), where c is linear in them."""
    one = Plan(cluster, 1, 1.0)
    zero3, zeropp = (one.step(model, max(GCDS), WAYS[way]) for way in ("ZeRO-3", "ZeRO++"))
    return (zero3.sending_s - PUBLISHED_ZEROPP_GAIN * zeropp.sending_s) / (
        (PUBLISHED_ZEROPP_GAIN - 1) * zero3.compute_s
    )


def compare(name: str, model: Model, plan: Plan) -> list[Row]:
    """One row for each way on all GCDs, and for the best triples."""
    ways = dict(WAYS) | {f"{place}: {label_of(way)}": way for place, way in enumerate(best(model, plan), 1)}
    zero3 = plan.step(model, max(GCDS), WAYS["ZeRO-3"])
    rows: list[Row] = []
    for label, way in ways.items():
        step = plan.step(model, max(GCDS), way)
        rows.append(
            {
                "model": name,
                "micro-batches": plan.micro_batches,
                "way": label,
                "GB": step.memory_bytes / 1e9,
                "compute s": step.compute_s,
                **{f"{level} s": seconds for level, seconds in step.level_s.items()},
                "tokens/s/GCD": step.tokens_per_s,
                "if hidden": step.tokens / max(step.compute_s, step.sending_s),
                "against ZeRO-3": step.tokens_per_s / zero3.tokens_per_s,
                **dict(zip(("from", "efficiency"), efficiency(model, plan, way), strict=True)),
            }
        )
    return rows


def efficiency(model: Model, plan: Plan, way: Mapping[str, Any]) -> tuple[int, float]:
    """The smallest count of GCDs whose memory is enough, and throughput per GCD on all in shares of that there."""
    steps = ((ranks, plan.step(model, ranks, way)) for ranks in GCDS)
    fewest, smallest = next((r, s) for r, s in steps if s.memory_bytes <= plan.cluster.device.memory_bytes)
    return fewest, plan.step(model, max(GCDS), way).tokens_per_s / smallest.tokens_per_s


def best(model: Model, plan: Plan) -> list[dict[str, Any]]:
    """Of all legal triples that fit, in thinwire's wires: the fastest, and such slower ones as take less memory."""
    found = []
    names = ["rank", *(level.name for level in plan.cluster.levels)]
    for params, grads, optim in itertools.combinations_with_replacement(names, 3):
        for secondary in [None, *names[: names.index(params)]]:
            way = {"params": params, "grads": grads, "optim": optim, "secondary": secondary, **THIN}
            step = plan.step(model, max(GCDS), way)
            if step.memory_bytes <= plan.cluster.device.memory_bytes:
                found.append((step.seconds, step.memory_bytes, way))
    chosen: list[tuple[float, float, dict[str, Any]]] = []
    for each in sorted(found, key=lambda each: each[:2]):
        if not chosen or each[1] < chosen[-1][1]:
            chosen.append(each)
    return [way for _, _, way in chosen[:SHOWN]]


def label_of(way: Mapping[str, Any]) -> str:
    label = ", ".join(way[state] for state in ("params", "grads", "optim"))
    return f"{label}; copy: {way['secondary']}" if way["secondary"] else label


def published(name: str, model: Model, plan: Plan) -> str:
    """What the paper says, beside what is predicted."""
    zero3, zeropp, papers = (plan.step(model, max(GCDS), WAYS[way]) for way in ("ZeRO-3", "ZeRO++", PAPERS))
    first, second = PUBLISHED_ZEROPP_GAIN, PUBLISHED_TOPO_GAIN
    return (
        f"{name}, micro-batches {plan.micro_batches}: ZeRO++ over ZeRO-3 {zero3.seconds / zeropp.seconds:.2f} "
        f"(published {first}), the paper's scheme over ZeRO++ {zeropp.seconds / papers.seconds:.2f} (published "
        f"{second}), its efficiency {efficiency(model, plan, WAYS[PAPERS])[1]:.2f} (published {PUBLISHED_EFFICIENCY}). "
        f"ZeRO++ sends for {zeropp.sending_s / zero3.sending_s:.2f} of ZeRO-3's seconds here; for both published gains "
        f"it must be {(second - 1) / (first * second - 1):.2f} at least, even if the paper's scheme sent nothing"
    )


def draw(models: Mapping[str, Model], plans: Sequence[Plan], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        len(plans), len(models), figsize=(6 * len(models), 4 * len(plans)), dpi=120, layout="constrained", squeeze=False
    )
    for axes, (plan, (name, model)) in zip(panels.flat, itertools.product(plans, models.items()), strict=True):
        for label, way in WAYS.items():
            steps = [(ranks, plan.step(model, ranks, way)) for ranks in GCDS]
            fitting = [(r, s.tokens_per_s) for r, s in steps if s.memory_bytes <= plan.cluster.device.memory_bytes]
            axes.plot(*zip(*fitting, strict=True), marker="o", label=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(GCDS, [str(ranks) for ranks in GCDS])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("GCDs")
        axes.set_ylabel("tokens per second and GCD, predicted")
        axes.set_title(f"{name} parameters, micro-batches a step: {plan.micro_batches}")
        axes.grid(alpha=0.3)
    panels.flat[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    main()
