"""Runs side by side: what the table and the plot take from metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from thinwire.launch.comparison import draw_curves, print_table, read_outcome


def write_run(folder: Path, *, exposed_ms: float, sent_bytes: int) -> Path:
    folder.mkdir()
    records = []
    for step in range(1, 5):
        record = {
            "step": step,
            "loss": 5.0 - step,
            "seconds": 2.0 * step,
            "compute_ms": 100.0 if step > 1 else 900.0,
            "exposed_comm_ms": exposed_ms,
            "sent_bytes": sent_bytes,
            "control_sent_bytes": 48,
            "interface_sent_bytes": 1.05 * (sent_bytes + 48),
        }
        if step % 2 == 0:
            record |= {"val_loss": 6.0 - step, "val_bits_per_byte": 8.0 - step}
        records.append(record)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def test_measured_times_are_taken_without_the_first_step(tmp_path: Path) -> None:
    outcome = read_outcome("fp32", write_run(tmp_path / "a", exposed_ms=50.0, sent_bytes=1000), modelled_bps=None)
    assert outcome.compute_ms_median == 100.0
    assert outcome.step_s_median == pytest.approx(0.15)
    assert outcome.sent_bytes_mean == 1048
    assert outcome.interface_bytes_mean == pytest.approx(1.05 * 1048)
    assert outcome.validation == ((4.0, 4.0), (8.0, 2.0))
    assert outcome.bits_per_byte == 4.0
    assert not outcome.modelled


def test_a_modelled_link_replaces_the_measured_communication(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", exposed_ms=50.0, sent_bytes=1_250_000)
    outcome = read_outcome("fp32", folder, modelled_bps=10e6)  # 10 Mbit in a second of 10 Mbit/s
    assert outcome.exposed_comm_ms_median == pytest.approx(1000.0)
    assert outcome.step_s_median == pytest.approx(1.1)
    assert outcome.seconds[0] == pytest.approx(2.0 + 0.95)
    assert outcome.seconds[3] == pytest.approx(8.0 + 4 * 0.95)
    assert outcome.interface_bytes_mean is None
    assert outcome.modelled


def test_table_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow = read_outcome("slow", write_run(tmp_path / "a", exposed_ms=300.0, sent_bytes=2000), modelled_bps=None)
    fast = read_outcome("fast", write_run(tmp_path / "b", exposed_ms=100.0, sent_bytes=1000), modelled_bps=None)
    print_table([slow, fast], title="2 hosts")
    table = capsys.readouterr().out
    rows = {line.split("│")[1].strip(): [c.strip() for c in line.split("│")[2:4]] for line in table.splitlines()[4:-1]}
    assert rows["seconds per step"] == ["0.400", "0.200"]
    assert rows["steps per second, against the first"] == ["1.00x", "2.00x"]
    assert rows["interface / metered"] == ["1.0500", "1.0500"]
    assert "busiest expert" not in table
    draw_curves([slow, fast], tmp_path / "plots" / "loss.png", title="2 hosts")
    assert (tmp_path / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_runs_with_experts_say_how_even_the_loads_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense, experts = (write_run(tmp_path / name, exposed_ms=1.0, sent_bytes=1) for name in "ab")
    *earlier, last = (experts / "metrics.jsonl").read_text().splitlines()
    ended = json.dumps({**json.loads(last), "balance": {"max_violation": 0.25}})
    (experts / "metrics.jsonl").write_text("\n".join([*earlier, ended]) + "\n")
    print_table([read_outcome(folder.name, folder, modelled_bps=None) for folder in (dense, experts)], title="2 hosts")
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "busiest expert" in line]
    assert [cell.strip() for cell in row.split("│")[2:4]] == ["-", "1.25"]
