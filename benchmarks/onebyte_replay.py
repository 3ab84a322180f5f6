"""Claim: who joins a one-byte run after 10,000 rounds replays its log far faster than by an axpy for each seed.

    python benchmarks/onebyte_replay.py [--rounds 10000] [--stepped 500] [--seeds 20] [--json FILE]

A log of the 3 M GPT's weights, whose slopes are drawn at random, is replayed: many rounds in each pass over the
weights, and one in each (`stepped_s`, measured for the first rounds and scaled to all). Beside it, what eager PyTorch
takes for as many directions, each a torch.randn and an add_ per tensor (`eager_s`, measured for a few and scaled).
`equal`: fused and stepped weights have the same SHA-256 after the rounds that were stepped. All may use the same number
of threads; PyTorch's generator on the CPU uses one.
"""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path

import torch
from runner import Row, arguments, report
from torch import Tensor

from thinwire.comm.onebyte.canonical import canonical, describe_run
from thinwire.comm.onebyte.log import Log
from thinwire.comm.onebyte.replay import replay
from thinwire.comm.onebyte.rounds import Contribution, Member, Roster, Round
from thinwire.comm.onebyte.settings import OneByteSettings
from thinwire.dist.models.gpt import GPT, GPTSettings

CASES = [(4, 1), (8, 4)]  # (machines, samples of each per round)
RATE = 1e-6


def main() -> None:
    parser = arguments(str(__doc__).splitlines()[0])
    parser.set_defaults(device="cpu", repeats=1)
    parser.add_argument("--rounds", type=int, default=10_000, help="rounds in the log")
    parser.add_argument("--stepped", type=int, default=500, help="rounds that are also carried out one by one")
    parser.add_argument("--seeds", type=int, default=20, help="directions that eager PyTorch is timed for")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    base = base_of_gpt(device)
    rows = [measure_case(base, *case, options.rounds, options.stepped, options.seeds) for case in CASES]
    report(str(__doc__).splitlines()[0], rows, device=device, path=options.json)


def base_of_gpt(device: torch.device) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = GPT(GPTSettings(layers=4, heads=8, width=256, context=256), vocab=256)
    return {name: parameter.detach().to(device) for name, parameter in model.named_parameters()}


def measure_case(base: dict[str, Tensor], machines: int, samples: int, rounds: int, stepped: int, seeds: int) -> Row:
    contributions = rounds * machines * samples
    first = min(stepped, rounds)
    with (
        tempfile.TemporaryDirectory() as folder,
        write_log(Path(folder) / "run.log", base, machines, samples, rounds) as log,
    ):
        replay(log, base, until=1)  # compiles
        began = time.perf_counter()
        replay(log, base)
        fused_s = time.perf_counter() - began
        began = time.perf_counter()
        by_step = replay(log, base, until=first, step_by_step=True)
        stepped_s = (time.perf_counter() - began) * rounds / first
        equal = by_step.model_hash == replay(log, base, until=first).model_hash
        size, header = log.size_bytes, log.size_bytes - len(log.raw(0))
    eager_s = seconds_of_eager(base, seeds) * contributions / seeds
    weights = sum(tensor.numel() for tensor in base.values())
    return {
        "machines": machines,
        "samples": samples,
        "rounds": rounds,
        "log_bytes": size,
        "header": header,
        "bytes_per_round": (size - header) / rounds,
        "model_bytes": 4 * weights,
        "fused_s": fused_s,
        "stepped_s": stepped_s,
        "eager_s": eager_s,
        "stepped/fused": stepped_s / fused_s,
        "eager/fused": eager_s / fused_s,
        "ns_per_weight_and_seed": 1e9 * fused_s / weights / contributions,
        "stepped_rounds": first,
        "eager_seeds": seeds,
        "equal": str(equal),
    }


def write_log(path: Path, base: dict[str, Tensor], machines: int, samples: int, rounds: int) -> Log:
    settings = OneByteSettings(lr=RATE, samples=samples)
    group = {
        "param_names": list(base),
        "params": [tensor.clone().requires_grad_() for tensor in base.values()],
        "lr": settings.lr,
        "eps": settings.eps,
        "weight_decay": 0.0,
    }
    log = Log.create(path, describe_run(canonical([group]), settings).to_bytes())
    log.append(Roster(0, tuple(Member(slot, f"machine{slot}", "", samples) for slot in range(machines))))
    chance = random.Random(0)
    rate = float(torch.tensor(RATE))
    for number in range(rounds):
        # Slopes of up to 4, as many up as down.
        codes = (bytes(chance.randrange(80) | chance.choice((0, 128)) for _ in range(samples)) for _ in range(machines))
        log.append(Round(number, rate, tuple(Contribution(slot, row) for slot, row in enumerate(codes))))
    return log


@torch.no_grad()
def seconds_of_eager(base: dict[str, Tensor], seeds: int) -> float:
    """Seconds for `seeds` directions, each drawn by torch.randn and added, tensor by tensor."""
    weights = [tensor.clone() for tensor in base.values()]
    for timed in (1, seeds):  # the first touches the memory
        began = time.perf_counter()
        for seed in range(timed):
            generator = torch.Generator(weights[0].device).manual_seed(seed)
            for tensor in weights:
                tensor.add_(torch.randn(tensor.shape, generator=generator, device=tensor.device), alpha=1e-6)
        if weights[0].is_cuda:
            torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
