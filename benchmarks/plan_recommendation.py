"""Claim: the method that `thinwire plan` would take is within 5 % of the best one measured, at each of six link speeds.

    python benchmarks/plan_recommendation.py [--rates 10gbit 1gbit 300mbit 100mbit 30mbit 10mbit]

How many steps a method needs to the target loss is measured once (time_to_loss.py), whatever the link; steps_factor.py
hands it to the plan, which multiplies by the step that it foretells from a probe of the link, and recommends the method
with the fewest seconds. Here each method's step has been measured at each link too; the regret is what the recommended
one takes longer than the best.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from lab_runs import CONFIGS, LabRuns
from plan_accuracy import KEPT, PROBES, probed
from runner import Row, arguments, report
from steps_factor import told
from time_to_loss import MACHINE, RATES, STEPS, TARGET_SHARE, Result, examine, loss_at
from time_to_loss_ways import DDP, OURS, PEERS, Contender

from thinwire.comm.units import format_rate, parse_rate
from thinwire.dist.config import RunConfig, load_config
from thinwire.dist.plan.cluster import Cluster
from thinwire.dist.plan.compare import compare

ALLOWED = 0.05
SETTINGS = (f"train.steps={STEPS}", "world.threads=1")
WAYS = (Contender("thinwire all-reduce, fp32", trains_as=DDP), *OURS)


def main() -> None:
    parser = arguments(str(__doc__).splitlines()[0])
    parser.set_defaults(device="cpu")
    parser.add_argument("--rates", nargs="+", default=list(RATES), help="link of each host")
    parser.add_argument("--only", nargs="*", help="methods whose label contains one of these, besides fp32")
    parser.add_argument("--keep", type=Path, metavar="FILE", default=KEPT, help="file of the runs that are there")
    parser.add_argument("--probes", type=Path, metavar="FOLDER", default=PROBES, help="where the probes are")
    options = parser.parse_args()
    rates = sorted((parse_rate(rate) for rate in options.rates), reverse=True)
    runs = LabRuns(options.keep)
    dense = runs.get(PEERS[0], MACHINE, STEPS, rates, curve=True)
    if dense.curve is None:
        raise SystemExit(f"{DDP}: {dense.error}")
    target = loss_at(dense.curve, TARGET_SHARE * STEPS)
    ways = [w for w in WAYS if w is WAYS[0] or not options.only or any(part in w.label for part in options.only)]
    results = [examine(runs, way, STEPS, rates, target, dense) for way in ways]
    reached = [result for result in results if math.isfinite(result.steps)]
    rows = [row_of(reached, rate, probed(options.probes, MACHINE, rate)) for rate in rates]
    report(str(__doc__).splitlines()[0], rows, device=torch.device("cpu"), path=options.json, extra={"target": target})
    for result in results:
        if result not in reached:
            print(f"{result.way.label} does not reach the target loss")
    worst = max(float(row["regret"]) for row in rows)
    print(f"\nlargest regret: {worst:.1%}; promised: {ALLOWED:.0%}")


def row_of(results: list[Result], rate_bps: float, cluster: Cluster) -> Row:
    """What the plan takes at this rate, what was best, and what the choice costs."""
    dense_s = results[0].step_s[rate_bps]
    measured = {result.way.label: result.seconds(rate_bps, dense_s) for result in results}
    comparison = compare(load_config(CONFIGS / "demo.yaml", SETTINGS), cluster)
    if comparison.best is None:
        raise SystemExit(f"{format_rate(rate_bps)}: the plan recommends nothing: {comparison.reason}")
    taken = way_of(comparison.best.candidate.config, [result.way for result in results])
    best = min(measured, key=measured.__getitem__)
    return {
        "link": format_rate(rate_bps),
        "recommended": taken,
        "foretold s": comparison.best.seconds(results[0].steps),
        "measured s": measured[taken],
        "best": best,
        "its s": measured[best],
        "regret": measured[taken] / measured[best] - 1,
    }


def way_of(config: RunConfig, ways: list[Contender]) -> str:
    """The label of the way that learns and sends as this run does."""
    for way in ways:
        if what_counts(load_config(CONFIGS / way.config, [*SETTINGS, *way.overrides])) == what_counts(config):
            return way.label
    raise SystemExit(f"the plan recommends what has not been measured: {config.method!r}")


def what_counts(config: RunConfig) -> dict[str, Any]:
    """Of a run's method: what it learns, and where its states are."""
    settings = config.method.model_dump(mode="json")
    return told(config) | {key: settings.get(key) for key in ("params", "grads", "optim", "preset")}


if __name__ == "__main__":
    main()
