"""What runs record for a report: whose times, which operations, what a compressor left out, traces."""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from gossip_posts import place_for
from memory import Memory
from ranks import Rank, run_ranks
from worlds import close_world, small_config, small_config_file, thread_world

from thinwire.comm.compress.compressors.top_k import TopK
from thinwire.comm.compress.standalone import CompressedMean
from thinwire.comm.gossip.message import Kind, Message
from thinwire.comm.gossip.port import Wait
from thinwire.dist.metrics import Record
from thinwire.dist.run_facts import write_facts
from thinwire.dist.step_reports import StepReports
from thinwire.dist.train import Trainer
from thinwire.launch.report.report import write_report
from thinwire.launch.report.run import read_run
from thinwire.launch.report.step_time import rank_times
from thinwire.launch.report.trace import read_trace
from thinwire.launch.train import main


def test_a_step_report_tells_losses_times_and_wishes_in_16_bytes() -> None:
    def work(rank: Rank) -> Any:
        queue = rank.queue()
        reports = StepReports(queue)
        loss = math.nan if rank.rank == 1 else 0.1 + rank.rank
        reports.send(loss, rank.rank == 2, computed_s=0.5 * rank.rank, waited_s=0.0 if rank.rank else 0.25)
        report = reports.read()
        sent = queue.meter.sent_bytes("control/flags")
        queue.close()
        queue.monitor.close()
        return report, sent

    for report, sent in run_ranks(3, work):
        assert sent == {"world": 2 * 16}
        assert report.loss == (0.1 + 2.1) / 2
        assert (report.non_finite_ranks, report.stopping_ranks) == ((1,), (2,))  # rank 2 waited 0 s, which has a sign
        assert (report.computed_s, report.waited_s) == ((0.0, 0.5, 1.0), (0.25, 0.0, 0.0))
        assert report.record()["compute_ms_by_rank"] == [0.0, 500.0, 1000.0]


def test_records_name_operations_and_every_ranks_times(tmp_path: Path) -> None:
    config = small_config(tmp_path, "engine.bucket_mb=0.02")

    def work(rank: Rank) -> list[Record]:
        world = thread_world(rank)
        memory = Memory()
        try:
            Trainer(config, world).run([memory])
        finally:
            close_world(world)
        return memory.records

    first, second = run_ranks(2, work, timeout_s=120)
    for mine, others in zip(first, second, strict=True):
        told = mine["operations"]
        assert set(told) == {"allreduce/bucket", "control/flags"} - ({"control/flags"} if mine["step"] == 1 else set())
        traffic = told["allreduce/bucket"]["node"]
        assert {"node": traffic["sent_bytes"]} == mine["sent_bytes_by_level"]
        assert traffic["received_bytes"] == mine["received_bytes"]
        assert traffic["calls"] == 2 * mine["method"]["buckets"] > 2 * (mine["step"] > 1)
        assert traffic["seconds"] > 0
        # Every rank has the same times of all, its own among them.
        assert mine["compute_ms_by_rank"] == others["compute_ms_by_rank"]
        assert mine["compute_ms_by_rank"] == pytest.approx([mine["compute_ms"], others["compute_ms"]], abs=2e-3)
        waited = [mine["exposed_comm_ms"], others["exposed_comm_ms"]]
        assert mine["exposed_comm_ms_by_rank"] == pytest.approx(waited, abs=2e-3)


def test_a_run_leaves_facts_and_a_trace_and_can_be_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = small_config_file(tmp_path)
    assert main(file, ["train.steps=3", "output.trace_steps=[2, 3]"]) == 0
    assert main(file, ["train.steps=4"]) == 0
    capsys.readouterr()
    run = read_run(tmp_path / "runs" / "small")
    assert [start["after_steps"] for start in run.starts] == [0, 3]
    assert run.facts["ranks"] == 1
    assert set(run.facts["data"]) == {"training text", "validation text"}
    assert run.facts["parameters"] > 1000
    assert run.facts["tokens_per_step"] == 8 * 32
    (path,) = run.traces
    trace = read_trace(path)
    assert trace.steps == [2, 3]
    for number in (2, 3):
        step = trace.step(number)
        assert step is not None
        inside = [span for span in trace.spans if step.begin_s <= span.begin_s < step.end_s]
        assert {"forward", "backward", "optimizer"} <= {span.name for span in inside}
        # The queue's thread is another one: the profiler must watch it too.
        assert any(span.name == "thinwire::control/flags" for span in trace.spans)
    written = write_report([run], tmp_path / "out")
    assert {"trace_0_small.json.gz", "timeline_0_small.png"} <= {path.name for path in written.files}
    with gzip.open(tmp_path / "out" / "trace_0_small.json.gz") as packed:
        names = Counter(event["name"] for event in json.load(packed)["traceEvents"] if event.get("ph") == "X")
    assert names["step 2"] == names["step 3"] == 1
    assert any(name.startswith("aten::") for name in names)
    assert rank_times(run) == []


def test_a_run_that_begins_again_forgets_the_starts_that_it_undoes(tmp_path: Path) -> None:
    for after, ranks in ((0, 2), (3, 4), (5, 8), (3, 16)):
        write_facts(tmp_path, {"ranks": ranks}, after)
    starts = json.loads((tmp_path / "run.json").read_text())["starts"]
    assert [(start["after_steps"], start["ranks"]) for start in starts] == [(0, 2), (3, 16)]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("[3, 2]", r"trace_steps: \[3, 2\]; give the first and the last step"),
        ("[0, 2]", r"counted from 1"),
        ("[1, 90]", r"no more than 50 steps"),
        ("[4, 9]", r"output\.trace_steps: \[4, 9\], but the run ends after train\.steps: 4"),
    ],
)
def test_steps_that_cannot_be_traced_are_refused(tmp_path: Path, steps: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_config(tmp_path, f"output.trace_steps={steps}")


@pytest.mark.parametrize("feedback", ["ef", "none", "ef21"])
def test_the_compression_error_is_what_was_left_out(feedback: str) -> None:
    """Of 4 times the largest 2 of 8 entries, of a tensor that the feedback has not changed yet."""
    x = torch.tensor([3.0, -4.0, 1.0, 0.5, -1.0, 0.0, 2.0, 0.25])

    def work(rank: Rank) -> list[dict[str, float]]:
        queue = rank.queue()
        mean = CompressedMean(
            {"x": x}, compressor=TopK(density=0.25, values="fp32"), feedback=feedback, dense_below=0, queue=queue
        )
        told = []
        for _ in range(2):
            assert mean.allreduce({"x": x.clone()})
            told.append(mean.metrics())
        queue.close()
        queue.monitor.close()
        return told

    left = x.square().sum() - 25.0
    for first, second in run_ranks(2, work):
        assert first["compression_error"] == pytest.approx(math.sqrt(left / x.square().sum()), rel=1e-6)
        assert "compression_error" not in second  # costs two passes, so it is measured in some of the steps


def test_a_post_knows_for_whom_it_has_waited() -> None:
    def message(number: int) -> Message:
        return Message(Kind.VALUE, number, payload=torch.zeros(4, dtype=torch.uint8))

    with place_for(3) as place:
        zero, one, two = place.enter_all()
        two.send(0, message(1))
        zero.wait(Wait(lambda: zero.newest(2, Kind.VALUE) == 1, zero.now() + 30.0))
        before = dict(zero.waited_for_s)
        assert set(before) <= {2}

        def late() -> bool:
            """Asked once before anything blocks: only then does machine 1 send."""
            if not sent:
                sent.append(one.send(0, message(1)))
            return zero.newest(1, Kind.VALUE) == 1

        sent: list[None] = []
        zero.wait(Wait(late, zero.now() + 30.0))
        assert zero.waited_for_s[1] > 0
        assert zero.exposed_s == pytest.approx(sum(zero.waited_for_s.values()))
        assert dict(zero.waited_for_s) == before | {1: zero.waited_for_s[1]}
