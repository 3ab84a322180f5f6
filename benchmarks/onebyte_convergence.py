"""Claim: a byte for each slope costs 0.1 % of the final loss at most, and two liars of eight machines under 10 %.

    python benchmarks/onebyte_convergence.py [--rounds 3000] [--seeds 3] [--json FILE]

Logistic regression with 512 weights, whose machines have data of their own; `loss` is that of all data. Each run is
carried out by one process through the run's own code: the slots of all machines, their bytes, one replica. The first
rows train each seed with the byte, and with the slope itself, as an fp32 number, in its place: the same directions and
learning rate, on the same grid. The next ones choose their step size from the committed slopes. In the last, two
machines tell -10 times what they measure; a run whose weights leave their grid ends there. `over_percent`: how far the
loss is above that of the fp32 slopes, of the fixed step size, or of eight honest machines that are averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from runner import Row, arguments, report
from torch import Tensor

from thinwire.comm.onebyte.byte_code import ByteCode
from thinwire.comm.onebyte.canonical import canonical, describe_run
from thinwire.comm.onebyte.errors import WeightRangeError
from thinwire.comm.onebyte.exchange import Turn
from thinwire.comm.onebyte.measure import measure
from thinwire.comm.onebyte.replica import Replica
from thinwire.comm.onebyte.rounds import Contribution, Round
from thinwire.comm.onebyte.settings import OneByteSettings

WIDTH = 512
EXAMPLES = 1024  # of each machine
BATCH = 128
FEATURE_SIZE = 32.0  # so that weights are small, as those of networks are
RATE = 2.0**-9
STEP_SIZES = {"fixed": RATE, "std": 2.0**-9, "ema": 2.0**-9}
ATTACK = -10.0


def main() -> None:
    parser = arguments(str(__doc__).splitlines()[0])
    parser.set_defaults(device="cpu", threads=1)
    parser.add_argument("--rounds", type=int, default=3000, help="of four machines; two thirds as many of eight")
    parser.add_argument("--seeds", type=int, default=3, help="data sets and streams")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [
        *(row for seed in range(options.seeds) for row in byte_against_exact(seed, options.rounds)),
        *step_sizes(options.rounds),
        *liars(options.rounds * 2 // 3),
    ]
    report(str(__doc__).splitlines()[0], rows, device=torch.device(options.device), path=options.json)


def byte_against_exact(seed: int, rounds: int) -> list[Row]:
    task = Task(seed, machines=4)
    exact = train(task, rounds, seed=seed, code=ExactCode())
    byte = train(task, rounds, seed=seed)
    return [
        row("fp32 slopes", seed, rounds, task, exact, exact),
        row("a byte", seed, rounds, task, byte, exact),
    ]


def step_sizes(rounds: int) -> list[Row]:
    task = Task(0, machines=4)
    losses = {kind: train(task, rounds, step_size=kind, lr=rate) for kind, rate in STEP_SIZES.items()}
    fixed = losses["fixed"]
    return [
        row(f"step_size: {kind}, lr {STEP_SIZES[kind]:g}", 0, rounds, task, loss, fixed)
        for kind, loss in losses.items()
    ]


def liars(rounds: int) -> list[Row]:
    task, rows = Task(0, machines=8), []
    for directions, robusts in (("distinct", ("none", "clip", "drop")), ("shared", ("none", "median"))):
        honest = train(task, rounds, lr=RATE / 2, directions=directions)
        rows.append(row(f"{directions} directions, 8 honest", 0, rounds, task, honest, honest))
        for robust in robusts:
            loss = train(task, rounds, lr=RATE / 2, lying=(2, 5), directions=directions, robust=robust)
            rows.append(row(f"{directions}, 2 of 8 lie, robust: {robust}", 0, rounds, task, loss, honest))
    return rows


def row(case: str, seed: int, rounds: int, task: Task, loss: float, against: float) -> Row:
    return {
        "case": case,
        "machines": task.machines,
        "rounds": rounds,
        "seed": seed,
        "start": task.start,
        "loss": loss,
        "over_percent": 100 * (loss / against - 1),
    }


class Task:
    """Labels of a linear rule with noise; the machines' features and labels, and the loss at which training starts."""

    def __init__(self, seed: int, machines: int) -> None:
        generator = torch.Generator().manual_seed(1000 + seed)
        self.machines = machines
        x = torch.randn(machines, EXAMPLES, WIDTH, generator=generator, dtype=torch.float64)
        self.features = x * (FEATURE_SIZE / WIDTH**0.5)
        rule = torch.randn(WIDTH, generator=generator, dtype=torch.float64) / FEATURE_SIZE
        chance = torch.rand(machines, EXAMPLES, generator=generator, dtype=torch.float64)
        self.labels = 2.0 * (chance < torch.sigmoid(self.features @ rule)) - 1.0
        self.start = self.loss(torch.zeros(WIDTH))

    def loss(self, weights: Tensor) -> float:
        """Of all data."""
        return float(F.softplus(-self.labels * (self.features @ weights.double())).mean())

    def batch_loss(self, weights: Tensor, turn: Turn) -> Tensor:
        """Of the batch of a machine in a round."""
        first = turn.round * BATCH % EXAMPLES
        x = self.features[turn.slot, first : first + BATCH]
        return F.softplus(-self.labels[turn.slot, first : first + BATCH] * (x @ weights.double())).mean()


class ExactCode(ByteCode):
    """In the place of the byte: slopes as fp32 numbers, whose codes are numbers beyond those of bytes."""

    def __init__(self) -> None:
        super().__init__(0)
        self.known = list(self.values)
        self.values = cast("Any", self.known)

    def encode(self, slope: float) -> int:
        self.known.append(float(torch.tensor(slope, dtype=torch.float32)))
        return len(self.known) - 1


@dataclass
class Machine:
    """One of the machines. factor: what it multiplies its slopes by."""

    slot: int
    factor: float

    def codes(self, slopes: Sequence[float], code: ByteCode) -> bytes:
        told = [code.encode(self.factor * slope) for slope in slopes]
        return bytes(told) if max(told) < 256 else cast("Any", tuple(told))


@torch.no_grad()
def train(
    task: Task,
    rounds: int,
    *,
    seed: int = 0,
    lr: float = RATE,
    code: ByteCode | None = None,
    lying: Sequence[int] = (),
    **options: Any,
) -> float:
    """Returns the loss of all data after so many rounds from weights of zero, or where the weights leave their grid."""
    settings = OneByteSettings(lr=lr, seed=seed, **options)
    weights = torch.zeros(WIDTH)
    group = {"params": [weights.clone().requires_grad_()], "param_names": ["weights"], "lr": lr, "weight_decay": 0.0}
    manifest = describe_run(canonical([{**group, "eps": settings.eps}]), settings)
    code = code or ByteCode(manifest.numerics.floor_log2)
    replica = Replica(manifest, [weights], code=code)
    machines = [Machine(slot, ATTACK if slot in lying else 1.0) for slot in range(task.machines)]
    for number in range(rounds):
        contributions = []
        for machine in machines:
            turn = Turn(number, machine.slot, 1)
            _, slopes = measure(lambda turn=turn: task.batch_loss(weights, turn), turn, replica, settings)
            contributions.append(Contribution(machine.slot, machine.codes(slopes, code)))
        try:
            replica.apply([Round(number, lr, tuple(contributions))])
        except WeightRangeError:
            break
    replica.restore()
    return task.loss(weights)


if __name__ == "__main__":
    main()
