"""Writes dist/plan/steps_factor.yaml: the steps to the same loss that `thinwire plan` multiplies with, as measured.

    python benchmarks/steps_factor.py benchmarks/results/time_to_loss.json [--out FILE]

Each of time_to_loss.py's ways of thinwire becomes an entry: its steps to the target over those of torch's fp32 DDP, and
of its settings those that say what a rank sends. A way that never has the loss becomes null. Nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from thinwire.dist.config import RunConfig, load_config
from thinwire.dist.plan.steps_factor import StepsTable, includes

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "dist" / "plan" / "steps_factor.yaml"
DENSE = "torch DDP, fp32"
# Where a state is does not change what is learnt, nor when it is sent; a seed does not, to what can be measured here.
_INDIFFERENT = (
    "bucket_mb", "deadline_s", "evaluate", "exact_within", "machines", "meet_deadline_s", "params", "grads",
    "optim", "preset", "probe_every", "probes", "secondary", "seed",
)  # fmt: skip
# Methods that give every rank fp32 all-reduce's gradient, wherever their states are: no run is needed to know it.
EXACT: tuple[dict[str, Any], ...] = (
    {"kind": "allreduce", "dtype": "fp32"},
    {
        "kind": "partition",
        "weights": "fp32",
        "gather": {"kind": "same"},
        "update": {"kind": "same"},
        "gradients": {},
    },
)
HEAD = """\
# Steps to the same validation loss, as multiples of those of all-reduce in fp32. Measured, not argued: a method that is
# not here has no figure. `python benchmarks/steps_factor.py RESULTS.json` writes this file. null: the loss was not
# reached in the runs that there are.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("results", type=Path, help="JSON of time_to_loss.py")
    parser.add_argument("--out", type=Path, default=OUT, help="the table")
    options = parser.parse_args()
    results = json.loads(options.results.read_text())
    data = table(results, source(options.results))
    StepsTable.model_validate(data)
    text = yaml.safe_dump(data, sort_keys=False, width=118, default_flow_style=None)
    options.out.write_text(HEAD + text, encoding="utf-8")
    for entry in data["factors"]:
        print(entry["factor"], json.dumps(entry["method"]))


def source(path: Path) -> str:
    """The path, as seen from the repository."""
    absolute = path.resolve()
    return absolute.relative_to(ROOT).as_posix() if absolute.is_relative_to(ROOT) else path.name


def table(results: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The content of steps_factor.yaml."""
    steps = {row["way"]: number(row["steps to target"]) for row in results["rows"]}
    entries: list[dict[str, Any]] = [{"factor": 1.0, "method": method} for method in EXACT]
    for label, way in results["ways"].items():
        if label in steps:
            config = load_config(ROOT / "configs" / way[0], way[1:])
            factor = steps[label] / steps[DENSE]
            known = config.method.model_dump(mode="json")
            if any(includes(known, entry["method"]) for entry in entries):
                continue
            entries.append({"factor": round(factor, 3) if math.isfinite(factor) else None, "method": told(config)})
    model = f"{results['hosts']} ranks, {results['steps']} steps"
    return {"source": source, "measured_on": f"3.2 M GPT of configs/demo.yaml, AdamW, {model}", "factors": entries}


def number(steps: float | str) -> float:
    """inf where the target was not reached."""
    return math.inf if steps == "-" else float(steps)


def told(config: RunConfig) -> dict[str, Any]:
    """The settings of the method that decide what is learnt."""
    return dict(decisive(config.method.model_dump(mode="json")))


def decisive(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if key not in _INDIFFERENT:
            yield key, dict(decisive(value)) if isinstance(value, Mapping) else value


if __name__ == "__main__":
    main()
