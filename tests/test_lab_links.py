"""launch/lab: the links keep their rate, delay and loss, count what crosses them, and can be cut while in use."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from thinwire.launch.lab import Lab, LabError, Run, why_not
from thinwire.launch.lab.mpi import find_mpirun

pytestmark = pytest.mark.skipif(why_not() is not None, reason=f"no lab on this machine: {why_not()}")
needs_delay = pytest.mark.skipif(why_not(delay=True) is not None, reason=f"no delay here: {why_not(delay=True)}")

FRAME_PAYLOAD = 1448  # TCP payload of a full Ethernet frame with timestamps
FRAME_HEADERS = 66

# Rank 0 listens; the last rank connects, and both run the same function on the connection. No thinwire, no torch.
PRELUDE = """
import json, os, socket, sys, time
rank, last = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]) - 1
if rank == 0:
    link = socket.create_server(("", 4000)).accept()[0]
elif rank == last:
    while True:
        try:
            link = socket.create_connection((os.environ["MASTER_ADDR"], 4000))
            break
        except ConnectionRefusedError:
            time.sleep(0.02)
else:
    raise SystemExit
link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
def take(count):
    while count:
        count -= len(link.recv(min(count, 1 << 16)) or exit(9))
"""
TRANSFER = """
if rank:
    link.sendall(bytes(COUNT)); take(1)
else:
    take(1); start = time.monotonic(); take(COUNT - 1); seconds = time.monotonic() - start
    link.sendall(b"x")
    print(json.dumps(seconds))
"""
TELL_RETRANSMITTED = """
if rank:  # bytes_retrans of struct tcp_info, which is known once the other end has everything
    info = link.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 216)
    open(RESULT, "w").write(str(int.from_bytes(info[208:216], sys.byteorder)))
"""
PING = """
times = []
for _ in range(20):
    start = time.monotonic()
    if rank:
        link.sendall(b"x"); take(1)
    else:
        take(1); link.sendall(b"x")
    times.append(time.monotonic() - start)
if rank:
    open(RESULT, "w").write(json.dumps(min(times)))
"""
ENDLESS_PING = """
turns = 0
while True:
    link.sendall(b"x"); take(1); turns += 1
    if rank:
        open(RESULT + ".new", "w").write(str(turns)); os.rename(RESULT + ".new", RESULT)
        time.sleep(0.01)
"""
ENDLESS_TRANSFER = """
taken = 0
while True:
    if rank:
        link.sendall(bytes(1 << 16))
    else:
        take(1 << 16); taken += 1
        open(RESULT + ".new", "w").write(str(taken)); os.rename(RESULT + ".new", RESULT)
"""
DATAGRAMS = """
data = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
if rank:
    for _ in range(COUNT):
        data.sendto(b"x" * 100, (os.environ["MASTER_ADDR"], 4001)); time.sleep(0.0002)
"""


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


def start(lab: Lab, program: str, log: Path, **names: Any) -> Run:
    constants = "".join(f"{name} = {value!r}\n" for name, value in names.items())
    with log.open("w") as file:
        return lab.start([sys.executable, "-S", "-c", PRELUDE + constants + program], stdout=file)


def finish(lab: Lab, program: str, log: Path, **names: Any) -> Any:
    assert start(lab, program, log, **names).wait(60, grace_s=5) == 0
    return json.loads(log.read_text() or "null")


def test_interfaces_count_the_headers_of_every_frame(tmp_path: Path) -> None:
    count = 2_000_000
    with Lab(hosts=2) as lab:
        program = TRANSFER + TELL_RETRANSMITTED
        finish(lab, program, tmp_path / "log", COUNT=count, RESULT=str(tmp_path / "retransmitted"))
        receiver, sender = lab.counters()
    # Where both ends wait for a processor, TCP takes that for a loss and sends again what has arrived.
    sent = count + int((tmp_path / "retransmitted").read_text())
    assert sender.tx_bytes == receiver.rx_bytes
    assert receiver.tx_bytes == sender.rx_bytes
    assert sender.tx_packets >= count / FRAME_PAYLOAD
    excess = sender.tx_bytes - sent - FRAME_HEADERS * sender.tx_packets
    assert 0 <= excess < 100  # SYN carries more options than the 12 bytes counted in FRAME_HEADERS
    # Acknowledgements: one for every frame where each finds the receiver waiting, and none with payload.
    assert receiver.tx_packets < 2 * sender.tx_packets
    assert receiver.tx_bytes < 100 * receiver.tx_packets


def test_ranks_of_one_host_do_not_use_the_link(tmp_path: Path) -> None:
    with Lab(hosts=1, ranks_per_host=2, rate_bps=1e6) as lab:
        seconds = finish(lab, TRANSFER, tmp_path / "log", COUNT=3_000_000)
        assert [lab.counters()[0].tx_bytes, lab.counters()[0].rx_bytes] == [0, 0]
    assert seconds < 12  # half of what the link would take


def test_rate_is_kept_and_changed(tmp_path: Path) -> None:
    """A transfer cannot be faster than its link, at its first rate or the next."""
    with Lab(hosts=2, rate_bps=40e6) as lab:
        assert finish(lab, TRANSFER, tmp_path / "log", COUNT=2_000_000) >= 0.9 * 2e6 * 8 / 40e6
        lab.slow(1, rate_bps=8e6)
        assert finish(lab, TRANSFER, tmp_path / "log", COUNT=1_000_000) >= 0.9 * 1e6 * 8 / 8e6
        lab.slow(1, rate_bps=None)
        lab.slow(0, rate_bps=4e6)  # the other end is as good a brake
        assert finish(lab, TRANSFER, tmp_path / "log", COUNT=500_000) >= 0.9 * 0.5e6 * 8 / 4e6
        assert [link["rate_bps"] for link in lab.describe()["links"]] == [4e6, None]


def test_a_link_that_falls_back_under_load_goes_on(tmp_path: Path) -> None:
    """TCP hands down packets that are larger than the bucket of the new rate; none of them may block the link."""
    result = tmp_path / "taken"

    def taken() -> int:
        return int(result.read_text()) if result.exists() else 0

    def goes_on() -> None:
        before = taken()
        until(lambda: taken() > before + 20)

    with Lab(hosts=2, rate_bps=1e9) as lab:
        start(lab, ENDLESS_TRANSFER, tmp_path / "log", RESULT=str(result))
        goes_on()
        for rate_bps in (3e8, 1e8, 2e7, 4e8, 2e7):
            lab.slow(1, rate_bps=rate_bps)
            goes_on()


@needs_delay
def test_delay_and_rate_through_the_relay(tmp_path: Path) -> None:
    with Lab(hosts=2, rate_bps=20e6, delay_s=0.02) as lab:
        finish(lab, PING, tmp_path / "log", RESULT=str(tmp_path / "rtt"))
        assert json.loads((tmp_path / "rtt").read_text()) >= 0.04
        lab.slow(1, delay_s=0.06)  # a path takes the mean of its two hosts
        finish(lab, PING, tmp_path / "log", RESULT=str(tmp_path / "rtt"))
        assert json.loads((tmp_path / "rtt").read_text()) >= 0.08
        before = lab.counters()
        assert finish(lab, TRANSFER, tmp_path / "log", COUNT=1_000_000) >= 0.9 * 1e6 * 8 / 20e6
        receiver, sender = after = lab.counters()
        assert sender.tx_bytes >= receiver.rx_bytes  # since the start: a frame of the ping may have been under way
        received = (after[0] - before[0]).rx_bytes
        assert received >= 1_000_000 * (1 + FRAME_HEADERS / FRAME_PAYLOAD)


@needs_delay
def test_loss(tmp_path: Path) -> None:
    with Lab(hosts=2, loss=0.2) as lab:
        finish(lab, DATAGRAMS, tmp_path / "log", COUNT=2000)
        receiver, sender = lab.counters()
    assert sender.tx_packets >= 2000
    lost = sender.tx_packets - receiver.rx_packets
    assert 0.15 * sender.tx_packets < lost < 0.25 * sender.tx_packets


@pytest.mark.parametrize("delay_s", [0.0, pytest.param(0.001, marks=needs_delay)])
def test_a_cut_link_is_a_black_hole_until_restored(tmp_path: Path, delay_s: float) -> None:
    result = tmp_path / "turns"

    def turns() -> int:
        return int(result.read_text()) if result.exists() else 0

    with Lab(hosts=3, rate_bps=1e8, delay_s=delay_s) as lab:
        run = start(lab, ENDLESS_PING, tmp_path / "log", RESULT=str(result))
        until(lambda: turns() > 5)
        done = subprocess.run(
            [sys.executable, "-m", "thinwire", "link", "cut", "host2", "--lab", lab.id],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stdout) == (
            0,
            "host2: cut (frames vanish), 100mbit, %g ms one way\n" % (delay_s * 1e3),
        )
        before = lab.counters()
        until(lambda: lab.counters()[2].tx_packets >= before[2].tx_packets + 3)  # it goes on trying
        after = lab.counters()
        assert after[0].rx_packets - before[0].rx_packets <= 2  # frames that were under way
        assert after[2].rx_packets - before[2].rx_packets <= 2
        assert run.returncodes[0] is None  # no error reaches either end
        assert run.returncodes[2] is None
        stuck = turns()
        lab.restore(2)
        until(lambda: turns() > stuck + 5)


def test_one_mpirun_across_the_hosts(tmp_path: Path) -> None:
    try:
        found = find_mpirun({})
    except LabError as error:
        pytest.skip(str(error))
    if subprocess.run([found, "--version"], capture_output=True, check=False).returncode:
        pytest.skip(f"{found} does not even say its version")
    pytest.importorskip("mpi4py")
    # Real ranks, which take leave of mpirun's daemons: those have waited for ever for a shell that had ended at once.
    script = (
        "import os, socket; from mpi4py.MPI import COMM_WORLD as ranks; total = ranks.allreduce(ranks.rank); "
        "print('rank', ranks.rank, 'on', socket.gethostname(), total, os.environ.get('THINWIRE_LAB'), flush=True)"
    )
    log = tmp_path / "log"
    errors = tmp_path / "errors"  # mpirun warns there, on a busy machine, that a child was faster than its parent
    with Lab(hosts=3, ranks_per_host=2, rate_bps=1e9) as lab, log.open("w") as file, errors.open("w") as stderr:
        run = lab.start_mpi([sys.executable, "-c", script], stdout=file, stderr=stderr)
        try:
            code = run.wait(60)
        except TimeoutError as late:
            alive = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
            pytest.fail(f"{late}; {log.read_text()!r}; {errors.read_text()!r}; {alive}")
        assert code == 0, errors.read_text()
    lines = sorted(line for line in log.read_text().splitlines() if line)
    assert lines == [f"rank {rank} on host{rank // 2} 15 None" for rank in range(6)]
