"""One record per step, and where it goes: metrics.jsonl always, TensorBoard and W&B if asked for."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import psutil

from thinwire.comm.meter import TrafficMeter

Record = dict[str, Any]
"""Keys with units in their names; "step" counts the finished steps, so the first record has 1."""


class Sink(Protocol):
    """Somewhere that records go."""

    def write(self, record: Record) -> None:
        """Take one step's record."""
        ...

    def close(self) -> None:
        """No more records will come."""
        ...


class StepTraffic:
    """What the meter, and the network interface, counted from step to step.

    Read it where the queue is idle; the training loop does so at each step's end, when every bucket has been waited
    for, and before it sends the step's report: the 16 bytes of that count for the step after it. So may a few hundred
    bytes of expert counts, which nobody has waited for.

    Args:
        meter: payload bytes of this rank.
        interface: name of the network interface, whose counter includes headers and all processes of the host.
    """

    def __init__(self, meter: TrafficMeter, interface: str) -> None:
        self._meter = meter
        self._interface = interface
        self._before = self._totals()
        self._operations_before = self._by_operation()

    def since_last(self) -> Record:
        """Bytes since the last call: the method's, in all and by level; of control messages; on the interface.

        Under "operations" those of each operation and level, with its calls, and the seconds during which one of them
        was under way; buckets and groups of one kind are counted together.
        """
        now, before = self._totals(), self._before
        self._before = now
        delta = {
            key: {level: count - before[key].get(level, 0) for level, count in by_level.items()}
            for key, by_level in now.items()
        }
        sent, received = (
            {level: count - delta[f"control_{key}"].get(level, 0) for level, count in delta[key].items()}
            for key in ("sent", "received")
        )
        return {
            "sent_bytes": sum(sent.values()),
            "received_bytes": sum(received.values()),
            "sent_bytes_by_level": sent,
            "received_bytes_by_level": received,
            "control_sent_bytes": sum(delta["control_sent"].values()),
            "interface_sent_bytes": delta["interface_sent"]["all"],
            "operations": self._operations_since_last(),
        }

    def _operations_since_last(self) -> dict[str, dict[str, dict[str, float]]]:
        now, before = self._by_operation(), self._operations_before
        self._operations_before = now
        told: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
        for (operation, level), totals in now.items():
            earlier = before.get((operation, level), {})
            since = {key: total - earlier.get(key, 0) for key, total in totals.items()}
            if since["calls"]:
                told[operation][level] = since | {"seconds": round(since["seconds"], 6)}
        return dict(told)

    def _by_operation(self) -> dict[tuple[str, str], dict[str, float]]:
        totals: dict[tuple[str, str], dict[str, float]] = {}
        for operation, by_level in self._meter.snapshot()["operations"].items():
            for level, traffic in by_level.items():
                known = totals.setdefault((_kind(operation), level), {})
                for key, value in traffic.items():
                    known[key] = known.get(key, 0) + value
        return totals

    def _totals(self) -> dict[str, dict[str, int]]:
        counters = psutil.net_io_counters(pernic=True, nowrap=False)
        return {
            "sent": self._meter.sent_bytes(),
            "received": self._meter.received_bytes(),
            "control_sent": self._meter.sent_bytes("control/"),
            "control_received": self._meter.received_bytes("control/"),
            "interface_sent": {"all": counters[self._interface].bytes_sent},
        }


class JsonLines:
    """metrics.jsonl: one JSON object per line, on disk as soon as written.

    Args:
        path: the file; records of an earlier run beyond `finished_steps` are removed, so that no step appears twice.
    """

    def __init__(self, path: Path, finished_steps: int) -> None:
        kept = [record for record in read_records(path) if record["step"] <= finished_steps] if path.exists() else []
        self.seconds_before = float(kept[-1]["seconds"]) if kept else 0.0
        unfinished = path.with_name(f"{path.name}.tmp")
        unfinished.write_text("".join(_line(record) for record in kept), encoding="utf-8")
        os.replace(unfinished, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Append a line."""
        self._file.write(_line(record))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_records(path: Path) -> list[Record]:
    """The records of a metrics.jsonl. A last line that a kill cut short is left out.

    Raises:
        ValueError: another line is not JSON; names it.
    """
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: line {number} is not JSON: {error}") from None
    return records


class TensorBoard:
    """Scalars for TensorBoard in the run folder.

    Raises:
        ValueError: the package is not installed.
    """

    def __init__(self, folder: Path, finished_steps: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                "output.tensorboard: true needs the tensorboard package: pip install 'thinwire[tensorboard]', "
                "or set it to false"
            ) from error
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=finished_steps + 1)

    def write(self, record: Record) -> None:
        """Add each number of the record."""
        for key, value in flat_numbers(record).items():
            self._writer.add_scalar(key, value, record["step"])

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class WandB:
    """Scalars for Weights & Biases.

    Raises:
        ValueError: the package is not installed.
    """

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                "output.wandb: true needs the wandb package: pip install 'thinwire[wandb]', or set it to false"
            ) from error
        self._run = wandb.init(
            project="thinwire", id=name, name=name, dir=str(folder), config=dict(config), resume="allow"
        )

    def write(self, record: Record) -> None:
        """Log each number of the record."""
        self._run.log(flat_numbers(record), step=record["step"])

    def close(self) -> None:
        """Tell W&B that the run has ended."""
        self._run.finish()


def flat_numbers(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a record; those of an inner mapping under "key/inner"."""
    numbers: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            numbers |= flat_numbers(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)):
            numbers[prefix + key] = value
    return numbers


def _kind(operation: str) -> str:
    """The operation's name without the number of its bucket or group."""
    return re.sub(r"\d+(?=/|$)", "", operation)


def _line(record: Record) -> str:
    return json.dumps(record, allow_nan=False) + "\n"
