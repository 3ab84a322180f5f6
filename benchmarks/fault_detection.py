"""Claim: a lost rank ends the job on every survivor, by name, within the deadline plus two seconds.

    python benchmarks/fault_detection.py [--deadline 6] [--json FILE]

Kills, stops and cuts off one of four ranks of a real `thinwire train` in the lab, and takes the time from the fault to
the end of the last survivor's process.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from runner import Row, arguments, report

from thinwire.launch.lab import Lab, Run

VICTIM = 2
SURVIVORS = (0, 1, 3)
FAULTS: dict[str, Callable[[Lab, Run], None]] = {
    "killed": lambda lab, run: run.signal(VICTIM, signal.SIGKILL),
    "stopped": lambda lab, run: run.signal(VICTIM, signal.SIGSTOP),
    "cut off": lambda lab, run: lab.cut(VICTIM),
}


def main() -> None:
    parser = arguments(str(__doc__).splitlines()[0])
    parser.add_argument("--deadline", type=float, default=6.0, help="world.timeout_s of the run, in seconds")
    options = parser.parse_args()
    with Lab(hosts=4) as lab:
        rows = [measure_fault(lab, fault, options.deadline) for fault in FAULTS]
    report(str(__doc__).splitlines()[0], rows, device=torch.device("cpu"), path=options.json)


def measure_fault(lab: Lab, fault: str, deadline_s: float) -> Row:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for i in range(20):
            (folder / f"{i}.txt").write_text(f"all work and no play makes jack {i} a dull boy\n" * 20)
        (folder / "tiny.yaml").write_text(
            "model: {kind: gpt, layers: 1, heads: 1, width: 16, context: 16}\n"
            f"data: {{corpus: files, files: ['{folder}/*.txt'], validation_fraction: 0.2}}\n"
            "optimizer: {kind: sgd, lr: 0.01}\n"
            "train: {steps: 1000000, global_batch: 4, eval_windows: 0}\n"
            "method: {kind: allreduce}\n"
            f"world: {{timeout_s: {deadline_s}, threads: 1}}\n"
            f"output: {{folder: '{folder}/runs'}}\n"
        )
        (folder / "outputs").mkdir()
        command = [sys.executable, "-m", "thinwire", "train", str(folder / "tiny.yaml")]
        read, write = os.pipe()
        errors = folder / "rank0.err"
        with (
            os.fdopen(read) as progress,
            errors.open("w") as stderr,
            lab.start(command, output=folder / "outputs", stdout=write, stderr=stderr) as run,
        ):
            os.close(write)
            assert any(line.startswith("step ") for line in progress), errors.read_text()
            FAULTS[fault](lab, run)
            began = time.monotonic()
            while any(run.returncodes[rank] is None for rank in SURVIVORS):
                assert time.monotonic() - began < deadline_s + 60, f"{fault}: a survivor did not end"
                time.sleep(0.01)
            took_s = time.monotonic() - began
            lab.restore(VICTIM)
        said = [errors.read_text(), *(path.read_text() for path in (folder / "outputs").iterdir())]
        named = sum("PeerLostError: " in text and f"No answer from rank {VICTIM}:" in text for text in said)
        return {
            "fault": fault,
            "deadline s": deadline_s,
            "last survivor ended after s": took_s,
            "beyond the deadline s": took_s - deadline_s,
            "survivors that named it": f"{named} of {len(SURVIVORS)}",
        }


if __name__ == "__main__":
    main()
