"""A run as its folder tells it: settings, facts, and a record for each step."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from thinwire.dist.metrics import Record, read_records
from thinwire.dist.run_folder import CONFIG, FACTS, METRICS, TRACES

# What every trainer records of every step, and nothing can be said without.
_NEEDED = ("step", "seconds", "loss", "compute_ms", "exposed_comm_ms", "sent_bytes", "control_sent_bytes")


class ReportError(ValueError):
    """Runs that cannot be reported or compared; the message names the file and the key."""


@dataclass(frozen=True)
class Run:
    """What a run folder holds.

    records: one per step of rank 0, or of the machine that wrote them.
    config: resolved settings; empty where there is no config.yaml.
    starts: facts of run.json, one mapping for each time that the run was started; empty of an older version's run.
    traces: Chrome-format files, one for each rank that has written here.
    modelled_bps: the communication's share of the times was computed for a link of this rate; None = all was measured.
    """

    label: str
    folder: Path
    records: tuple[Record, ...]
    config: Mapping[str, Any]
    starts: tuple[Mapping[str, Any], ...]
    traces: tuple[Path, ...] = ()
    modelled_bps: float | None = None

    @property
    def facts(self) -> Mapping[str, Any]:
        """Of the last start."""
        return self.starts[-1] if self.starts else {}

    def setting(self, path: str) -> Any:
        """A resolved setting by its dotted path; None if there is none."""
        return inner(self.config, path)

    def numbers(self, key: str) -> list[float]:
        """A number that every record must have, by dotted key.

        Raises:
            ReportError: one has not; names the file, the step and the key.
        """
        found = []
        for record in self.records:
            value = inner(record, key)
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise ReportError(
                    f"{self.folder / METRICS}: the record of step {record['step']} has no number {key!r}, which a "
                    "report needs; such a file is written by `thinwire train`"
                )
            found.append(float(value))
        return found

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """(steps, values) of the records that have this number, by dotted key."""
        found = [(record["step"], value) for record in self.records if (value := inner(record, key)) is not None]
        return [step for step, _ in found], [float(value) for _, value in found]


def read_run(folder: Path, label: str | None = None) -> Run:
    """Read a run folder.

    Args:
        label: default: the folder's name.
    Raises:
        ReportError: it holds no run, or records that lack what every report needs.
    """
    path = folder / METRICS
    if not path.is_file():
        inside = sorted(p.parent.name for p in folder.glob(f"*/{METRICS}")) if folder.is_dir() else []
        if inside:
            raise ReportError(f"{folder}: it is no run, but holds some: {', '.join(inside)}; give {folder}/*")
        why = "it has no metrics.jsonl" if folder.is_dir() else "there is no such folder"
        raise ReportError(f"{folder}: {why}; give the folder of a run, that is output.folder/name of its settings")
    try:
        records = read_records(path)
    except ValueError as error:
        raise ReportError(str(error)) from None
    if not records:
        raise ReportError(f"{path}: it holds no step; the run was stopped before its first one had ended")
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise ReportError(f"{path}: line {number} is no record of a step: it has no number 'step'")
    config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8")) if (folder / CONFIG).is_file() else {}
    run = Run(
        label=label or folder.resolve().name,
        folder=folder,
        records=tuple(records),
        config=config,
        starts=_starts(folder / FACTS),
        traces=tuple(sorted((folder / TRACES).glob("rank*.json"), key=_rank_of)),
    )
    for key in _NEEDED:
        run.numbers(key)
    return run


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read several; those whose folders have one name are called by as much of their paths as tells them apart.

    Raises:
        ReportError: as read_run(); or a folder is given twice.
    """
    places = [folder.resolve() for folder in folders]
    if doubled := [str(folder) for folder, place in zip(folders, places, strict=True) if places.count(place) > 1]:
        raise ReportError(f"{doubled[0]}: it is given twice")
    return [read_run(folder, _label(place, places)) for folder, place in zip(folders, places, strict=True)]


def with_modelled_link(run: Run, rate_bps: float) -> Run:
    """The run as a link that it did not have would have let it go, without overlap: sent bytes * 8 / rate.

    That takes the place of the communication time that was measured; what ranks and interfaces shared is left out.
    """
    records = []
    added_s = 0.0
    for record in run.records:
        link_ms = 8e3 * record["sent_bytes"] / rate_bps
        added_s += (link_ms - record["exposed_comm_ms"]) / 1e3
        known = {k: v for k, v in record.items() if not k.endswith("_by_rank") and k != "interface_sent_bytes"}
        records.append({**known, "exposed_comm_ms": link_ms, "seconds": record["seconds"] + added_s})
    return replace(run, records=tuple(records), modelled_bps=rate_bps)


def inner(tree: Mapping[str, Any], path: str) -> Any:
    """What stands at a dotted path of nested mappings; None if nothing does. Keys themselves may hold slashes."""
    if path in tree:
        return tree[path]
    first, dot, rest = path.partition(".")
    below = tree.get(first)
    return inner(below, rest) if dot and isinstance(below, Mapping) else None


def _starts(path: Path) -> tuple[Mapping[str, Any], ...]:
    if not path.is_file():
        return ()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return tuple(content["starts"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ReportError(
            f"{path}: cannot be read as the facts of a run: {error!r}; remove it, or restore it"
        ) from None


def _label(place: Path, places: Sequence[Path]) -> str:
    for depth in range(1, len(place.parts)):
        ending = place.parts[-depth:]
        if sum(other.parts[-depth:] == ending for other in places) == 1:
            return "/".join(ending)
    return str(place)


def _rank_of(path: Path) -> int:
    digits = path.stem.removeprefix("rank")
    return int(digits) if digits.isdigit() else -1
