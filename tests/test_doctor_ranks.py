"""`thinwire doctor` under a launcher: what it says about ranks that differ, or do not answer."""

from __future__ import annotations

import io
import json
import threading

from torch.distributed import HashStore

from thinwire.launch.doctor.finding import Finding
from thinwire.launch.doctor.ranks import Comparison, compare, gather, record_of, share_verdict
from thinwire.launch.doctor.report import print_comparison


def job(*torch_versions: str, hosts: str = "", silent: tuple[int, ...] = ()) -> Comparison:
    records = {}
    for rank, version in enumerate(torch_versions):
        findings = [
            Finding("torch", "ok", version, shared=True),
            Finding("network", "ok", f"eth0 10.0.0.{rank}"),
            Finding("gpus", "ok", "none", shared=True),
        ]
        host = {"name": (hosts or "a" * 99)[rank], "boot_id": "1"}
        records[rank] = json.loads(json.dumps(record_of(findings) | {"host": host}))
    return compare({rank: record for rank, record in records.items() if rank not in silent}, len(torch_versions))


def test_the_odd_rank_is_named():
    comparison = job("2.13.0", "2.13.0", "2.12.1", "2.13.0")
    (difference,) = comparison.differences
    assert (difference.topic, difference.odd_ranks()) == ("torch", (2,))
    assert not comparison.ok
    out = io.StringIO()
    print_comparison(comparison, out)
    assert "torch  2.13.0  0-1, 3" in out.getvalue()
    assert "torch  2.12.1  2         differs" in out.getvalue()
    assert "torch: rank 2 differs. Training refuses to start: install the same on every rank." in out.getvalue()


def test_without_a_majority_nobody_is_blamed():
    (difference,) = job("1", "1", "2", "2").differences
    assert difference.values == (("1", (0, 1)), ("2", (2, 3)))
    assert difference.odd_ranks() == ()


def test_hosts_are_listed_with_their_ranks_and_interfaces():
    comparison = job("1", "1", "1", "1", hosts="abab")
    assert comparison.ok
    assert [(row.host, row.ranks, row.network) for row in comparison.hosts] == [
        ("a", (0, 2), "eth0 10.0.0.0"),
        ("b", (1, 3), "eth0 10.0.0.1"),
    ]


def test_ranks_that_do_not_answer_are_named_after_the_time_limit():
    store = HashStore()
    outcome: dict[int, tuple[int, bool]] = {}

    def body(rank: int) -> None:
        records = gather(store, rank, 4, record_of([Finding("torch", "ok", "1", True)]), 0.5 if rank == 0 else 60)
        ok = rank == 0 and compare(records, 4).ok
        outcome[rank] = (len(records), share_verdict(store, rank, len(records), ok, 60))

    others = [threading.Thread(target=body, args=(rank,)) for rank in (1, 3)]
    for thread in others:
        thread.start()
    for rank in (1, 3):
        store.wait([f"doctor/{rank}"])
    body(0)
    for thread in others:
        thread.join(60)
    assert outcome == {0: (3, False), 1: (0, False), 3: (0, False)}
    comparison = job("1", "1", "1", "1", silent=(2,))
    assert (comparison.missing_ranks, comparison.ok) == ((2,), False)
    out = io.StringIO()
    print_comparison(comparison, out)
    assert "No answer from rank 2 of 4" in out.getvalue()


def test_a_problem_of_one_rank_is_the_jobs():
    good, bad = (
        record_of([Finding("network", state, "x", without="this job" * (state != "ok"))]) for state in ("ok", "problem")
    )
    comparison = compare({0: good, 1: bad}, 2)
    assert not comparison.ok
    out = io.StringIO()
    print_comparison(comparison, out)
    assert "Rank 1: network: x; prevents: this job" in out.getvalue()
