"""Claim: experts keep to domains when the loss balances the global batch, not when it balances each micro-batch.

    python benchmarks/balance_specialisation.py [--ways micro global] [--seeds 0 1 2] [--json FILE] [--plot FILE]

Qiu et al. 2025 (2501.11873) in small. A byte-level GPT of two blocks, 16 experts, of which a token selects 2, learns
text of several domains (dist/domains.py) in steps of 16 micro-batches of 2 x 128 bytes, each of one domain that is
drawn. The ways differ only in what the experts' shares f are counted over:

    micro    the micro-batch itself, as most frameworks do
    node     4 micro-batches, as if one node computed them
    global   all 16: LoadBalance(mode="late"), all forward passes first
    stale    the 16 of the step before: one message that nobody waits for
    ema      a moving average of past steps
    shuffle  as many tokens as a micro-batch has, drawn from all 16: the paper's ablation. If diversity is what counts,
             not the number of tokens, it does as well as global
    bias     no loss; biases by the sign of the global load (Wang et al. 2024, 2408.15664)

What is scored is text that was kept back: I(expert; domain) / H(domain) of each layer, the sum of the gate's scores of
the selected experts (0.125 = does not choose), nats per byte; and MaxVio of the last quarter's training batches and
micro-batches. Base64 and decimal vectors, whose bytes differ most from the rest, make up much of the specialisation.
The loss is printed with its spread over seeds; a model this small is no evidence about it, see the paper for that.

Runs that are in FILE already are not repeated.
"""

from __future__ import annotations

import json
import os
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from balance_specialisation_run import WAYS, run
from runner import Row, arguments, machine, report

CLAIM = str(__doc__).splitlines()[0]
CPU = torch.device("cpu")
# What must come apart: the block where domains show most, the last one.
SEPARATE = ("global", "stale")


def main() -> None:
    parser = arguments(CLAIM)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS, metavar="WAY")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="runs at a time, of one thread each")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the scores there, and the experts' use beside")
    options = parser.parse_args()
    runs = all_runs(options)
    report(CLAIM, table(runs), device=CPU, path=None)
    print(verdict(runs))
    if options.plot:
        from balance_specialisation_plot import draw_scores, draw_use

        draw_scores(runs, options.plot)
        draw_use(runs, options.plot.with_name(f"{options.plot.stem}_experts{options.plot.suffix}"))


def all_runs(options: Namespace) -> list[dict[str, Any]]:
    """Those that the JSON file has, and those that are still missing; each is written there when it is done."""
    path: Path | None = options.json
    done: list[dict[str, Any]] = json.loads(path.read_text())["runs"] if path and path.exists() else []
    other = {made["steps"] for made in done} - {options.steps}
    if other:
        raise SystemExit(f"--steps {options.steps}: {path} has runs of {other} steps; give that, or another --json")
    have = {(made["way"], made["seed"]) for made in done}
    wanted = [(way, seed) for seed in options.seeds for way in options.ways if (way, seed) not in have]
    began = time.monotonic()
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for future in as_completed([pool.submit(run, way, seed, options.steps) for way, seed in wanted]):
            made = future.result()
            done.append(made)
            done.sort(key=lambda made: (WAYS.index(made["way"]), made["seed"]))
            passed_s = time.monotonic() - began
            print(f"{passed_s:6.0f} s  {made['way']} {made['seed']}  {made['by_layer']['specialisation']}", flush=True)
            if path:
                write(done, path)
    return done


def write(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    content = {"claim": CLAIM, "machine": machine(CPU), "verdict": verdict(runs), "rows": table(runs)}
    of_runs = ",\n    ".join(json.dumps(made) for made in runs)  # a line each: they hold long tables
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(f'{json.dumps(content, indent=2)[:-2]},\n  "runs": [\n    {of_runs}\n  ]\n}}\n')
    os.replace(unfinished, path)


def table(runs: Sequence[Mapping[str, Any]]) -> list[Row]:
    """One row for each way: means over seeds, with the least and the greatest where they matter."""
    rows: list[Row] = []
    for way in WAYS:
        of_way = [made for made in runs if made["way"] == way]
        if not of_way:
            continue
        last = [made["by_layer"]["specialisation"][-1] for made in of_way]
        loss = [made["val_loss"] for made in of_way]
        rows.append(
            {
                "f counted over": way,
                "seeds": len(of_way),
                "MI/H block 1": mean(made["by_layer"]["specialisation"][0] for made in of_way),
                "MI/H block 2": mean(last),
                "least, greatest": f"{min(last):.3f}, {max(last):.3f}",
                "top-k score": mean(made["by_layer"]["top_k_score"][-1] for made in of_way),
                "max share": mean(made["by_layer"]["max_frequency"][-1] for made in of_way),
                "overlap": mean(made["by_layer"]["overlap"][-1] for made in of_way),
                "nats/byte": f"{mean(loss):.3f}",
                "least, greatest nats": f"{min(loss):.3f}, {max(loss):.3f}",
                "MaxVio batch": mean(made["batch_max_violation"] for made in of_way),
                "MaxVio unit": mean(made["unit_max_violation"] for made in of_way),
            }
        )
    return [
        {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()} for row in rows
    ]


def verdict(runs: Sequence[Mapping[str, Any]]) -> str:
    """Whether each of SEPARATE is above micro on every seed, whichever seed of micro it is compared with."""
    last = {way: [m["by_layer"]["specialisation"][-1] for m in runs if m["way"] == way] for way in WAYS}
    if not all(last[way] for way in ("micro", *SEPARATE)):
        return "not all ways were run"
    lowest, highest = min(min(last[way]) for way in SEPARATE), max(last["micro"])
    apart = "every" if lowest > highest else "NOT every"
    return f"global and stale are above micro on {apart} seed: their lowest {lowest:.3f}, micro's highest {highest:.3f}"


if __name__ == "__main__":
    main()
