"""The command: find out, compare with the other ranks where there are any, print, and answer by exit code."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from thinwire.dist.place import Place
from thinwire.launch.doctor import machine, software
from thinwire.launch.doctor.finding import Finding
from thinwire.launch.doctor.import_probe import ProbeError, probe_torch
from thinwire.launch.doctor.ranks import Comparison, compare, gather, record_of, share_verdict
from thinwire.launch.doctor.report import print_comparison, print_findings, print_json
from thinwire.launch.env import LaunchError, detect


def doctor(as_json: bool, wait_s: float) -> int:
    """Examine this machine, or this rank and its job; 0 when training is possible, else 1.

    Args: wait_s, how long rank 0 waits for the other ranks' answers, in seconds.
    """
    place, refusal = _place()
    findings = examine(place, refusal)
    ok = all(finding.state != "problem" for finding in findings)
    if place is None or place.world_size == 1:
        _print(findings, None, ok, as_json)
        return int(not ok)
    if any(finding.topic == "torch" and finding.state == "problem" for finding in findings):
        print(f"rank {place.rank} cannot meet the others without torch. It has found:", file=sys.stderr)
        print_findings(findings, sys.stderr)
        # A launcher ends the whole job with the first rank that fails: leave rank 0 the time to tell who is missing.
        time.sleep(wait_s)
        return 1
    return int(not _examine_job(place, findings, as_json, wait_s))


def examine(place: Place | None = None, refusal: str = "") -> list[Finding]:
    """Everything that this process can find out about its machine and its software."""
    probed: dict[str, Any] | ProbeError
    try:
        probed = probe_torch()
    except ProbeError as error:
        probed = error
    alone = place is None or place.world_size == 1
    checks: list[tuple[str, Callable[[], Finding | list[Finding]]]] = [
        ("machine", machine.check_machine),
        ("python", software.check_python),
        ("thinwire", software.check_thinwire),
        ("packages", software.check_packages),
        ("torch", lambda: software.check_torch(probed)),
        ("backends", lambda: software.check_backends(probed) if isinstance(probed, dict) else []),
        ("triton", lambda: software.check_triton(probed)),
        ("gpus", lambda: machine.check_gpus(probed)),
        ("network", lambda: machine.check_network(place)),
        ("launcher", lambda: machine.check_launcher(place, refusal)),
        ("mpi", software.check_mpi),
        ("slurm", lambda: machine.check_slurm() if alone else []),
        ("lab", lambda: machine.check_lab() if alone else []),
        ("optional packages", software.check_optional),
    ]
    return [finding for topic, check in checks for finding in _guarded(topic, check)]


def _guarded(topic: str, check: Callable[[], Finding | list[Finding]]) -> list[Finding]:
    """The check's findings; a check that fails itself must not hide what the others find."""
    try:
        found = check()
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        return [Finding(topic, "limited", "could not be examined", detail=text, without="knowing more about it")]
    return found if isinstance(found, list) else [found]


def _place() -> tuple[Place | None, str]:
    try:
        return detect(), ""
    except LaunchError as error:
        return None, str(error)


def _examine_job(place: Place, findings: Sequence[Finding], as_json: bool, wait_s: float) -> bool:
    from thinwire.dist.rendezvous import open_store

    try:
        store = open_store(place, wait_s)
        records = gather(store, place.rank, place.world_size, record_of(findings), wait_s)
        comparison = compare(records, place.world_size) if place.rank == 0 else None
        ok = comparison is not None and comparison.ok
        if comparison is not None:
            _print(findings, comparison, ok, as_json)
        return share_verdict(store, place.rank, len(records), ok, 2 * wait_s)
    except RuntimeError as error:
        print(f"rank {place.rank} of {place.world_size}: {error}", file=sys.stderr)
        return False


def _print(findings: Sequence[Finding], comparison: Comparison | None, ok: bool, as_json: bool) -> None:
    if as_json:
        print_json(findings, comparison, ok)
        return
    print_findings(findings)
    if comparison is not None:
        print(f"\nThe above is rank 0 of {comparison.world_size}. The job:")
        print_comparison(comparison)
    sys.stdout.flush()
