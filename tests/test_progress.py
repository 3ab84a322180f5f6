"""Progress: a bar on a terminal, plain lines elsewhere, with the same figures."""

from __future__ import annotations

import io

from rich.console import Console

from thinwire.dist.progress import Bar, Lines, open_progress

RECORD = {
    "step": 3,
    "loss": 2.34567,
    "tokens_per_s": 12_345.0,
    "compute_ms": 210.4,
    "exposed_comm_ms": 35.2,
    "sent_bytes": 4_806_144,
    "received_bytes": 999,
    "compression_ratio": 2.0,
}
FIGURES = (
    "loss 2.346",
    "12.3 ktok/s",
    "compute 210 ms",
    "exposed comm 35 ms",
    "sent 4.81 MB",
    "received 999 B",
    "ratio 2x",
)
VALIDATION = {"val_loss": 1.5, "val_bits_per_byte": 2.164}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_hold_the_figures_and_no_carriage_return() -> None:
    out = io.StringIO()
    progress = open_progress(10, 0, 0.0, out)
    assert isinstance(progress, Lines)
    for step in range(1, 11):
        progress.write(RECORD | {"step": step} | (VALIDATION if step == 10 else {}))
    progress.close()
    lines = out.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[0].startswith("step 1/10 ")
    for figure in FIGURES:
        assert all(figure in line for line in lines)
    assert "validation loss 1.500  2.164 bits/byte" in lines[9]
    assert "\r" not in out.getvalue()
    assert "\x1b" not in out.getvalue()


def test_lines_come_rarely_but_for_the_first_the_last_and_evaluations() -> None:
    out = io.StringIO()
    progress = Lines(100, 3600.0, out)
    for step in range(1, 101):
        progress.write(RECORD | {"step": step} | (VALIDATION if step == 40 else {}))
    assert [line.split()[1] for line in out.getvalue().splitlines()] == ["1/100", "40/100", "100/100"]


def test_the_bar_holds_the_figures() -> None:
    out = Terminal()
    progress = open_progress(10, 2, 0.0, out)
    assert isinstance(progress, Bar)
    progress.write(RECORD | VALIDATION)
    shown = progress._progress.tasks[0]
    assert (shown.completed, shown.total) == (3, 10)
    progress.close()
    narrow = Console(width=70, file=io.StringIO())
    narrow.print(progress._progress.get_renderable())
    assert isinstance(narrow.file, io.StringIO)
    words = narrow.file.getvalue().split()
    assert "3/10" in words
    assert all(set(figure.split()) <= set(words) for figure in FIGURES)
    assert "step 3: validation loss 1.500  2.164 bits/byte" in out.getvalue()
