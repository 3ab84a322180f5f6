"""Claim: what crosses the slow link in a step is what the formula says, whatever the number of micro-batches.

    python benchmarks/partition_bytes.py [--hosts 2 4] [--micro-batches 1 2 4 8] [--json FILE] [--plot FILE]

Trains a GPT in the lab, hosts of two ranks joined at 100 Mbit/s, sharded in several ways, and counts what a host sends
to the others in a step. `metered`: payload bytes by thinwire's meter, which must be those predicted, to the byte.
`formula`: parameters x (1 - 1/hosts) x bytes per value, once for gradients and once for weights; `off`, the share that
metered differs by (blocks that are not full, and planes filled up to 16 bytes). `interface`: what the network interface
counted, headers, acknowledgements and barriers included. All are also in copies: in units of 2 bytes per
parameter x (1 - 1/hosts), in which ZeRO-3 in 16 bits sends 3 for every micro-batch at best.

ZeRO++ needs CUDA, so it is here by formula: int8 weights once, int4 gradients for every micro-batch, without scales:
0.5 + 0.25 k copies. FSDP2 and HSDP are torch's own in fp32 on gloo, which has no hierarchy and whose reduce-scatter
sends twice what it must; `ZeRO-3, 16 bits` is what the best implementation would send.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from partition_lab import Machine, per_host, run
from runner import Row, arguments, report

from thinwire.comm.units import parse_rate
from thinwire.dist.models import build_model
from thinwire.dist.models.gpt import GPTSettings

TRIPLE = {"params": "node", "grads": "node", "optim": "world"}
THIN = {**TRIPLE, "update": "difference", "gradients": {"world": "int4"}}
WAYS: Mapping[str, dict[str, Any]] = {
    "thinwire, 4 bits": {"way": "partition", "partition": THIN},
    "thinwire, fp32": {"way": "partition", "partition": TRIPLE},
    "FSDP2, fp32": {"way": "fsdp2"},
    "HSDP, fp32": {"way": "hsdp"},
}
BITS = {  # of a parameter's gradient and weight on their way between hosts, scales included
    "thinwire, 4 bits": (4 + 32 / 128) + (4 + 32 / 2048),
    "thinwire, fp32": 32 + 32,
}
STEPS = 3
COLOURS = ("tab:blue", "tab:cyan", "tab:red", "tab:orange", "tab:grey", "black")


def main() -> None:
    parser = arguments(str(__doc__).splitlines()[0])
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rate", default="100mbit")
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--only", nargs="*", help="ways whose label contains one of these")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw copies against micro-batches there")
    options = parser.parse_args()
    shape = {"layers": options.layers, "heads": 4, "width": options.width, "context": 32}
    rows: list[Row] = []
    for hosts in options.hosts:
        ranks = hosts * 2
        machine = Machine(hosts, 2, parse_rate(options.rate), (("node", 2), ("world", ranks)))
        unit = 2 * numel(shape) * (1 - 1 / hosts)
        for label, way in WAYS.items():
            if options.only and not any(part in label for part in options.only):
                continue
            for count in options.micro_batches:
                settings = {"model": shape, "batch": 1, "micro_batches": count, "steps": STEPS, **way}
                rows.append(row(label, machine, count, unit, run(machine, settings)))
        for count in options.micro_batches:
            for label, copies in (("ZeRO++ (formula)", 0.5 + 0.25 * count), ("ZeRO-3, 16 bits (formula)", 3.0 * count)):
                rows.append(formula(label, hosts, count, copies, unit))
        compare_last(rows, hosts, max(options.micro_batches))
        report(str(__doc__).splitlines()[0], rows, device=torch.device("cpu"), path=options.json)
    if options.plot:
        draw(rows, options)


def numel(shape: Mapping[str, Any]) -> int:
    model = build_model(GPTSettings.model_validate(shape), tokenizer_vocab=256, seed=0, device=torch.device("meta"))
    return sum(parameter.numel() for parameter in model.parameters())


def row(label: str, machine: Machine, count: int, unit: float, ranks: list[dict[str, Any]]) -> Row:
    """Of the host that sends most in the last step.

    Raises: SystemExit where a rank has sent other bytes than it predicted.
    """
    interface = max(rank["interface_sent_bytes"][-1] for rank in ranks)
    found: dict[str, str | int | float] = {"hosts": machine.hosts, "way": label, "micro-batches": count}
    if "predicted" in ranks[0]:
        for rank in ranks:
            if any(sent != rank["predicted"] for sent in rank["meter"]):
                raise SystemExit(f"{label}: metered {rank['meter']}, but predicted {rank['predicted']}")
        metered = per_host(machine, [rank["meter"][-1].get("world", 0) for rank in ranks])
        expected = unit * BITS[label] / 16
        off = max(abs(sent / expected - 1) for sent in metered)
        found |= {"metered": int(max(metered)), "formula": int(expected), "off": f"{off:.3%}"}
        copies = max(metered) / unit
    else:
        found |= {"metered": "-", "formula": "-", "off": "-"}
        copies = interface / unit
    return {**found, "interface": interface, "copies": copies, "copies, interface": interface / unit}


def formula(label: str, hosts: int, count: int, copies: float, unit: float) -> Row:
    return {
        "hosts": hosts,
        "way": label,
        "micro-batches": count,
        "metered": "-",
        "formula": int(copies * unit),
        "off": "-",
        "interface": "-",
        "copies": copies,
        "copies, interface": "-",
    }


def compare_last(rows: list[Row], hosts: int, count: int) -> None:
    """How many times fewer bytes than the others thinwire sends with the most micro-batches."""
    last = {str(row["way"]): row for row in rows if row["hosts"] == hosts and row["micro-batches"] == count}
    if "thinwire, 4 bits" not in last:
        return
    mine = float(last["thinwire, 4 bits"]["copies"])
    for way, other in last.items():
        print(f"{hosts} hosts, {count} micro-batches: {way} sends {float(other['copies']) / mine:.2f} times as much")


def draw(rows: list[Row], options: Any) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1, len(options.hosts), figsize=(6 * len(options.hosts), 4.5), dpi=120, layout="constrained", squeeze=False
    )
    for axes, hosts in zip(panels[0], options.hosts, strict=True):
        ways = dict.fromkeys(str(row["way"]) for row in rows)
        for colour, way in zip(COLOURS, ways, strict=False):
            points = [
                (row["micro-batches"], row["copies"]) for row in rows if (row["hosts"], row["way"]) == (hosts, way)
            ]
            style = ":" if "formula" in way else "-"
            axes.plot(*zip(*points, strict=True), style, marker="o", label=way, color=colour)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(options.micro_batches, [str(count) for count in options.micro_batches])
        axes.set_xlabel("micro-batches in a step")
        axes.set_ylabel("sent by a host in a step, in 16-bit copies x (1 - 1/hosts)")
        axes.set_title(f"{hosts} hosts x 2 ranks")
        axes.grid(alpha=0.3, which="both")
    panels[0][0].legend(fontsize=8)
    options.plot.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.plot)


if __name__ == "__main__":
    main()
