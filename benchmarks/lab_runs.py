"""Runs of training on emulated hosts, for all benchmarks that compare ways to train: each is made once, and kept.

    runs = LabRuns(Path("build/benchmarks/runs.json"))
    outcome = runs.get(Way("int8", ("method={kind: compress, compressor: int8}",)), Machine(hosts=4), 100, [1e9, 1e8])
    outcome.timings[1e8].seconds  # per step

What a run learns does not depend on its links, so one run serves all rates: its links change while it goes on. Only a
way whose exchanges vary has a run for each.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lab_machine import Machine
from lab_phases import Phases, steady_step_s
from peers.environments import EnvironmentFailedError, python_of

from thinwire.comm.units import format_rate

HERE = Path(__file__).resolve().parent
CONFIGS = HERE.parent / "configs"
FAST_BPS = 10e9
"""Of links that nobody waits for: where a run learns, and is not timed."""
NOT_RUN = "has not been run here"
_POLL_S = 0.02
_ENOUGH_S, _VARIED_ENOUGH_S, _VARIED_PERIODS = 10.0, 100.0, 6


@dataclass(frozen=True)
class Way:
    """A way to train: thinwire's (settings of `thinwire train`) or a peer's (a name that peers/rank.py has).

    overrides: key.path=value; a peer takes those that say what is trained.
    environment: of the peer, a name that peers/environments.py knows; "" = the one that this runs in.
    config: file in configs/. warm_up_steps: dense or otherwise unlike the others, so not part of the time per step.
    period: steps from one synchronisation to the next. varies: whether these are not alike, as where partners change:
    then many are timed, and their mean counts; at each rate in a run of its own, since a connection that is seldom used
    stays as slow as the rate before was.
    """

    label: str
    overrides: tuple[str, ...] = ()
    peer: str = ""
    environment: str = ""
    config: str = "demo.yaml"
    warm_up_steps: int = 2
    period: int = 1
    varies: bool = False


@dataclass(frozen=True)
class Timing:
    """Steps at one rate. step_s: of rank 0, whole periods. period: steps in each.

    sent_bytes: payload that rank 0 metered, per step and by level; {} for peers. interface_sent_bytes: of its host.
    load: runnable threads of the machine in the minute before, to tell a busy machine's figures. cores_per_rank:
    processors that each rank had for itself; None: all shared the machine's. varies: as Way has it.
    """

    step_s: tuple[float, ...]
    period: int
    sent_bytes: Mapping[str, float]
    interface_sent_bytes: float
    load: float
    cores_per_rank: float | None = None
    varies: bool = False

    @property
    def seconds(self) -> float:
        """Per step."""
        return statistics.mean(self.step_s) if self.varies else steady_step_s(self.step_s, self.period)


@dataclass(frozen=True)
class Curve:
    """A whole run: training losses by step, and (step, validation loss)."""

    losses: tuple[float, ...]
    validation: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Outcome:
    """What is known of a way on a machine. timings: by bits per second. error: why it does not run, or ""."""

    timings: Mapping[float, Timing] = field(default_factory=dict)
    curve: Curve | None = None
    first_losses: tuple[float, ...] = ()
    error: str = ""


class LabRuns:
    """Runs that are made when they are first asked for.

    Args:
        path: the file that keeps them.
        limit_s: of one run; one that takes longer has failed. Peers may have limits of their own, by name.
        timed_steps: at each rate, unless they take more than ten seconds.
        known_only: run nothing; what is missing is an error.
    """

    def __init__(
        self,
        path: Path,
        *,
        limit_s: float = 600.0,
        peer_limits_s: Mapping[str, float] | None = None,
        timed_steps: int = 6,
        known_only: bool = False,
    ) -> None:
        self._path = path
        self._limit_s = limit_s
        self._peer_limits_s = peer_limits_s or {}
        self._timed_steps = timed_steps
        self._known_only = known_only
        self._kept = self._read()

    def get(
        self, way: Way, machine: Machine, steps: int, rates: Sequence[float] = (), *, curve: bool = False
    ) -> Outcome:
        """What is asked of this way, from the file as far as it is there.

        Args:
            steps: of the whole run, which its learning rate depends on.
            rates: bits per second, at which to time steps.
            curve: train to the end, and evaluate on the way.
        """
        known = self.known(way, machine, steps)
        while not known.error:
            missing = [rate for rate in rates if rate not in known.timings]
            needs_curve = curve and known.curve is None
            if not missing and not needs_curve:
                break
            if self._known_only:
                return replace(known, error=NOT_RUN)
            made = self._run(way, machine, steps, missing[:1] if way.varies else missing, needs_curve)
            timings = {**known.timings, **made.timings}
            no_progress = not made.error and not made.timings and made.curve is None
            error = made.error or ("the run has too few steps to be timed" if no_progress else "")
            known = Outcome(timings, made.curve or known.curve, made.first_losses or known.first_losses, error)
            self._keep(way, machine, steps, known)
        return known

    def known(self, way: Way, machine: Machine, steps: int) -> Outcome:
        """What the file has of it, without a run."""
        identity = _identity(way, machine, steps)
        for entry in self._kept:
            if entry["identity"] == identity:
                found = _outcome(entry)
                return found if self._known_only else replace(found, timings=_of(machine, found.timings))
        return Outcome()

    def forget_errors(self, labels: Iterable[str]) -> None:
        """Try again those of these ways that have failed."""
        wanted = set(labels)
        for entry in self._kept:
            if entry["label"] in wanted:
                entry["error"] = ""
        self._write()

    def _read(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self._path.read_text())["runs"] if self._path.exists() else []
        return found

    def _keep(self, way: Way, machine: Machine, steps: int, outcome: Outcome) -> None:
        identity = _identity(way, machine, steps)
        entry = {
            "label": way.label,
            "identity": identity,
            "timings": {f"{rate:.0f}": asdict(timing) for rate, timing in outcome.timings.items()},
            "curve": asdict(outcome.curve) if outcome.curve else None,
            "first_losses": outcome.first_losses,
            "error": outcome.error,
        }
        self._kept = self._read()  # another process may have added runs
        self._kept = [other for other in self._kept if other["identity"] != identity] + [entry]
        self._write()

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._path.with_suffix(".tmp")
        lines = ",\n".join(json.dumps(one) for one in self._kept)
        unfinished.write_text(f'{{"runs": [\n{lines}\n]}}\n')
        unfinished.replace(self._path)

    def _run(self, way: Way, machine: Machine, steps: int, rates: Sequence[float], curve: bool) -> Outcome:
        at = ", ".join(format_rate(rate) for rate in sorted(rates, reverse=True))
        what = " and ".join([*([f"timed at {at}"] if rates else []), *(["trained to the end"] if curve else [])])
        print(f"--- {way.label}: {machine.hosts} hosts x {machine.ranks_per_host}, {what}", flush=True)
        folder = Path(tempfile.mkdtemp())
        began = time.monotonic()
        try:
            outcome = self._train(way, machine, steps, rates, curve, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        told = [f"{format_rate(rate)} {timing.seconds:.3f} s" for rate, timing in outcome.timings.items()]
        if outcome.curve:
            told.append(f"validation loss {outcome.curve.validation[-1][1]:.4f}")
        print(f"    {outcome.error or ', '.join(told)} ({time.monotonic() - began:.0f} s)", flush=True)
        return outcome

    def _train(
        self, way: Way, machine: Machine, steps: int, rates: Sequence[float], curve: bool, folder: Path
    ) -> Outcome:
        try:
            command, records_path = _command(way, steps, curve, folder)
        except EnvironmentFailedError as error:
            return Outcome(error=str(error))
        # A record of ours is written while the step after it goes on.
        phases = Phases(
            rates,
            warm_up_steps=way.warm_up_steps,
            period=way.period,
            settle_steps=1 if way.peer else 2,
            timed_steps=_VARIED_PERIODS * way.period if way.varies else self._timed_steps,
            enough_s=_VARIED_ENOUGH_S if way.varies else _ENOUGH_S,
        )
        tail = _Tail(records_path)
        load = os.getloadavg()[0]
        limit_s = self._peer_limits_s.get(way.peer, self._limit_s)
        began = time.monotonic()
        error = ""
        code: int | None = None
        lab = machine.lab(phases.rate_bps or FAST_BPS)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with lab, (folder / "rank0.log").open("w") as log:
            run = lab.start(command, environment, folder=HERE, output=folder, stdout=log, stderr=log)
            while code is None:
                try:
                    code = run.wait(_POLL_S)
                except TimeoutError:
                    pass
                tail.read()
                if phases.see(tail.values("step_s")):
                    for host in range(machine.hosts):
                        lab.slow(host, rate_bps=phases.rate_bps or FAST_BPS)
                if code is None and phases.rate_bps is None and not curve:
                    break
                if code is None and time.monotonic() - began > limit_s:
                    error = f"had not ended after {limit_s:.0f} s, and {len(tail.records)} steps"
                    break
            if code is None:
                run.signal_all(signal.SIGKILL)
        if code:
            error = f"exit code {code}: {_last_error(folder)}"
        elif error:
            error += f": {_last_error(folder)}"
        cores = machine.cores_per_rank
        return Outcome(
            {rate: _timing(tail.records[slice(*place)], way, load, cores) for rate, place in phases.timed.items()},
            _curve(tail.records) if curve and code == 0 else None,
            tuple(tail.values("loss")[:10]),
            error,
        )


def keep_what_was_learned(source: Path, target: Path) -> None:
    """A file of runs without their seconds, which belong to the machine that measured them, and without errors."""
    runs = json.loads(source.read_text())["runs"] if source.exists() else []
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"runs": [{**entry, "timings": {}, "error": ""} for entry in runs]}))


class _Tail:
    """The records of a metrics.jsonl that grows."""

    def __init__(self, path: Path) -> None:
        self.records: list[dict[str, Any]] = []
        self._path = path
        self._offset = 0

    def read(self) -> None:
        """Take in the lines that are complete."""
        if not self._path.exists() or self._path.stat().st_size == self._offset:
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            content = file.read()
        complete = content[: content.rfind(b"\n") + 1]
        self._offset += len(complete)
        self.records += [json.loads(line) for line in complete.splitlines()]

    def values(self, key: str) -> list[float]:
        """Of all records."""
        return [record[key] for record in self.records]


def _command(way: Way, steps: int, curve: bool, folder: Path) -> tuple[list[str], Path]:
    """What each rank runs, and where rank 0 writes its records."""
    settings = [
        f"train.steps={steps}",
        "train.eval_every=5" if curve else "train.eval_windows=0",
        "world.threads=1",
        "world.timeout_s=300",
        f"output.folder={folder}",
        "name=run",
        *way.overrides,
    ]
    config = str(CONFIGS / way.config)
    if not way.peer:
        return [sys.executable, "-m", "thinwire", "train", config, *settings], folder / "run" / "metrics.jsonl"
    return [
        python_of(way.environment),
        "-m",
        "peers.rank",
        way.peer,
        str(folder),
        config,
        *settings,
    ], folder / "metrics.jsonl"


def _timing(records: Sequence[Mapping[str, Any]], way: Way, load: float, cores: float | None) -> Timing:
    levels = {level for record in records for level in record.get("sent_bytes_by_level", {})}
    return Timing(
        tuple(record["step_s"] for record in records),
        way.period,
        {level: statistics.mean(r["sent_bytes_by_level"].get(level, 0) for r in records) for level in sorted(levels)},
        statistics.mean(record["interface_sent_bytes"] for record in records),
        round(load, 1),
        cores,
        way.varies,
    )


def _curve(records: Sequence[Mapping[str, Any]]) -> Curve:
    return Curve(
        tuple(record["loss"] for record in records),
        tuple((record["step"], record["val_loss"]) for record in records if "val_loss" in record),
    )


def _last_error(folder: Path) -> str:
    """The last line that looks like an error, of the first rank that has one."""
    logs = [log.read_text(errors="replace").splitlines() for log in sorted(folder.glob("rank*.log"))]
    for lines in logs:
        found = [line.strip() for line in lines if re.match(r"\S*(Error|Exception|Terminate)\b.*:?", line.strip())]
        if found:
            return found[-1][:500]
    ends = [lines[-1].strip() for lines in logs if lines]
    return ends[0][:500] if ends else "it said nothing"


def _identity(way: Way, machine: Machine, steps: int) -> dict[str, Any]:
    """All that what a run learns depends on: not its links, and not how fast its hosts are."""
    content = (CONFIGS / way.config).read_bytes()
    named = {key: value for key, value in asdict(replace(way, label="")).items() if key != "varies"}
    place = {key: value for key, value in asdict(machine).items() if key != "places"}
    told = {**named, **place, "steps": steps, "digest": hashlib.sha256(content).hexdigest()[:12]}
    found: dict[str, Any] = json.loads(json.dumps(told))
    return found


def _of(machine: Machine, timings: Mapping[float, Timing]) -> dict[float, Timing]:
    """Without the seconds of hosts that had other processors."""
    return {rate: timing for rate, timing in timings.items() if timing.cores_per_rank == machine.cores_per_rank}


def _outcome(entry: Mapping[str, Any]) -> Outcome:
    curve = entry["curve"]
    timings = {
        float(rate): Timing(**{**timing, "step_s": tuple(timing["step_s"])})
        for rate, timing in entry["timings"].items()
    }
    return Outcome(
        timings,
        Curve(tuple(curve["losses"]), tuple((step, loss) for step, loss in curve["validation"])) if curve else None,
        tuple(entry["first_losses"]),
        entry["error"],
    )
