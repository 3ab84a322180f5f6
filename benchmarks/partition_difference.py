"""Claim: 4-bit differences of weights end within 0.005 of fp32's validation loss, where 4-bit weights lose over 0.1.

    python benchmarks/partition_difference.py [--steps N] [--seeds 0 1] [--only PART ...] [--json FILE] [--plot FILE]

Trains a small GPT on the text of Python's standard library: AdamW on fp32 masters, and forward and backward on weights
that have come by the update wire, unit by unit, through the same WeightShard that spreads them between machines. What
the wire carries is all that differs; model, data, order and learning rates are the same.

`fp32, nudged` begins with one weight changed by 1e-3: how far it ends from fp32 is what chance alone does. Direct 4-bit
weights are here for contrast: in the format of the differences (blocks of 2048 over all of a unit's parameters); with
norms and embeddings left in fp32; and, most favourable, with blocks of 128 besides.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from runner import Row, arguments, report
from torch import Tensor, nn

from thinwire.comm.partition.blocks import find_blocks
from thinwire.comm.partition.levels import build_levels
from thinwire.comm.partition.ownership import Ownership
from thinwire.comm.partition.placement import Placement
from thinwire.comm.partition.weight_shard import UpdateWire, WeightShard
from thinwire.comm.partition.wires.block_codes import BlockCodes
from thinwire.comm.partition.wires.update import DifferenceUpdate, PlainUpdate, QuantizedUpdate
from thinwire.dist.config import load_config
from thinwire.dist.data import Data
from thinwire.dist.evaluate import evaluate_alone
from thinwire.dist.models import build_model
from thinwire.dist.optimizers import build_optimizer, learning_rate

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "gpt_0.8m.yaml"
CPU = torch.device("cpu")


def any_weight(name: str) -> bool:
    return True


def block_matrix(name: str) -> bool:
    """Whether a parameter is a matrix of attention or of the MLP."""
    return "norm" not in name and "embedding" not in name


@dataclass(frozen=True)
class Arm:
    """What the update wire carries: `wire` for the parameters that `chosen` names, fp32 for the others."""

    label: str
    wire: UpdateWire
    chosen: Callable[[str], bool] = any_weight
    nudge: float = 0.0


ARMS = (
    Arm("fp32", PlainUpdate()),
    Arm("fp32, nudged", PlainUpdate(), nudge=1e-3),
    Arm("4-bit differences", DifferenceUpdate(BlockCodes(4, 2048))),
    Arm("direct 4-bit", QuantizedUpdate(BlockCodes(4, 2048))),
    Arm("direct 4-bit, block matrices only", QuantizedUpdate(BlockCodes(4, 2048)), block_matrix),
    Arm("direct 4-bit, block matrices only, blocks of 128", QuantizedUpdate(BlockCodes(4, 128)), block_matrix),
)


def main() -> None:
    parser = arguments(str(__doc__).splitlines()[0])
    parser.set_defaults(device="cpu", threads=1)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=8, help="sequences of 128 bytes per step")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak of the schedule")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="*", help="arms whose label contains one of these, besides fp32")
    parser.add_argument("--windows", type=int, default=4096, help="of validation text, after the last step")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    arms = [a for a in ARMS if a is ARMS[0] or not options.only or any(part in a.label for part in options.only)]
    curves: dict[tuple[int, str], list[tuple[int, float]]] = {}
    for seed in options.seeds:
        for arm in arms:
            curves[seed, arm.label] = list(train(arm, seed, options))
            print(f"seed {seed}, {arm.label}: {curves[seed, arm.label][-1][1]:.5f}", flush=True, file=sys.stderr)
            rows = [row(label, curves, options) for label in dict.fromkeys(label for _, label in curves)]
            report(str(__doc__).splitlines()[0], rows, device=CPU, path=options.json)
    if options.plot:
        draw(curves, options)


def row(label: str, curves: dict[tuple[int, str], list[tuple[int, float]]], options: Any) -> Row:
    """Losses after the last step, and what they are above those of fp32 with the same seed."""
    ends = {seed: curve[-1][1] for (seed, of), curve in curves.items() if of == label}
    above = {seed: end - curves[seed, ARMS[0].label][-1][1] for seed, end in ends.items()}
    return {
        "update wire": label,
        "seeds": len(ends),
        "steps": options.steps,
        "validation loss": f"{fmean(ends.values()):.5f}",
        "above fp32": f"{fmean(above.values()):+.5f}",
        "least": f"{min(above.values()):+.5f}",
        "most": f"{max(above.values()):+.5f}",
    }


def train(arm: Arm, seed: int, options: Any) -> Iterator[tuple[int, float]]:
    """(step, validation loss) of one run, eight times; the last with all windows."""
    settings = {
        "world.threads": 1,
        "data.cache": "/nowhere",
        "seed": seed,
        "train.steps": options.steps,
        "train.global_batch": options.batch,
        "optimizer.lr": f"{options.lr:.6f}",
        "model.layers": options.layers,
        "model.width": options.width,
        "model.heads": max(1, options.width // 32),
    }
    config = load_config(CONFIG, [f"{path}={value}" for path, value in settings.items()])
    data = Data(config.data, context=config.model.context, seed=config.seed)
    model = build_model(config.model, tokenizer_vocab=data.tokenizer.vocab, seed=config.seed, device=CPU)
    if arm.nudge:
        with torch.no_grad():
            next(model.parameters()).view(-1)[0] += arm.nudge
    masters = copy.deepcopy(model)
    optimizer = build_optimizer(config.optimizer, masters)
    shards = build_shards(model, masters, arm)
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optimizer.lr, config.schedule, step, options.steps)
        batch = data.training_batch(range(step * options.batch, (step + 1) * options.batch), CPU)
        F.cross_entropy(model(batch.inputs).flatten(0, 1), batch.targets.flatten()).backward()
        for weight, master in zip(model.parameters(), masters.parameters(), strict=True):
            master.grad, weight.grad = weight.grad, None
        torch.nn.utils.clip_grad_norm_(masters.parameters(), 1.0)
        optimizer.step()
        for index, (shard, weights, new) in enumerate(shards):
            with torch.no_grad():
                shard.spread(None, weights, new, step * len(shards) + index)
        last = step + 1 == options.steps
        if last or (step + 1) % max(1, options.steps // 8) == 0:
            count = options.windows if last else options.windows // 8
            found = evaluate_alone(model, data.validation, count=count, batch=32, device=CPU, precision=nullcontext())
            yield step + 1, found.loss


def build_shards(
    model: nn.Module, masters: nn.Module, arm: Arm
) -> list[tuple[WeightShard, dict[str, Tensor], dict[str, Tensor]]]:
    """For each unit and each wire: how it spreads, the weights, and the masters, by name."""
    levels = build_levels(["world"], [1], [0], rank=0)
    own = {name: parameter.detach() for name, parameter in masters.named_parameters()}
    blocks = find_blocks(model)
    unit_of = {id(p): number for number, block in enumerate(blocks) for p in block.parameters()}
    parts: dict[tuple[int, bool], dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        place = unit_of.get(id(parameter), len(blocks)), arm.chosen(name)
        parts.setdefault(place, {})[name] = parameter.detach()
    shards = []
    for (_, chosen), weights in parts.items():
        ownership = Ownership({name: weight.shape for name, weight in weights.items()}, (1, 1, 1))
        wire = arm.wire if chosen else PlainUpdate()
        shards.append((WeightShard(ownership, levels, Placement(0, 0, 0), wire), weights, {n: own[n] for n in weights}))
    return shards


def draw(curves: dict[tuple[int, str], list[tuple[int, float]]], options: Any) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 5), dpi=120, layout="constrained")
    for label in dict.fromkeys(label for _, label in curves):
        of_seeds = [curve for (_, of), curve in curves.items() if of == label]
        points = [(at[0][0], fmean(loss for _, loss in at)) for at in zip(*of_seeds, strict=True)]
        style = "-" if label.startswith("direct") else "--"
        axes.plot(*zip(*points, strict=True), style, marker="o", label=label)
    axes.set_xlabel("steps")
    axes.set_ylabel("validation loss, nats per byte")
    axes.set_title(f"what the update wire carries; seeds: {len(options.seeds)}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    options.plot.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.plot)


if __name__ == "__main__":
    main()
