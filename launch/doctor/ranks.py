"""What the ranks of a job find, side by side: who differs from the others, and who did not answer."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from thinwire.dist.host import Host, distinct_names, this_host
from thinwire.launch.doctor.finding import Finding

if TYPE_CHECKING:
    import torch.distributed as dist


# Training refuses to start where these differ; other differences are worth knowing.
MUST_AGREE = ("thinwire", "torch")


@dataclass(frozen=True)
class Difference:
    """A topic on which the ranks disagree: what was found, with the ranks that found it, most ranks first."""

    topic: str
    values: tuple[tuple[str, tuple[int, ...]], ...]

    def odd_ranks(self) -> tuple[int, ...]:
        """The ranks that differ from most; empty when no value has a majority."""
        first, *rest = self.values
        majority = 2 * len(first[1]) > sum(len(ranks) for _, ranks in self.values)
        return tuple(sorted(rank for _, ranks in rest for rank in ranks)) if majority else ()


@dataclass(frozen=True)
class HostRow:
    """One host of the job, with what may differ between hosts."""

    host: str
    ranks: tuple[int, ...]
    network: str
    gpus: str


@dataclass(frozen=True)
class Comparison:
    """The whole job: hosts, differences, problems of single ranks as (rank, finding), and the silent ranks."""

    world_size: int
    hosts: tuple[HostRow, ...]
    differences: tuple[Difference, ...]
    problems: tuple[tuple[int, Finding], ...]
    missing_ranks: tuple[int, ...]

    @property
    def ok(self) -> bool:
        """Whether the job can train: everybody is there, can train, and has the same thinwire and torch."""
        refused = any(difference.topic in MUST_AGREE for difference in self.differences)
        return not (refused or self.problems or self.missing_ranks)


def record_of(findings: Sequence[Finding]) -> dict[str, Any]:
    """What a rank tells the others."""
    return {"host": asdict(this_host()), "findings": [asdict(finding) for finding in findings]}


def gather(
    store: dist.Store, rank: int, size: int, record: Mapping[str, Any], wait_s: float
) -> dict[int, dict[str, Any]]:
    """On rank 0 the records of all ranks that answer within wait_s seconds, by rank; on the others nothing."""
    store.set(f"doctor/{rank}", json.dumps(record))
    if rank != 0:
        return {}
    keys = {peer: f"doctor/{peer}" for peer in range(size)}
    _poll(lambda: store.check(list(keys.values())), wait_s)
    silent = {peer for peer, key in keys.items() if not store.check([key])}
    return {peer: json.loads(store.get(f"doctor/{peer}")) for peer in range(size) if peer not in silent}


def share_verdict(store: dist.Store, rank: int, answered: int, ok: bool, wait_s: float) -> bool:
    """Rank 0's verdict, on every rank. Rank 0 stays until the others have it, because its end ends the store.

    Also keeps a launcher from ending rank 0 before it has printed: the others leave with an error code only now.
    """
    if rank == 0:
        store.set("doctor/verdict", str(int(ok)))
        _poll(lambda: store.add("doctor/left", 0) >= answered - 1, wait_s)
        return ok
    arrived = _poll(lambda: store.check(["doctor/verdict"]), wait_s)
    ok = arrived and store.get("doctor/verdict") == b"1"
    store.add("doctor/left", 1)
    return ok


def compare(records: Mapping[int, Mapping[str, Any]], size: int) -> Comparison:
    """Group the ranks' records by host, and by what they found on each topic that they should agree on."""
    ranks = sorted(records)
    names = distinct_names([Host(**records[rank]["host"]) for rank in ranks])
    findings = {rank: [Finding(**fields) for fields in records[rank]["findings"]] for rank in ranks}
    topics = dict.fromkeys(f.topic for rank in ranks for f in findings[rank] if f.shared)
    differences = []
    for topic in topics:
        by_value: dict[str, list[int]] = {}
        for rank in ranks:
            found = next((f.found for f in findings[rank] if f.topic == topic), "not checked")
            by_value.setdefault(found, []).append(rank)
        if len(by_value) > 1:
            ordered = sorted(by_value.items(), key=lambda entry: (-len(entry[1]), entry[1]))
            differences.append(Difference(topic, tuple((value, tuple(found_by)) for value, found_by in ordered)))
    hosts = []
    for name in dict.fromkeys(names):
        here = [rank for rank, own in zip(ranks, names, strict=True) if own == name]
        told = {f.topic: f.found for f in findings[here[0]]}
        hosts.append(HostRow(name, tuple(here), told.get("network", "?"), told.get("gpus", "?")))
    return Comparison(
        world_size=size,
        hosts=tuple(hosts),
        differences=tuple(differences),
        problems=tuple((rank, f) for rank in ranks for f in findings[rank] if f.state == "problem"),
        missing_ranks=tuple(rank for rank in range(size) if rank not in records),
    )


def _poll(done: Callable[[], bool], wait_s: float) -> bool:
    """Whether `done` comes true within wait_s seconds. The store's own wait writes warnings when its time is up."""
    deadline = time.monotonic() + wait_s
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
