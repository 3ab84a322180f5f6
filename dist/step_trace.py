"""Traces of a few steps in the Chrome format, one file per rank, which Perfetto and `thinwire report` open."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile, record_function

from thinwire.dist.run_folder import TRACES


class StepTrace:
    """Records the steps first..last of a rank with torch's profiler, all threads of the process included.

    Besides torch's own operators a trace has named ranges: "step 10", "forward", "backward", "optimizer", every
    exchange of a CommQueue as "thinwire::<operation>", and "wait: <operation>" where somebody was blocked by it.
    The profiler makes the traced steps slower, so compare the parts of a traced step with each other alone.

    Args:
        steps: (first, last), counted from 1 like the records; None = nothing is traced.
        folder: of the run. Each rank writes traces/rank<number>.json of it, on its own host.
        rank, host: of this process, for the reader.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path, *, rank: int, host: str) -> None:
        self._steps = steps
        self._path = folder / TRACES / f"rank{rank}.json"
        self._facts = {"rank": rank, "host": host, "steps": steps}
        self._profile: profile | None = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around one step; its number is that of its record."""
        if self._steps is None or not self._steps[0] <= number <= self._steps[1]:
            self.close()  # rounds of machines that come and go may skip the last step to trace
            yield
            return
        if self._profile is None:
            self._profile = self._begin()
        with record_function(f"step {number}"):
            yield
        if number == self._steps[1]:
            self.close()

    def close(self) -> None:
        """Write what was recorded, if anything is still being recorded: also after a run that ended before its time."""
        if self._profile is None:
            return
        recorded, self._profile = self._profile, None
        recorded.stop()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._path.with_name(f"{self._path.name}.tmp.json")
        recorded.export_chrome_trace(str(unfinished))
        os.replace(unfinished, self._path)

    def _begin(self) -> profile:
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        begun = profile(activities=activities, experimental_config=_ExperimentalConfig(profile_all_threads=True))
        begun.start()
        begun.add_metadata_json("thinwire", json.dumps(self._facts))
        return begun
