"""Question: what share of a step does balancing over the global batch cost on links with 50 ms delay?

    python benchmarks/balance_overhead.py [--delay 50ms] [--gradients none int4] [--json FILE] [--plot FILE]

Emulated hosts, by default one for each core of a two-core machine, train a GPT with experts; the ways to balance take
turns in blocks of steps within one run, so that whatever else the machine does hits all alike, and each block is
compared with others of its round: the one without balancing, and the one that balances by itself. Gradients are
exchanged in 4 bits, or not at all, as in the local steps of DiLoCo: then nothing but the counts crosses the links, and
nothing hides what they cost.

The ways: none; micro, the loss of each micro-batch alone, which computes as much and sends nothing; stale; late, with
all forward passes of a step first, which is exact; sync, the paper's buffer; and a wait in every layer, by thinwire's
exchange of one latency or by torch's all-reduce. Of each: messages per step, in an evaluation, and in a step whose
blocks are recomputed; the time for which counts were waited for, on the host that waited least, since the others also
wait for slower hosts; the processor's time of a step, all hosts together, against that without balancing; and how much
longer a step takes than without balancing, and than with micro's: medians over rounds, each with its 95 % interval
(bootstrap). The last is what balancing over all hosts adds to a loss that is computed anyhow. More hosts than cores
disturb one another: unlike micro's, stale's hosts may not drift apart by more than a step, and share cores unevenly.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from runner import Row, arguments, report

from thinwire.comm.units import parse_delay, parse_rate
from thinwire.launch.lab import Lab

HOST = Path(__file__).resolve().parent / "balance_overhead_host.py"
BASE = "none"
MICRO = "micro"
# In how many rounds each takes part: one of so many; SELDOM in one of --seldom.
OFTEN = {BASE: 1, "stale": 1, MICRO: 1}
SELDOM = ("late, forwards first", "sync", "every layer, one latency", "every layer, all-reduce")
MODEL = {
    "kind": "moe",
    "layers": 4,
    "heads": 4,
    "width": 256,
    "context": 256,
    "experts": 16,
    "top_k": 2,
    "expert_width": 256,
}


def main() -> None:
    parser = arguments(str(__doc__).splitlines()[0])
    parser.set_defaults(device="cpu", repeats=3)
    parser.add_argument("--hosts", type=int, default=2, help="emulated on this machine; no more than it has cores")
    parser.add_argument("--rate", default="100mbit")
    parser.add_argument("--delay", default="50ms", help="one way")
    parser.add_argument("--gradients", nargs="+", default=["none", "int4"], choices=["none", "int4"])
    parser.add_argument(
        "--rounds", type=int, nargs="+", default=[40, 10], help="blocks of steps, for each of --gradients"
    )
    parser.add_argument("--seldom", type=int, default=8, help="rounds from one block of the slow ways to the next")
    parser.add_argument("--micro-batches", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4, help="sequences of a micro-batch on a host")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the table there")
    options = parser.parse_args()
    if len(options.rounds) < len(options.gradients):
        parser.error(f"--rounds: {len(options.rounds)} given for {len(options.gradients)} kinds of --gradients")
    rows: list[Row] = []
    for gradients, rounds in zip(options.gradients, options.rounds, strict=False):
        rows.extend(compare(gradients, rounds, options))
        report(str(__doc__).splitlines()[0], rows, device=torch.device("cpu"), path=options.json)
    if options.plot:
        draw(rows, options)


def compare(gradients: str, rounds: int, options: Any) -> list[Row]:
    settings = {
        "gradients": gradients,
        "ways": OFTEN | dict.fromkeys(SELDOM, options.seldom),
        "rounds": rounds,
        "steps": options.repeats,
        "micro_batches": options.micro_batches,
        "batch": options.batch,
        "model": MODEL,
    }
    told = run(settings, options)
    return [row(way, gradients, told, options) for way in settings["ways"]]


def run(settings: dict[str, Any], options: Any) -> list[dict[str, Any]]:
    """What each rank wrote."""
    with tempfile.TemporaryDirectory() as folder:
        rate_bps, delay_s = parse_rate(options.rate), parse_delay(options.delay)
        with Lab(hosts=options.hosts, rate_bps=rate_bps, delay_s=delay_s) as lab:
            command = [sys.executable, str(HOST), folder, json.dumps(settings)]
            code = lab.start(command, output="all").wait()
        if code:
            raise SystemExit(f"{settings} failed with exit code {code}")
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(options.hosts)]


def row(way: str, gradients: str, told: Sequence[dict[str, Any]], options: Any) -> Row:
    """The step of a block is the slowest host's, and what was waited that of the host which waited least."""
    step_s, worked_s = slowest(told, way), together(told, way)
    longer, more = beyond(step_s, slowest(told, BASE)), beyond(worked_s, together(told, BASE))
    than_micro = beyond(step_s, slowest(told, MICRO))
    low, high = interval(longer)
    least, most = interval(more)
    from_micro, to_micro = interval(than_micro)
    mine = [rank[way] for rank in told]
    blocks = [block for rank in mine for block in rank["blocks"]]
    (messages,) = {block["messages"] for block in blocks}
    (sent,) = {block["sent_bytes"] for block in blocks}
    assert mine[0]["predicted_bytes"] in (None, sent), f"{way}: {sent} bytes metered, not {mine[0]['predicted_bytes']}"
    waited_s = [min(rank["blocks"][number]["waited_s"] for rank in mine) for number in range(len(step_s))]
    return {
        "gradients": gradients,
        "balancing": way,
        "messages": int(messages),
        "in eval": sum(rank["messages_in_eval"] for rank in mine),
        "recomputed": mine[0]["messages_recomputed"],
        "payload bytes": int(sent) if sent or not messages else "not metered",
        "step_ms": 1e3 * statistics.median(step_s.values()),
        "waited_ms": 1e3 * statistics.median(waited_s),
        "waited share": statistics.median(waited_s) / statistics.median(step_s.values()),
        "more work": statistics.median(more),
        "work from": least,
        "work to": most,
        "longer": statistics.median(longer),
        "from": low,
        "to": high,
        "than micro": statistics.median(than_micro),
        "micro from": from_micro,
        "micro to": to_micro,
        "blocks": len(longer),
        "delay": options.delay,
    }


def slowest(told: Sequence[dict[str, Any]], way: str) -> dict[int, float]:
    """Seconds per step of the slowest host, by round."""
    blocks = zip(*(rank[way]["blocks"] for rank in told), strict=True)
    return {of_all[0]["round"]: max(block["step_s"] for block in of_all) for of_all in blocks}


def together(told: Sequence[dict[str, Any]], way: str) -> dict[int, float]:
    """The processor's seconds per step, of all hosts, by round."""
    blocks = zip(*(rank[way]["blocks"] for rank in told), strict=True)
    return {of_all[0]["round"]: sum(block["worked_s"] for block in of_all) for of_all in blocks}


def beyond(step_s: dict[int, float], base_s: dict[int, float]) -> list[float]:
    """By what share a step is longer, in each round that has both."""
    return [seconds / base_s[turn] - 1 for turn, seconds in step_s.items() if turn in base_s]


def interval(values: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """Of the median, 95 %, by drawing from the values anew."""
    chance = random.Random(0)
    medians = sorted(statistics.median(chance.choices(values, k=len(values))) for _ in range(draws))
    return medians[int(0.025 * draws)], medians[int(0.975 * draws) - 1]


def draw(rows: Sequence[Row], options: Any) -> None:
    """Bars: a step's time, of which the red part is waited for counts."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(options.gradients), figsize=(11, 3.6), dpi=120, layout="constrained")
    titles = {"none": "no gradient exchange (local steps)", "int4": "gradients in 4 bits"}
    for axes, gradients in zip(panels if len(options.gradients) > 1 else [panels], options.gradients, strict=True):
        shown = [r for r in rows if r["gradients"] == gradients][::-1]
        seconds = [float(r["step_ms"]) / 1e3 for r in shown]
        waited = [float(r["waited_ms"]) / 1e3 for r in shown]
        labels = [str(r["balancing"]) for r in shown]
        axes.barh(
            labels, [a - b for a, b in zip(seconds, waited, strict=True)], color="#4477aa", label="the step itself"
        )
        axes.barh(
            labels,
            waited,
            left=[a - b for a, b in zip(seconds, waited, strict=True)],
            color="#cc4455",
            label="waiting for counts",
        )
        for place, (r, length) in enumerate(zip(shown, seconds, strict=True)):
            text = "" if r["balancing"] == BASE else f"{float(r['longer']):+.1%}, "
            sent = f"{r['messages']} message{'' if r['messages'] == 1 else 's'}"
            axes.text(length, place, f" {text}{sent}", va="center", fontsize=8)
        axes.set_xlim(0, 1.6 * max(seconds))
        axes.set_xlabel("seconds per step")
        axes.set_title(titles[gradients], fontsize=10)
        axes.legend(loc="upper right", fontsize=8)
    figure.suptitle(
        f"{options.hosts} hosts, {options.rate}, {options.delay} one way: a step with experts balanced over all hosts",
        fontsize=11,
    )
    figure.savefig(options.plot)
    plt.close(figure)


if __name__ == "__main__":
    main()
