"""The lab keeps its word: an all-reduce takes what its bytes take at the rate, a round trip what two delays take."""

from __future__ import annotations

import json
import os
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from runner import Row, arguments, report

from thinwire.launch.lab import Lab, interface_bytes

BYTES = 10_000_000
PING_PORT = 4000
ALL_REDUCES = [  # (hosts, rate_bps, delay_s): the first is what the lab is built for
    (4, 100e6, 0.0),
    (4, 1e9, 0.0),
    (2, 100e6, 0.0),
    (4, 100e6, 0.001),  # through the relay
]
PINGS = [(100e6, 0.0), (100e6, 0.001), (100e6, 0.02), (10e6, 0.05)]


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.set_defaults(device="cpu", repeats=5)
    parser.add_argument(
        "--worker", choices=["allreduce", "ping"], help="what a rank is to do (used by the script itself)"
    )
    options = parser.parse_args()
    if options.worker == "allreduce":
        all_reduce_worker(options.repeats)
    elif options.worker == "ping":
        ping_worker(20 * options.repeats)
    else:
        rows = [all_reduce_row(*case, options.repeats) for case in ALL_REDUCES]
        rows += [ping_row(*case, options.repeats) for case in PINGS]
        report(__doc__ or "", rows, device=torch.device("cpu"), path=options.json)


def all_reduce_row(hosts: int, rate_bps: float, delay_s: float, repeats: int) -> Row:
    measured, relay_share = run_worker("allreduce", hosts, rate_bps, delay_s, repeats)
    wire_bytes = 2 * (hosts - 1) / hosts * BYTES
    ideal_s = wire_bytes * 8 / rate_bps + 2 * (hosts - 1) * delay_s
    median_s = statistics.median(seconds for seconds, _ in measured)
    return {
        "what": f"all-reduce {BYTES / 1e6:g} MB, {hosts} hosts",
        "mbit": rate_bps / 1e6,
        "delay_ms": delay_s * 1e3,
        "measured_ms": median_s * 1e3,
        "ideal_ms": ideal_s * 1e3,
        "ratio": f"{median_s / ideal_s:.3f}",
        "sent/payload": f"{statistics.median(sent for _, sent in measured) / wire_bytes:.3f}",
        "relay_cpu": relay_share,
    }


def ping_row(rate_bps: float, delay_s: float, repeats: int) -> Row:
    measured, relay_share = run_worker("ping", 2, rate_bps, delay_s, repeats)
    median_s = statistics.median(seconds for seconds, _ in measured)
    return {
        "what": "TCP ping, 32 bytes",
        "mbit": rate_bps / 1e6,
        "delay_ms": delay_s * 1e3,
        "measured_ms": median_s * 1e3,
        "ideal_ms": 2 * delay_s * 1e3,
        "ratio": f"{median_s / (2 * delay_s):.3f}" if delay_s else "-",
        "sent/payload": "-",
        "relay_cpu": relay_share,
    }


def run_worker(
    worker: str, hosts: int, rate_bps: float, delay_s: float, repeats: int
) -> tuple[list[tuple[float, int]], str]:
    """What rank 0 measured, as (seconds, bytes sent), and the CPU share of the relay while it lived."""
    command = [sys.executable, __file__, "--worker", worker, "--repeats", str(repeats)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
    with tempfile.TemporaryDirectory() as folder, Lab(hosts=hosts, rate_bps=rate_bps, delay_s=delay_s) as lab:
        log = Path(folder) / "log"
        with log.open("w") as file:
            started = time.monotonic()
            code = lab.start(command, environment, stdout=file).wait(600)
            lived_s = time.monotonic() - started
        if code:
            raise SystemExit(f"{worker} at {rate_bps / 1e6:g} mbit failed with exit code {code}")
        # Only the relay is a child of the guardian once the ranks have ended.
        guardian = psutil.Process().children()[0]
        cpu = [times.user + times.system for times in (child.cpu_times() for child in guardian.children())]
        return json.loads(log.read_text()), f"{sum(cpu) / lived_s:.0%}" if cpu else "no relay"


def all_reduce_worker(repeats: int) -> None:
    dist.init_process_group("gloo")
    data = torch.ones(BYTES // 4)
    dist.all_reduce(data)
    measured = []
    for _ in range(repeats):
        dist.barrier()
        before, started = interface_bytes(), time.monotonic()
        dist.all_reduce(data)
        seconds, after = time.monotonic() - started, interface_bytes()
        assert before is not None
        assert after is not None
        measured.append((seconds, after.tx_bytes - before.tx_bytes))
    dist.barrier()
    if dist.get_rank() == 0:
        print(json.dumps(measured))
    dist.destroy_process_group()


def ping_worker(repeats: int) -> None:
    if os.environ["RANK"] == "1":
        connection = socket.create_server(("", PING_PORT)).accept()[0]
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while request := connection.recv(64):
            connection.sendall(request)
        return
    while True:
        try:
            connection = socket.create_connection(("host1", PING_PORT))
            break
        except ConnectionRefusedError:
            time.sleep(0.05)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    measured = []
    for _ in range(repeats):
        started = time.monotonic()
        connection.sendall(bytes(32))
        connection.recv(64)
        measured.append((time.monotonic() - started, 0))
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
