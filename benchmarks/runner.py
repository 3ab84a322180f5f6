"""What every benchmark needs: the machine's description, fair timing, one table, one JSON file."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Row = Mapping[str, str | int | float]


@dataclass(frozen=True)
class Timing:
    median_s: float
    fastest_s: float


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that all benchmarks share; add your own and parse."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of PyTorch")
    parser.add_argument("--repeats", type=int, default=21, help="timed calls, of which the median counts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result there")
    return parser


def measure(
    works: Mapping[str, Callable[[], Any]], *, device: torch.device, repeats: int, warm_up: int = 3
) -> dict[str, Timing]:
    """Time each work call by call, in turns, so that a busy moment of the machine hits all of them alike.

    The first calls, which compile and touch the memory, do not count. A GPU is timed by its own clock.
    """
    clock = _time_on_gpu if device.type == "cuda" else _time_on_cpu
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(warm_up + repeats):
        for name, work in works.items():
            elapsed_s = clock(work)
            if turn >= warm_up:
                seconds[name].append(elapsed_s)
    return {name: Timing(statistics.median(taken), min(taken)) for name, taken in seconds.items()}


def copying(moved_bytes: int, *, device: torch.device) -> Callable[[], Any]:
    """A copy that reads half of these bytes and writes the other half: the speed that this machine's memory allows."""
    source = torch.zeros(moved_bytes // 2, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def machine(device: torch.device) -> dict[str, str | int | float]:
    """Models, counts, versions and how busy it is; nothing that tells one machine of a kind from another."""
    described: dict[str, str | int | float] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),  # runnable threads in the last minute, ours among them
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(device)
        described["triton"] = importlib.metadata.version("triton")
    return described


def report(
    claim: str,
    rows: Sequence[Row],
    *,
    device: torch.device,
    path: Path | None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Print the claim, the machine and a table of the rows, which have equal keys; write the same to `path` as JSON.

    extra: what else the JSON has, such as what has failed.
    """
    described = machine(device)
    print(f"{claim}\n{', '.join(f'{name} {value}' for name, value in described.items())}\n")
    cells = [list(rows[0]), *([_text(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    if path is not None:
        content = {
            "claim": claim,
            "machine": described,
            **(extra or {}),
            "rows": [{name: _rounded(value) for name, value in row.items()} for row in rows],
        }
        path.write_text(json.dumps(content, indent=2) + "\n")


def _rounded(value: str | int | float) -> str | int | float:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _text(value: str | int | float) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else value


def _time_on_cpu(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _time_on_gpu(work: Callable[[], Any]) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3


def _cpu_model() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
