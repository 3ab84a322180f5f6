"""comm/units.py; launch/lab/spec.py, counters.py, mpi.py: what needs no lab."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from thinwire.comm.units import format_bytes, format_rate, parse_delay, parse_loss, parse_rate
from thinwire.launch.lab.counters import InterfaceCounters, interface_bytes, parse_net_dev
from thinwire.launch.lab.mpi import mpi_command
from thinwire.launch.lab.spec import LabError, LabSpec, host_number


@pytest.mark.parametrize(
    ("text", "rate_bps"),
    [("100mbit", 1e8), ("1gbit", 1e9), ("2.5Gbit/s", 2.5e9), ("64 kbit", 64e3), ("8000bit", 8e3)],
)
def test_rates(text: str, rate_bps: float) -> None:
    assert parse_rate(text) == rate_bps


@pytest.mark.parametrize("text", ["100", "100mb", "fast", "", "-5mbit", "1kbit", "10Mbps", "100mbyte", "1e8bit", "nan"])
def test_no_rates(text: str) -> None:
    with pytest.raises(ValueError, match=r"--rate: .*100mbit|--rate: .*needs a unit"):
        parse_rate(text)


def test_rates_are_written_as_they_are_read() -> None:
    for rate_bps in (8e3, 64e3, 1e6, 999e6, 1e9, 2.5e9, 1e12):
        assert parse_rate(format_rate(rate_bps)) == rate_bps
    assert format_rate(None) == "unlimited"


def test_delays_and_losses() -> None:
    assert parse_delay("20ms") == 0.02
    assert parse_delay("500us") == 0.0005
    assert parse_delay("0") == 0
    assert parse_loss("0.1%") == 0.001
    assert parse_loss("0.25") == 0.25
    for text in ("20", "11s", "x", "-1ms"):
        with pytest.raises(ValueError, match="--delay"):
            parse_delay(text)
    for text in ("100%", "1.5", "3ms", "-1%"):
        with pytest.raises(ValueError, match="--loss"):
            parse_loss(text)
    assert format_bytes(12_345_678) == "12.3 MB"


@pytest.mark.parametrize(
    "wrong",
    [
        {"hosts": 0},
        {"hosts": 255},
        {"ranks_per_host": 0},
        {"rate_bps": 1.0},
        {"delay_s": -1.0},
        {"loss": 1.0},
        {"cores_per_rank": 0.0},
    ],
)
def test_spec_refuses(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LabSpec(**wrong)  # type: ignore[arg-type]


def test_spec_goes_through_json() -> None:
    spec = LabSpec(3, 1e8, 0.02, 0.001, 2)
    assert LabSpec.from_json(spec.to_json()) == spec


def test_hosts_have_three_names() -> None:
    assert [host_number(text) for text in ("host2", "2", "10.77.0.3")] == [2, 2, 2]
    with pytest.raises(ValueError, match="host0"):
        host_number("hostess")


def test_net_dev() -> None:
    text = "a\nb\n    lo: 1 2 0 0 0 0 0 0 1 2 0 0 0 0 0 0\n  eth0:99 8 0 7 0 0 0 0 66 5 0 4 0 0 0 0\n"
    counters = parse_net_dev(text)["eth0"]
    assert counters == InterfaceCounters(99, 8, 7, 66, 5, 4)
    assert (counters - counters).tx_bytes == 0
    assert interface_bytes("no such interface") is None


def _mpirun(folder: Path, version: str) -> str:
    path = folder / "mpirun"
    path.write_text(f"#!/bin/sh\necho '{version}'\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("version", "option"),
    [
        ("mpirun (Open MPI) 5.0.11", "plm_ssh_agent"),
        ("mpirun (Open MPI) 4.1.4", "plm_rsh_agent"),
        ("HYDRA build details:", "-launcher-exec"),
    ],
)
def test_mpirun_of_every_kind(tmp_path: Path, version: str, option: str) -> None:
    argv = mpi_command(_mpirun(tmp_path, version), ["a", "b"], LabSpec(2, ranks_per_host=3), "agent", {})
    assert argv[argv.index(option) + 1] == "agent"
    assert "10.77.0.1:3,10.77.0.2:3" in argv
    assert argv[-4:] == ["-n", "6", "a", "b"]


def test_mpirun_of_no_known_kind(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="neither Open MPI's nor MPICH's"):
        mpi_command(_mpirun(tmp_path, "LAM 7"), ["a"], LabSpec(2), "agent", {})


def test_needs_no_torch_and_answers_off_linux() -> None:
    code = (
        "import sys; sys.platform = 'darwin'; from thinwire.launch import lab; "
        "print(lab.why_not()); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "needs Linux" in done.stdout
