"""All benchmarks, one after another: `make bench` (under an hour on two cores) and `make bench-quick` (five minutes).

    python benchmarks/run_all.py [--quick] [--only PART ...] [--out FOLDER]

Each script runs with arguments that keep it short, and is stopped when it takes longer than its limit and what the
scripts before it have left of theirs (the limits together are the hour); what the README cites was measured with the
arguments that stand there. Of each, the folder gets the JSON, the plot and the output; at the end a table says which
claim was measured in how many seconds, and what failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lab_runs import keep_what_was_learned
from run_all_scripts import SCRIPTS, Script

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Result:
    """How a script ended. problem: "" = well."""

    script: str
    claim: str
    seconds: float
    problem: str


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="five minutes")
    parser.add_argument("--only", nargs="*", help="scripts whose name contains one of these")
    parser.add_argument("--out", type=Path, metavar="FOLDER", default=HERE.parent / "build" / "bench")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(options.out / "kept", ignore_errors=True)
    keep_what_was_learned(HERE / "results" / "time_to_loss_runs.json", options.out / "kept" / "runs.json")
    chosen = [script for script in SCRIPTS if not options.only or any(part in script.name for part in options.only)]
    results = []
    left_s = 0.0
    for script in chosen:
        arguments = script.quick if options.quick else script.arguments
        if arguments is not None:
            left_s += script.quick_limit_s if options.quick else script.limit_s
            told = run(script, arguments, left_s, options.out)
            left_s = max(0.0, left_s - told.seconds)
            results.append(told)
            print(f"{told.seconds:6.0f} s  {script.name}  {told.problem or told.claim}", flush=True)
    summary = [vars(result) for result in results]
    (options.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    total_s = sum(result.seconds for result in results)
    failed = [result for result in results if result.problem]
    print(f"\n{len(results)} benchmarks in {total_s / 60:.1f} minutes, {len(failed)} failed; see {options.out}")
    raise SystemExit(1 if failed else 0)


def run(script: Script, arguments: Sequence[str], limit_s: float, folder: Path) -> Result:
    """Run one script; it and what it has started end after limit_s."""
    command = [
        sys.executable,
        str(HERE / f"{script.name}.py"),
        *(argument.replace("OUT", str(folder)) for argument in arguments),
        "--json",
        str(folder / f"{script.name}.json"),
    ]
    if script.plots:
        command += ["--plot", str(folder / f"{script.name}.png")]
    began = time.monotonic()
    log = folder / f"{script.name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(process)
    seconds = time.monotonic() - began
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    problem = ""
    if code is None:
        problem = f"stopped: its limit is {limit_s:.0f} s"
    elif code:
        problem = f"exit code {code}: {lines[-1][:200] if lines else 'it said nothing'}"
    return Result(script.name, claim_of(HERE / f"{script.name}.py"), seconds, problem)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill its session; labs end by themselves when the process that opened them has ended."""
    try:
        os.killpg(process.pid, 9)
    except ProcessLookupError:
        pass
    process.wait()


def claim_of(path: Path) -> str:
    """The first line of a script's docstring."""
    first = path.read_text().split('"""')[1].splitlines()[0]
    return first.removeprefix("Claim: ").removeprefix("Question: ")


if __name__ == "__main__":
    main()
