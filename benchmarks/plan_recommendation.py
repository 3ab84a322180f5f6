"""Claim: the method that `thinwire plan` would take is within 5 % of the best one measured, at each of six link speeds.

    python benchmarks/plan_recommendation.py [--rates 10gbit 1gbit 300mbit 100mbit 30mbit 10mbit] [--passes 2]

How many steps a method needs to the target loss is measured once (time_to_loss.py), whatever the link; steps_factor.py
hands it to the plan, which multiplies by the step that it foretells from a probe of the link, and recommends the method
with the fewest seconds. Here each method's step is measured at each link too, in the same hour as its probe; the regret
is what the recommended one takes longer than the best.

The best few are often nearer to each other than this machine is to itself a minute later. So in each pass the links are
probed and the methods timed anew (from the second pass on only those within 15 % of the best); a method's seconds are
the mean of its passes, and what the plan takes from each pass's probe is a row. Apart: the longest of the recommended
method's passes against the shortest.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lab_runs import CONFIGS, LabRuns, keep_what_was_learned
from plan_accuracy import RESULTS, probed
from runner import Row, arguments, report
from steps_factor import told
from time_to_loss import KEPT as LEARNED
from time_to_loss import MACHINE, RATES, STEPS, TARGET_SHARE, Result, examine, got, loss_at
from time_to_loss_ways import DDP, OURS, PEERS, Contender

from thinwire.comm.units import format_rate, parse_rate
from thinwire.dist.config import RunConfig, load_config
from thinwire.dist.plan.cluster import Cluster
from thinwire.dist.plan.compare import compare

ALLOWED = 0.05
NEAR = 1.15  # times the best: what is further away is not timed again
SETTINGS = (f"train.steps={STEPS}", "world.threads=1")
WAYS = (Contender("thinwire all-reduce, fp32", trains_as=DDP), *OURS)
KEPT = RESULTS / "plan_recommendation_runs.json"
PROBES = RESULTS / "probes" / "recommendation"


@dataclass(frozen=True)
class Measured:
    """A way. first: of the first pass. step_s: by rate, one of each pass in which it was timed."""

    first: Result
    step_s: Mapping[float, Sequence[float]]

    def seconds(self, rate_bps: float, dense_s: float) -> float:
        """Until the target, in the mean of the passes."""
        return self._seconds(statistics.mean(self.step_s[rate_bps]), rate_bps, dense_s)

    def apart(self, rate_bps: float, dense_s: float) -> float:
        """The longest pass against the shortest."""
        passes = [self._seconds(step_s, rate_bps, dense_s) for step_s in self.step_s[rate_bps]]
        return max(passes) / min(passes)

    def _seconds(self, step_s: float, rate_bps: float, dense_s: float) -> float:
        return replace(self.first, step_s={rate_bps: step_s}).seconds(rate_bps, dense_s)


def main() -> None:
    parser = arguments(str(__doc__).splitlines()[0])
    parser.set_defaults(device="cpu")
    parser.add_argument("--rates", nargs="+", default=list(RATES), help="link of each host")
    parser.add_argument("--only", nargs="*", help="methods whose label contains one of these, besides fp32")
    parser.add_argument("--passes", type=int, default=1, help="how often to probe and to time")
    parser.add_argument("--keep", type=Path, metavar="FILE", default=KEPT, help="file of the runs that are there")
    parser.add_argument("--probes", type=Path, metavar="FOLDER", default=PROBES, help="where the probes are")
    options = parser.parse_args()
    if options.passes < 1:
        parser.error(f"--passes is {options.passes}; it must be 1 or more")
    rates = sorted((parse_rate(rate) for rate in options.rates), reverse=True)
    ways = [w for w in WAYS if w is WAYS[0] or not options.only or any(part in w.label for part in options.only)]
    if not options.keep.exists():
        keep_what_was_learned(LEARNED, options.keep)
    probes, found, target = first_pass(LabRuns(options.keep), options.probes, ways, rates)
    by_pass = [probes]
    for number in range(1, options.passes):
        by_pass.append({rate: probed(options.probes, MACHINE, rate, number) for rate in rates})
        found = another_pass(LabRuns(options.keep.with_suffix(f".{number}.json")), found, rates)
    rows = [row_of(found, rate, number, by_pass[number][rate]) for rate in rates for number in range(options.passes)]
    report(str(__doc__).splitlines()[0], rows, device=torch.device("cpu"), path=options.json, extra={"target": target})
    for way in ways:
        if way not in [one.first.way for one in found]:
            print(f"{way.label} does not reach the target loss")
    worst = max(float(row["regret"]) for row in rows)
    print(f"\nlargest regret: {worst:.1%}; promised: {ALLOWED:.0%}")


def first_pass(
    runs: LabRuns, folder: Path, ways: Sequence[Contender], rates: Sequence[float]
) -> tuple[dict[float, Cluster], list[Measured], float]:
    """The probe of each link, every way that reaches the target loss, and that loss."""
    dense = runs.get(PEERS[0], MACHINE, STEPS, curve=True)
    if dense.curve is None:
        raise SystemExit(f"{DDP}: {dense.error}")
    target = loss_at(dense.curve, TARGET_SHARE * STEPS)
    probes = {rate: probed(folder, MACHINE, rate) for rate in rates}
    results = [examine(runs, way, STEPS, rates, target, dense) for way in ways]
    reached = [result for result in results if math.isfinite(result.steps)]
    return probes, [Measured(one, {rate: [one.step_s[rate]] for rate in rates}) for one in reached], target


def another_pass(runs: LabRuns, found: Sequence[Measured], rates: Sequence[float]) -> list[Measured]:
    """The same ways, with the seconds of another pass where they are near the best."""
    dense_s = {rate: statistics.mean(found[0].step_s[rate]) for rate in rates}
    best = {rate: min(one.seconds(rate, dense_s[rate]) for one in found) for rate in rates}
    again = []
    for one in found:
        near = [rate for rate in rates if one.seconds(rate, dense_s[rate]) <= NEAR * best[rate]]
        timings = got(runs.get(one.first.way, MACHINE, STEPS, near), one.first.way).timings
        more = {rate: [timings[rate].seconds] if rate in near else [] for rate in rates}
        again.append(replace(one, step_s={rate: [*one.step_s[rate], *more[rate]] for rate in rates}))
    return again


def row_of(found: Sequence[Measured], rate_bps: float, number: int, cluster: Cluster) -> Row:
    """What the plan takes at this rate by this pass's probe, what was best, and what the choice costs."""
    dense_s = statistics.mean(found[0].step_s[rate_bps])
    measured = {one.first.way.label: one.seconds(rate_bps, dense_s) for one in found}
    comparison = compare(load_config(CONFIGS / "demo.yaml", SETTINGS), cluster)
    if comparison.best is None:
        raise SystemExit(f"{format_rate(rate_bps)}: the plan recommends nothing: {comparison.reason}")
    taken = way_of(comparison.best.candidate.config, [one.first.way for one in found])
    best = min(measured, key=measured.__getitem__)
    return {
        "link": format_rate(rate_bps),
        "pass": number + 1,
        "recommended": taken,
        "foretold s": comparison.best.seconds(found[0].first.steps),
        "measured s": measured[taken],
        "apart": next(one.apart(rate_bps, dense_s) for one in found if one.first.way.label == taken),
        "best": best,
        "its s": measured[best],
        "regret": measured[taken] / measured[best] - 1,
    }


def way_of(config: RunConfig, ways: Sequence[Contender]) -> str:
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
