"""Claim: a round of onebyte stays cheap as machines join: time to apply 8 to 512 slopes, and bytes for each machine.

    python benchmarks/onebyte_scale.py [--rounds 5000] [--json FILE]

Two tables; with --json the second goes to FILE with `_bytes` before its suffix.

The first: rounds of so many machines with one slope each, applied to the 3 M GPT by Replica.apply(), each round the
next one: reading the bytes, drawing what is random, and the passes over the weights. Along directions of their own,
along one that all share, and within a subspace of rank 32 that every round renews.

The second: 64 machines with one slope each. All their schedules run in this process, every message is carried from one
to the other, and its bytes are counted; all must know all slopes at the end of a round. `latencies` follow one another
in a round; with `hops: 1` a step waits for one of them alone. `rounds_for_400_KB`: in how many rounds a machine sends
as much as SeedFlood (2602.18181) publishes for a whole run; how long its runs are, and whether that counts a machine's
bytes or an edge's, is not in what we could read of it. A message of 8 bytes, a 32-bit seed and an fp32 slope, stands
for its kind beside ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from runner import Row, arguments, measure, report

from thinwire.comm.onebyte.flood import Flood
from thinwire.comm.onebyte.graph import GraphName, neighbours
from thinwire.comm.onebyte.optimizer import OneByteSPSA
from thinwire.comm.onebyte.rounds import Contribution, Round
from thinwire.dist.models.gpt import GPT, GPTSettings

CONTRIBUTIONS = (8, 64, 512)
KINDS = ("distinct", "shared", "subspace")
RATE = 2.0**-10  # so large that hardly a coefficient is rounded to 0, which would cost nothing
VOCABULARY = 96
MACHINES = 64
PUBLISHED_BYTES = 400_000
ROUNDS = 5
GRAPHS: Sequence[tuple[str, GraphName | None, bool, int]] = (  # name, graph, redundant, bytes of a message
    ("all-gather", None, False, 1),
    ("ring", "ring", False, 1),
    ("ring, redundant", "ring", True, 1),
    ("mesh 8 x 8", "mesh", False, 1),
    ("mesh 8 x 8, redundant", "mesh", True, 1),
    ("torus 8 x 8", "torus", False, 1),
    ("hypercube", "hypercube", False, 1),
    ("ring, redundant, 8-byte messages", "ring", True, 8),
    ("mesh 8 x 8, redundant, 8-byte messages", "mesh", True, 8),
)


def main() -> None:
    parser = arguments(str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5000, help="of a run, for its bytes")
    parser.set_defaults(repeats=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    rows = [row for count in CONTRIBUTIONS for row in time_rounds(count, device, options.repeats)]
    report(str(__doc__).splitlines()[0], rows, device=device, path=options.json)
    print()
    rows = [count_bytes(*graph, rounds=options.rounds) for graph in GRAPHS]
    path = options.json and options.json.with_stem(f"{options.json.stem}_bytes")
    title = f"Bytes that each of {MACHINES} machines sends; {options.rounds:,} rounds"
    report(title, rows, device=torch.device("cpu"), path=path)


def time_rounds(count: int, device: torch.device, repeats: int) -> list[Row]:
    """Seconds that a round of `count` machines takes to apply, for each kind of direction."""
    appliers = {kind: Applier(kind, count, device) for kind in KINDS}
    works: dict[str, Callable[[], None]] = {kind: applier.apply_next for kind, applier in appliers.items()}
    timing = measure(works, device=torch.device("cpu"), repeats=repeats)  # apply() returns when the device is done
    parameters = appliers["distinct"].parameters
    return [
        {
            "contributions": count,
            "directions": kind,
            "ms": timing[kind].median_s * 1e3,
            "fastest_ms": timing[kind].fastest_s * 1e3,
            "ns_per_parameter": timing[kind].median_s * 1e9 / parameters,
            "ps_per_parameter_and_contribution": timing[kind].median_s * 1e12 / parameters / count,
            "times_distinct": timing["distinct"].median_s / timing[kind].median_s,
        }
        for kind in KINDS
    ]


class Applier:
    """A 3 M GPT to which rounds of `count` machines are applied, one after another."""

    def __init__(self, directions: str, count: int, device: torch.device) -> None:
        model = GPT(GPTSettings(layers=4, heads=8, width=256, context=256), VOCABULARY)
        model.initialise(1)
        model.to(device)
        optimizer = OneByteSPSA(model.named_parameters(), lr=RATE, directions=directions)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self._replica = optimizer.replica
        # Slopes between 0.5 and 2 of either sign, in eighths of an octave.
        codes = torch.randint(56, 72, (count,), generator=torch.Generator().manual_seed(count))
        signs = torch.arange(count) % 2 * 128
        self._contributions = tuple(
            Contribution(slot, bytes([code])) for slot, code in enumerate((codes + signs).tolist())
        )

    def apply_next(self) -> None:
        """Apply one round more."""
        self._replica.apply([Round(self._replica.rounds, RATE, self._contributions)])


def count_bytes(name: str, graph: GraphName | None, redundant: bool, message_bytes: int, *, rounds: int) -> Row:
    """Carry the messages of some rounds between all machines, and count them. None: a graph of all with all."""
    sides = neighbours(graph, MACHINES) if graph else [[b for b in range(MACHINES) if b != a] for a in range(MACHINES)]
    machines = [Flood(rank, sides, message_bytes, None, redundant=redundant) for rank in range(MACHINES)]
    sent = [0] * MACHINES
    for number in range(ROUNDS):
        codes = torch.randint(256, (MACHINES, message_bytes), generator=torch.Generator().manual_seed(number))
        carry(machines, codes.to(torch.uint8), sent)
    mean, most = sum(sent) / MACHINES / ROUNDS, max(sent) / ROUNDS
    return {
        "exchange": name,
        "neighbours": max(map(len, sides)),
        "latencies": machines[0].diameter,
        "bytes_per_round": mean,
        "most_of_a_machine": most,
        "KB_per_run": mean * rounds / 1e3,
        "rounds_for_400_KB": int(PUBLISHED_BYTES / mean),
    }


def carry(machines: Sequence[Flood], codes: torch.Tensor, sent: list[int]) -> None:
    """One round of all machines; adds what each sends to `sent`."""
    for machine, own in zip(machines, codes, strict=True):
        machine.begin(own)
    for hop in range(machines[0].hops):
        parcels = [machine.send(hop).split(machine.splits(hop)[0]) for machine in machines]
        for rank, machine in enumerate(machines):
            arrived = [parcels[sender][rank] for sender in range(len(machines))]
            sent[rank] += sum(parcel.nbytes for parcel in parcels[rank])
            machine.receive(hop, torch.cat(arrived))
    if not all(torch.equal(machine.complete(), codes) for machine in machines):
        raise SystemExit("a machine lacks slopes of another: nothing is reported")


if __name__ == "__main__":
    main()
