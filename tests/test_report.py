"""`thinwire report`: numbers worked out by hand, runs that cannot be compared, and a page that needs nothing else."""

from __future__ import annotations

import base64
import gzip
import json
import subprocess
import sys
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report_runs import plain_record, write_run

from thinwire.launch.report.command import report
from thinwire.launch.report.comparable import differences, settings_that_differ
from thinwire.launch.report.loss_curves import draw_curves
from thinwire.launch.report.outcome import outcome_of
from thinwire.launch.report.report import write_report
from thinwire.launch.report.run import ReportError, read_run, read_runs, with_modelled_link
from thinwire.launch.report.step_time import rank_times, step_times, waited_for
from thinwire.launch.report.table import print_table
from thinwire.launch.report.trace import merge_traces, read_trace
from thinwire.launch.report.traffic import traffic_of

PNG = b"\x89PNG\r\n\x1a\n"


def test_measured_times_are_taken_without_the_first_step(tmp_path: Path) -> None:
    outcome = outcome_of(read_run(write_run(tmp_path / "a")))
    assert outcome.compute_ms_median == 100.0
    assert outcome.step_s_median == pytest.approx(0.15)
    assert outcome.step_s_mean == pytest.approx((0.95 + 3 * 0.15) / 4)
    assert outcome.outside_s == pytest.approx(8.0 - 0.95 - 3 * 0.15)
    assert outcome.sent_bytes_mean == 1048
    assert outcome.interface_bytes_mean == 1100
    assert outcome.validation == ((4.0, 4.0), (8.0, 2.0))
    assert outcome.bits_per_byte == 4.0
    assert outcome.waiting_ms_median is None
    assert not outcome.modelled


def test_a_modelled_link_replaces_the_measured_communication(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", partial(plain_record, sent_bytes=1_250_000))
    outcome = outcome_of(with_modelled_link(read_run(folder), 10e6))  # 10 Mbit in a second of 10 Mbit/s
    assert outcome.exposed_comm_ms_median == pytest.approx(1000.0)
    assert outcome.step_s_median == pytest.approx(1.1)
    assert outcome.seconds[0] == pytest.approx(2.0 + 0.95)
    assert outcome.seconds[3] == pytest.approx(8.0 + 4 * 0.95)
    assert outcome.interface_bytes_mean is None
    assert outcome.modelled


def cells(table: str) -> dict[str, list[str]]:
    lines = [line.split("│")[1:-1] for line in table.splitlines() if line.startswith("│")]
    return {name.strip(): [cell.strip() for cell in row] for name, *row in lines}


def test_table_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow = write_run(tmp_path / "slow", partial(plain_record, exposed_comm_ms=300.0))
    fast = write_run(tmp_path / "fast", partial(plain_record, exposed_comm_ms=100.0))
    outcomes = [outcome_of(run) for run in read_runs([slow, fast])]
    print_table(outcomes, title="2 hosts")
    rows = cells(capsys.readouterr().out)
    assert rows["seconds per step"] == ["0.400", "0.200"]
    assert rows["steps per second, against the first"] == ["1.00x", "2.00x"]
    assert rows["interface / metered"] == ["1.0496", "1.0496"]
    assert not {"busiest expert, times the mean", "waiting for slower ranks, ms", "validation accuracy"} & set(rows)
    draw_curves(outcomes, tmp_path / "plots" / "loss.png", title="2 hosts")
    assert (tmp_path / "plots" / "loss.png").read_bytes().startswith(PNG)


def test_runs_with_experts_say_how_even_the_loads_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experts = write_run(tmp_path / "experts", partial(plain_record, balance={"max_violation": 0.25}))
    print_table([outcome_of(run) for run in read_runs([write_run(tmp_path / "dense"), experts])], title="")
    assert cells(capsys.readouterr().out)["busiest expert, times the mean"] == ["-", "1.25"]


def slow_rank(step: int) -> dict[str, Any]:
    """Rank 2 computes longest in all steps but the last one, which rank 1 ends; all have 10 ms of communication."""
    compute = [60.0, 70.0, 100.0] if step < 4 else [60.0, 90.0, 80.0]
    exposed = [110.0 - ms for ms in compute] if step < 4 else [100.0 - ms for ms in compute]
    return plain_record(
        step, compute_ms=60.0, exposed_comm_ms=exposed[0], compute_ms_by_rank=compute, exposed_comm_ms_by_rank=exposed
    )


def test_what_is_more_than_the_rank_that_waits_least_has_is_waiting(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a", slow_rank))
    times = step_times(run)
    assert times.exposed == (10.0,) * 4
    assert times.waiting == (40.0, 40.0, 40.0, 30.0)
    assert times.total == [110.0, 110.0, 110.0, 100.0]
    ranks = rank_times(run)  # of the last three steps
    assert [rank.last for rank in ranks] == [0.0, pytest.approx(1 / 3), pytest.approx(2 / 3)]
    # Beyond the last rank's 10 ms the others waited 40 and 30 ms for rank 2, twice, and 30 and 10 ms for rank 1.
    assert [rank.others_waited for rank in ranks] == [0.0, pytest.approx(40 / 2 / 3), pytest.approx(2 * 70 / 2 / 3)]
    assert outcome_of(run).waiting_ms_median == 40.0


def test_machines_of_gossip_tell_for_whom_they_waited(tmp_path: Path) -> None:
    told = {"waited_for_s/1": 0.5, "waited_for_s/12": 2.0, "swaps": 3.0}
    run = read_run(write_run(tmp_path / "a", partial(plain_record, method=told)))
    assert waited_for(run) == {1: 0.5, 12: 2.0}
    assert rank_times(run) == []


def test_traffic_is_the_mean_over_all_steps(tmp_path: Path) -> None:
    def record(step: int) -> dict[str, Any]:
        node = {"calls": 2, "sent_bytes": 300, "received_bytes": 100, "seconds": 0.5}
        world = {"calls": 1, "sent_bytes": 1000, "received_bytes": 1000, "seconds": 0.25}
        every_second = {"local_sgd/group": {"node": node, "world": world}} if step % 2 == 0 else {}
        return plain_record(step, operations={"control/flags": {"world": {**world, "sent_bytes": 16}}, **every_second})

    rows = [(r.operation, r.level, r.calls, r.sent_bytes, r.received_bytes, r.seconds) for r in traffic_of(
        read_run(write_run(tmp_path / "a", record)))]  # fmt: skip
    assert rows == [
        ("local_sgd/group", "world", 0.5, 500.0, 500.0, 0.125),
        ("local_sgd/group", "node", 1.0, 150.0, 50.0, 0.25),
        ("control/flags", "world", 1.0, 16.0, 1000.0, 0.25),
    ]


@pytest.mark.parametrize(
    ("config", "facts", "what", "forbids"),
    [
        ({"data.corpus": "domains"}, {}, "data.corpus", True),
        ({"train.eval_windows": 32}, {}, "train.eval_windows", True),
        ({"model.context": 64}, {}, "model.context", True),
        ({}, {"data": {"training text": "SHA 1", "validation text": "SHA 3"}}, "validation text", True),
        ({"seed": 1}, {}, "seed", False),
        ({"train.global_batch": 16}, {}, "train.global_batch", False),
        ({"model.width": 128}, {}, "model", False),
        ({"optimizer.lr": 2e-3}, {}, "optimizer", False),
        ({"checkpoint.resume": "runs/other/checkpoints"}, {}, "checkpoint.resume", False),
        ({}, {"ranks": 4}, "ranks", False),
        ({}, {"torch": "3"}, "torch", False),
    ],
)
def test_every_difference_is_told_and_what_changes_the_loss_forbids(
    tmp_path: Path, config: dict[str, Any], facts: dict[str, Any], what: str, forbids: bool
) -> None:
    plain = write_run(tmp_path / "plain", config={"name": "plain"})
    runs = read_runs([plain, write_run(tmp_path / "other", config=config, facts=facts)])
    (difference,) = differences(runs)
    assert (difference.what, difference.forbids) == (what, forbids)
    sentence = difference.sentence(["plain", "other"])
    assert sentence.startswith(f"{what}: ")
    assert " in plain; " in sentence
    assert " in other. So " in sentence


def test_what_is_compared_on_purpose_is_no_note_but_a_row(tmp_path: Path) -> None:
    other = write_run(tmp_path / "b", config={"method": {"kind": "compress", "rank": 4}, "train.eval_every": 2})
    runs = read_runs([write_run(tmp_path / "a"), other])
    assert differences(runs) == []
    assert dict(settings_that_differ(runs)) == {
        "method.kind": ("allreduce", "compress"),
        "method.dtype": ("fp32", "-"),
        "method.rank": ("-", "4"),
    }


@pytest.fixture
def quick_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that every report has, not drawn: for tests of what stands around them."""
    for name in ("loss_figure", "time_figure", "steps_figure"):
        monkeypatch.setattr(f"thinwire.launch.report.report.{name}", lambda *_: PNG)


@pytest.mark.usefixtures("quick_pictures")
def test_runs_that_cannot_be_compared_are_refused_unless_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_run(tmp_path / "b", config={"data.validation_fraction": 0.2, "seed": 3})
    folders = [write_run(tmp_path / "a"), other]
    assert report(folders, out=tmp_path / "out", anyway=False, modelled_link=None) == 2
    said = capsys.readouterr().err
    assert "cannot be compared" in said
    assert "data.validation_fraction: 0.05 in a; 0.2 in b. So other text is kept for validation" in said
    assert not (tmp_path / "out").exists()
    assert report(folders, out=tmp_path / "out", anyway=True, modelled_link=None) == 0
    said = capsys.readouterr().err
    assert "note: data.validation_fraction" in said
    assert "note: seed: 0 in a; 3 in b" in said
    assert (tmp_path / "out" / "report.html").read_text().count('<li class="forbids">') == 1


class Page(HTMLParser):
    """What a browser would fetch or run, and the pictures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.pictures: list[bytes] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        if tag in ("script", "link", "iframe", "object"):
            self.fetched.append(tag)
        source = given.get("src") or ""
        if tag == "img" and source.startswith("data:image/png;base64,"):
            self.pictures.append(base64.b64decode(source.partition(",")[2]))
        elif source:
            self.fetched.append(source)
        if tag == "a":
            self.links.append(given["href"] or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_alone(tmp_path: Path) -> None:
    def record(step: int) -> dict[str, Any]:
        told = {"consensus_distance": 1.0 / step, "compression_error": 0.5}
        operation = {"world": {"calls": 1, "sent_bytes": 1000, "received_bytes": 1000, "seconds": 0.01}}
        balance = {"max_violation": 0.5}
        return slow_rank(step) | {"method": told, "balance": balance, "operations": {"allreduce/bucket": operation}}

    runs = read_runs([write_run(tmp_path / "<b>fp32 & co", record), write_run(tmp_path / "plain")])
    written = write_report(runs, tmp_path / "out")
    text = written.page.read_text()
    page = Page(text)
    assert page.fetched == []
    assert "url(" not in text
    assert "@import" not in text
    names = [path.name for path in written.files if path.suffix == ".png"]
    assert names == ["loss.png", "time.png", "steps.png", "ranks.png", "traffic.png", "method.png"]
    assert page.pictures == [(tmp_path / "out" / name).read_bytes() for name in names]
    assert all(png.startswith(PNG) for png in page.pictures)
    assert "<b>fp32 & co" in page.text  # as text, not as a tag
    assert "all but control, world" in page.text
    assert "1,000 bytes" in page.text


@pytest.mark.usefixtures("quick_pictures")
def test_a_run_of_an_older_version_is_reported_without_what_it_does_not_tell(tmp_path: Path) -> None:
    folder = tmp_path / "old"
    write_run(folder, lambda step: {k: v for k, v in plain_record(step).items() if not k.startswith("val_")})
    (folder / "run.json").unlink()
    (folder / "config.yaml").unlink()
    written = write_report([read_run(folder)], tmp_path / "out")
    assert [path.name for path in written.files] == ["report.html", "loss.png", "time.png", "steps.png"]
    assert "not recorded" in written.page.read_text()


@pytest.mark.usefixtures("quick_pictures")
def test_missing_and_damaged_records_are_named(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"nowhere: there is no such folder"):
        read_run(tmp_path / "nowhere")
    folder = write_run(tmp_path / "runs" / "a", lambda step: {k: v for k, v in plain_record(step).items()
                                                              if step != 3 or k != "compute_ms"})  # fmt: skip
    with pytest.raises(ReportError, match=r"step 3 has no number 'compute_ms'"):
        read_run(folder)
    with pytest.raises(ReportError, match=r"runs: it is no run, but holds some: a; give .*runs/\*"):
        read_run(tmp_path / "runs")
    metrics = folder / "metrics.jsonl"
    metrics.write_text(json.dumps(plain_record(1)) + '\n{"step": 2, \n' + json.dumps(plain_record(3)) + "\n")
    with pytest.raises(ReportError, match=r"metrics\.jsonl: line 2 is not JSON"):
        read_run(folder)
    metrics.write_text("[1]\n")
    with pytest.raises(ReportError, match=r"line 1 is no record of a step"):
        read_run(folder)
    metrics.write_text('{"step": 1, "lo')
    with pytest.raises(ReportError, match=r"holds no step"):
        read_run(folder)
    metrics.write_text(json.dumps(plain_record(1, operations={"a": {"world": {"calls": 1}}})) + "\n")
    with pytest.raises(ReportError, match=r"step 1: operations\.a\.world has no 'sent_bytes'"):
        write_report([read_run(folder)], tmp_path / "out")
    (folder / "run.json").write_text('{"format": 1}')
    with pytest.raises(ReportError, match=r"run\.json: cannot be read"):
        read_run(folder)


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    one, other = (write_run(tmp_path / parent / "fp32") for parent in ("10mbit", "1gbit"))
    assert [run.label for run in read_runs([one, other])] == ["10mbit/fp32", "1gbit/fp32"]
    with pytest.raises(ReportError, match="given twice"):
        read_runs([one, other, tmp_path / "1gbit" / "." / "fp32"])


def write_trace(folder: Path, rank: int, base_ns: int) -> Path:
    def span(name: str, ts: float, dur: float, tid: int = 1, **more: Any) -> dict[str, Any]:
        return {"ph": "X", "cat": "user_annotation", "name": name, "pid": 77, "tid": tid, "ts": ts, "dur": dur, **more}

    events = [
        {"ph": "M", "name": "process_name", "pid": 77, "tid": 0, "ts": 0, "args": {"name": "python"}},
        span("step 2", 0, 1000),
        span("forward", 10, 300),
        span("backward", 320, 500),
        span("wait: allreduce/bucket0", 700, 100),
        span("thinwire::allreduce/bucket0", 500, 300, tid=2),
        span("aten::mm", 20, 5),
        {"ph": "s", "id": 4, "pid": 77, "tid": 1, "ts": 20, "name": "fwdbwd", "cat": "fwdbwd"},
    ]
    facts = {"rank": rank, "host": f"host{rank}", "steps": [2, 2]}
    path = folder / f"rank{rank}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"thinwire": facts, "baseTimeNanoseconds": base_ns, "traceEvents": events}))
    return path


def test_traces_of_ranks_become_one_on_one_axis_of_time(tmp_path: Path) -> None:
    paths = [write_trace(tmp_path, rank, base_ns) for rank, base_ns in ((0, 5_000_000), (1, 3_000_000))]
    traces = [read_trace(path) for path in paths]
    assert [trace.steps for trace in traces] == [[2], [2]]
    step = traces[0].step(2)
    assert step is not None
    assert (step.begin_s, step.end_s) == (pytest.approx(0.005), pytest.approx(0.006))
    merge_traces(traces, tmp_path / "all.json.gz")
    with gzip.open(tmp_path / "all.json.gz") as file:
        events = json.load(file)["traceEvents"]
    forward = {event["pid"]: event["ts"] for event in events if event["name"] == "forward"}
    assert forward == {0: 10 + 2000, 1000: 10}  # the clocks began 2 ms apart
    assert {e["args"]["name"] for e in events if e["ph"] == "M"} == {
        "rank 0 on host0: python",
        "rank 1 on host1: python",
    }
    assert [event["id"] for event in events if "id" in event] == ["0/4", "1/4"]


@pytest.mark.usefixtures("quick_pictures")
def test_a_report_links_the_traces_and_draws_a_step(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "traced", facts={"ranks": 3})
    for rank in range(2):
        write_trace(folder / "traces", rank, 0)
    written = write_report([read_run(folder)], tmp_path / "out")
    assert {"trace_0_traced.json.gz", "timeline_0_traced.png"} <= {path.name for path in written.files}
    page = Page(written.page.read_text())
    assert page.links == ["trace_0_traced.json.gz"]
    assert "Traces of 1 ranks are missing" in page.text
    (folder / "traces" / "rank1.json").write_text('{"traceEvents": []}')
    with pytest.raises(ReportError, match=r"rank1\.json: it is no trace"):
        write_report([read_run(folder)], tmp_path / "out")


def test_the_command_starts_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from thinwire.launch.cli import app\n"
        f"try: app(['report', {str(tmp_path)!r}])\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert said.stdout.splitlines()[-1] == "2 False"  # it has read and drawn nothing, but imported all
    assert "has no metrics.jsonl" in said.stderr
