"""Claim: over a slow link, thinwire reaches fp32 DDP's loss many times sooner, and sooner than any peer that runs here.

    python benchmarks/time_to_loss.py [--rates 10gbit ... 10mbit] [--only PART ...] [--json FILE] [--plot FILE]
    python benchmarks/time_to_loss.py --learn    # only what does not need an idle machine: the losses

Trains the 3 M-parameter GPT of configs/demo.yaml on four emulated hosts (batch 4 x 128 per rank) in each way, and asks
after how many seconds, evaluation not counted, it has the validation loss that torch's fp32 DDP has after three
quarters of its steps. A way that never has it gets a second run, with a schedule twice as long.

What a run learns does not depend on its links. So each way is trained to the end once, over fast links; the seconds of
a step are measured at every rate, the links changing while a run goes on, and both are multiplied. Ways in fp32 that
must have DDP's losses are checked to have them in their first steps, and not trained. First steps that are dense, and
an average over all at the end, are charged as so many of DDP's steps. Peers live in environments of their own, which
the script makes under build/; where one fails, what it said is in the JSON and below the table.

Runs are kept in --keep: a run that is there is not made again, so a benchmark that was stopped goes on where it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lab_machine import Machine
from lab_runs import NOT_RUN, Curve, LabRuns, Outcome
from runner import Row, arguments, report
from time_to_loss_plot import draw
from time_to_loss_ways import DDP, LIMITS_S, OURS, PEERS, Contender

from thinwire.comm.units import format_rate, parse_rate

RATES = ("10gbit", "1gbit", "300mbit", "100mbit", "30mbit", "10mbit")
KEPT = Path(__file__).resolve().parent / "results" / "time_to_loss_runs.json"
MACHINE = Machine(hosts=4)
STEPS = 80
TARGET_SHARE = 0.75  # of DDP's steps
PATIENCE = (1, 2)  # lengths of the schedule, in STEPS
SAME_LOSS = 1e-3  # relative: fp32 sums in other orders drift apart slowly


@dataclass(frozen=True)
class Result:
    """Of one way. steps: until the target, inf = never; schedule: steps of the run that this is read from."""

    way: Contender
    steps: float
    schedule: int
    final_loss: float
    step_s: Mapping[float, float]
    sent_bytes: float

    def seconds(self, rate_bps: float, dense_s: float) -> float:
        """Until the target, dense_s being those of one of DDP's steps at this rate."""
        dense = min(self.way.dense_steps, self.steps)
        return (self.steps - dense) * self.step_s[rate_bps] + dense * dense_s


def main() -> None:
    parser = arguments(str(__doc__).splitlines()[0])
    parser.add_argument("--rates", nargs="+", default=list(RATES), help="link of each host")
    parser.add_argument("--steps", type=int, default=STEPS, help="of DDP's run")
    parser.add_argument("--timed", type=int, default=6, help="steps to time at each rate; fewer where they are long")
    parser.add_argument("--only", nargs="*", help="ways whose label contains one of these, besides fp32 DDP")
    parser.add_argument("--learn", action="store_true", help="train to the end what is missing, and time nothing")
    parser.add_argument("--known", action="store_true", help="run nothing: show what the file of runs has")
    parser.add_argument("--retry", action="store_true", help="try again what failed")
    parser.add_argument("--keep", type=Path, metavar="FILE", default=KEPT, help="file of the runs that are there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw seconds to the target against the rate there")
    options = parser.parse_args()
    baseline = PEERS[0]
    wanted = [baseline] + [
        way
        for way in (*OURS, *PEERS)
        if way is not baseline and (not options.only or any(part in way.label for part in options.only))
    ]
    rates = [] if options.learn else sorted((parse_rate(rate) for rate in options.rates), reverse=True)
    runs = LabRuns(options.keep, timed_steps=options.timed, peer_limits_s=LIMITS_S, known_only=options.known)
    if options.retry:
        runs.forget_errors(way.label for way in wanted)
    failed: dict[str, str] = {}
    found: list[Result] = []
    dense = runs.get(baseline, MACHINE, options.steps, rates, curve=True)
    if dense.error or dense.curve is None:
        raise SystemExit(f"{DDP}: {dense.error}")
    target = loss_at(dense.curve, TARGET_SHARE * options.steps)
    for way in wanted:
        try:
            found.append(examine(runs, way, options.steps, rates, target, dense))
        except NoResultError as error:
            failed[way.label] = str(error)
    if not rates:
        print_learned(found, failed, target)
        return
    rows = [row(result, rate, found[0].step_s[rate], found[0], target) for rate in rates for result in found]
    ways = {way.label: [way.config, *way.overrides] for way in wanted if not way.peer}
    extra = {"target": target, "steps": options.steps, "hosts": MACHINE.hosts, "ways": ways, "failed": failed}
    report(str(__doc__).splitlines()[0], rows, device=torch.device("cpu"), path=options.json, extra=extra)
    for label, why in failed.items():
        print(f"{label}: {why}")
    if options.plot:
        draw(rows, failed, target, options.plot)


class NoResultError(RuntimeError):
    """A peer does not run here, and the text is its own; or nothing was to be run."""


def examine(runs: LabRuns, way: Contender, steps: int, rates: Sequence[float], target: float, dense: Outcome) -> Result:
    """Train, if it must be, and time one way."""
    assert dense.curve is not None
    curve, schedule = dense.curve, steps
    if way.trains_as:
        outcome = got(runs.get(way, MACHINE, steps, rates), way)
        if way.peer:  # which tell rank 0's own losses; a record of ours has the mean over the ranks
            check_losses(way, outcome, dense)
    else:
        outcome = got(runs.get(way, MACHINE, steps, rates, curve=True), way)
        assert outcome.curve is not None
        curve = outcome.curve
        for times in PATIENCE[1:]:
            if math.isfinite(steps_to(curve, target)):
                break
            longer = runs.get(way, MACHINE, times * steps, curve=True)
            if longer.curve is None:
                print(f"{way.label}, {times * steps} steps: {longer.error}")
                break
            curve, schedule = longer.curve, times * steps
    return Result(
        way,
        steps_to(curve, target),
        schedule,
        curve.validation[-1][1],
        {rate: outcome.timings[rate].seconds for rate in rates},
        outcome.timings[rates[0]].interface_sent_bytes if rates else 0.0,
    )


def got(outcome: Outcome, way: Contender) -> Outcome:
    """Raises NoResultError, or SystemExit where the failure is thinwire's own."""
    if outcome.error and (way.peer or outcome.error == NOT_RUN):
        raise NoResultError(outcome.error)
    if outcome.error:
        raise SystemExit(f"{way.label}: {outcome.error}")
    return outcome


def check_losses(way: Contender, outcome: Outcome, dense: Outcome) -> None:
    """Raises SystemExit where a peer in fp32 trains another model than DDP does."""
    for step, (mine, theirs) in enumerate(zip(outcome.first_losses, dense.first_losses, strict=False)):
        if not math.isclose(mine, theirs, rel_tol=SAME_LOSS):
            raise SystemExit(f"{way.label}: the loss of step {step + 1} is {mine}, that of {DDP} {theirs}")


def loss_at(curve: Curve, step: float) -> float:
    """Validation loss after the last evaluation up to this step."""
    return [loss for at, loss in curve.validation if at <= step][-1]


def steps_to(curve: Curve, target: float) -> float:
    """Steps until the validation loss reaches the target, between two evaluations on the line that joins them."""
    before: tuple[int, float] | None = None
    for step, loss in curve.validation:
        if loss <= target:
            if before is None:
                return step
            return before[0] + (step - before[0]) * (before[1] - target) / (before[1] - loss)
        before = (step, loss)
    return math.inf


def row(result: Result, rate_bps: float, dense_s: float, baseline: Result, target: float) -> Row:
    reached = math.isfinite(result.steps)
    seconds = result.seconds(rate_bps, dense_s) if reached else math.inf
    return {
        "link": format_rate(rate_bps),
        "way": result.way.label,
        "final loss": result.final_loss,
        "against target": result.final_loss / target,
        "of steps": result.schedule,
        "s per step": result.step_s[rate_bps],
        "sent MB per step": result.sent_bytes / 1e6,
        "steps to target": result.steps if reached else "-",
        "s to target": seconds if reached else "-",
        "times sooner": baseline.seconds(rate_bps, dense_s) / seconds if reached else "-",
    }


def print_learned(found: Sequence[Result], failed: Mapping[str, str], target: float) -> None:
    print(f"\ntarget: validation loss {target:.4f}")
    for result in found:
        print(f"{result.way.label:36} {result.steps:6.1f} steps of {result.schedule}, ends at {result.final_loss:.4f}")
    for label, why in failed.items():
        print(f"{label:36} {why}")


if __name__ == "__main__":
    main()
