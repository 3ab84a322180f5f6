"""Runs of other libraries' training loops with thinwire inside: python adapters_program.py LIBRARY CASES RESULTS.

CASES is a JSON file: {name: path of a run's configuration}. Each rank writes, for every case, the losses of its steps
and a digest of its weights at the end, of a run that was stopped half-way and resumed from the library's checkpoint;
and, for every refusal that it provoked, the error. The two ranks are forks of this process, which has imported the
library.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from adapters_loops import RUNS, SIZE, Case
from adapters_refusals import REFUSALS, alone, refusals
from forked_ranks import fork_ranks


def run_rank(libraries: list[str], cases: dict[str, str], results: Path, rank: int, port: int) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": SIZE, "LOCAL_WORLD_SIZE": SIZE, "GROUP_RANK": 0}
    os.environ.update({name: str(value) for name, value in place.items()})
    # The store is there already: nobody has to make it.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    os.environ.update(TORCHELASTIC_RUN_ID="adapters", ACCELERATE_USE_CPU="true")
    found: dict[str, Any] = {}
    for library in libraries:
        for name, path in cases.items():
            folder = results / library / name
            state = folder / "state"
            stopped, resumed = Case(path, folder), Case(path, folder)
            half = stopped.steps // 2
            RUNS[library](stopped, rank, 0, half, state)
            torch.distributed.barrier()
            RUNS[library](resumed, rank, half, resumed.steps, state)
            losses = stopped.losses + resumed.losses
            validated = stopped.validated + resumed.validated
            found[f"{library}/{name}"] = {"losses": losses, "weights": resumed.weights(), "validated": validated}
        last = Case(next(iter(cases.values())), results / library / "refused")
        found[f"{library}/refused"] = refusals(REFUSALS[library](last))
    (results / f"rank{rank}.json").write_text(json.dumps(found))


def main() -> None:
    libraries, cases, results = sys.argv[1].split(","), json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    for name in {"accelerate": ["accelerate", "transformers"], "lightning": ["lightning"]}[libraries[0]]:
        importlib.import_module(name)
    if libraries[0] == "accelerate":
        importlib.import_module("transformers.trainer")

    def single(rank: int, port: int) -> None:
        (results / "alone.json").write_text(json.dumps(refusals(alone(libraries[0]))))

    codes = fork_ranks(1, single)
    codes += fork_ranks(SIZE, lambda rank, port: run_rank(libraries, cases, results, rank, port))
    sys.exit(max(codes))


if __name__ == "__main__":
    main()
