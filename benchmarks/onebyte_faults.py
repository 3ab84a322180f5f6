"""Claim: machines of a one-byte run are killed, stopped and cut off, come back, are new: all end with equal weights.

    python benchmarks/onebyte_faults.py [--rate 10e6] [--delay 0.05] [--json FILE]

Four machines and a newcomer in the lab, each with its own model, optimizer and log. What is printed: each event, the
newest round when it happened, and the round and seconds until all others had committed two more without the machine, or
until one had its contribution (again); then for each machine the bytes on its interface per round, and whether its
weights and its log are those of all others.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from runner import Row, arguments, report

from thinwire.comm.onebyte.log import Log
from thinwire.comm.onebyte.rounds import Round
from thinwire.launch.lab import InterfaceCounters, Lab, Run
from thinwire.launch.lab.control import connect
from thinwire.launch.lab.run import Member
from thinwire.launch.lab.spec import address

PORT = 7000
PATIENCE_S = 60.0
FOUNDERS = 4
GATE_EVERY = 50


class Host:
    """One machine: a process on a host of the lab, its output line by line, and its own folder for the log.

    Args:
        command: (folder, settings as JSON) -> command line of the machine.
    """

    def __init__(
        self,
        lab: Lab,
        number: int,
        folder: Path,
        command: Callable[[Path, str], Sequence[str]],
        settings: dict[str, Any],
    ) -> None:
        self.number, self.folder = number, folder / f"m{number}"
        self.lines: list[str] = []
        self.last_round = -1
        self._lab, self._settings, self._command = lab, settings, command
        self._run: Run | None = None
        self._heard = threading.Condition()

    def start(self) -> None:
        contacts = [f"{address(other)}:{PORT}" for other in range(FOUNDERS) if other != self.number]
        mine = {"listen": f"{address(self.number)}:{PORT}", "name": f"m{self.number}", **self._settings}
        if self.number or self.folder.exists():
            mine["contacts"] = contacts
        command = list(self._command(self.folder, json.dumps(mine)))
        read, write = os.pipe()
        errors = self.folder.with_suffix(".err").open("a")
        member = Member(f"m{self.number}", self.number, os.environ)
        self._run = Run(
            connect(self._lab.id), command, [member], folder=Path.cwd(), output="all", stdout=write, stderr=errors
        )
        os.close(write)
        errors.close()
        threading.Thread(target=self._read, args=(read,), daemon=True).start()

    def start_and_wait(self) -> None:
        """Until the process has loaded its libraries and model, which is not what is measured here."""
        said = len(self.lines)
        self.start()
        self.wait(lambda host: any(line.startswith("at ") for line in host.lines[said:]))

    def signal(self, number: int) -> None:
        assert self._run is not None
        self._run.signal(0, number)

    def close(self) -> None:
        if self._run is not None:
            self._run.close()

    def wait(self, what: Callable[[Host], bool]) -> None:
        """Until what the machine has printed satisfies `what`."""
        with self._heard:
            if not self._heard.wait_for(lambda: what(self), PATIENCE_S):
                said = self.folder.with_suffix(".err").read_text()
                raise TimeoutError(f"m{self.number} has said {self.lines[-3:]} and {said[-2000:]}")

    @property
    def end(self) -> tuple[int, str, dict[str, float]] | None:
        """Rounds, hash of the weights and metrics, once it has ended."""
        word, _, rest = self.lines[-1].partition(" ") if self.lines else ("", "", "")
        if word != "end":
            return None
        rounds, model_hash, metrics = rest.split(" ", 2)
        return int(rounds), model_hash, json.loads(metrics)

    def _read(self, read: int) -> None:
        with os.fdopen(read) as lines:
            for line in lines:
                with self._heard:
                    self.lines.append(line.rstrip())
                    if line.startswith("round "):
                        self.last_round = int(line.split()[1])
                    if line.startswith("gate ") and not (self.folder.parent / "end").exists():
                        (self.folder.parent / f"pass-{line.split()[1]}").touch()
                    self._heard.notify_all()


@dataclass
class Story:
    """What happened in a run. interfaces: of each host, over the whole run; calm: before anything happened, a round."""

    rows: list[Row] = field(default_factory=list)
    hosts: list[Host] = field(default_factory=list)
    interfaces: list[InterfaceCounters] = field(default_factory=list)
    calm: list[float] = field(default_factory=list)


def play(
    lab: Lab, folder: Path, command: Callable[[Path, str], Sequence[str]], settings: dict[str, Any], calm: int
) -> Story:
    """Every kind of failure in one run; `calm` rounds of the others between two events."""
    story = Story()
    hosts = story.hosts
    hosts += [Host(lab, number, folder, command, {"wait_for": FOUNDERS, **settings}) for number in range(FOUNDERS + 1)]
    before = lab.counters()
    try:
        for host in hosts[:FOUNDERS]:
            host.start()
        advance(hosts[:FOUNDERS], 1)
        calm_from, first = lab.counters(), hosts[0].last_round
        advance(hosts[:FOUNDERS], calm)
        calm_rounds = hosts[0].last_round - first
        story.calm = [(b.tx_bytes - a.tx_bytes) / calm_rounds for a, b in zip(calm_from, lab.counters(), strict=True)]
        regain(story, "a newcomer", FOUNDERS, hosts[FOUNDERS].start_and_wait, calm)
        lose(story, "kill -9 (it leads)", 0, lambda: hosts[0].signal(signal.SIGKILL), calm)
        lose(story, "stop, too", 2, lambda: hosts[2].signal(signal.SIGSTOP), calm)
        regain(story, "start again", 0, hosts[0].start_and_wait, calm)
        regain(story, "continue", 2, lambda: hosts[2].signal(signal.SIGCONT), calm)
        lose(story, "cut off", 1, lambda: lab.cut(1), calm)
        regain(story, "link restored", 1, lambda: lab.restore(1), calm)
        (folder / "end").touch()
        for host in hosts:
            host.wait(lambda host: host.end is not None)
        story.interfaces = [now - then for now, then in zip(lab.counters(), before, strict=True)]
    finally:
        for host in hosts:
            host.close()
    return story


def advance(hosts: Sequence[Host], rounds: int) -> None:
    """Until each of these machines has contributed to a round so far ahead."""
    goal = max(host.last_round for host in hosts) + rounds
    for host in hosts:
        host.wait(lambda host: host.last_round >= goal)


def lose(story: Story, event: str, number: int, work: Callable[[], None], calm: int) -> None:
    """Something happens to a machine, and the others go on. Two rounds count: the next one may be all but decided."""
    lost = story.hosts[number]
    others = [h for h in story.hosts if h is not lost and h.lines and h.number not in _away(story)]
    newest = max(host.last_round for host in others)
    work()
    began = time.monotonic()
    for host in others:
        host.wait(lambda host: host.last_round > newest + 1)
    _note(story, event, number, newest, time.monotonic() - began, newest + 2)
    advance(others, calm)


def regain(story: Story, event: str, number: int, work: Callable[[], None], calm: int) -> None:
    """A machine comes (back), and takes part, while the others do not stop."""
    host = story.hosts[number]
    others = [h for h in story.hosts if h is not host and h.lines and h.number not in {*_away(story), number}]
    work()
    began = time.monotonic()
    newest = max(h.last_round for h in others)
    host.wait(lambda host: host.last_round > newest)
    _note(story, event, number, newest, time.monotonic() - began, host.last_round)
    advance([*others, host], calm)


def _note(story: Story, event: str, number: int, at_round: int, took_s: float, until_round: int) -> None:
    story.rows.append(
        {"event": event, "machine": number, "in round": at_round, "overcome in round": until_round, "after s": took_s}
    )


def _away(story: Story) -> set[int]:
    away: set[int] = set()
    for row in story.rows:
        (away.discard if row["event"] in _RETURNS else away.add)(int(row["machine"]))
    return away


_RETURNS = {"start again", "continue", "link restored", "a newcomer"}


def verdicts(story: Story) -> list[Row]:
    """For each machine: bytes, and whether all of it agrees with the others. Every log must be the beginning of the
    longest one, hold each round once, in order, and no round of which a contribution came twice."""
    logs = [Log.open(host.folder / "run.log", read_only=True) for host in story.hosts]
    longest = max(logs, key=len)
    rows: list[Row] = []
    hashes = {host.end[1] for host in story.hosts if host.end}
    for host, log, counted, calm in zip(story.hosts, logs, story.interfaces, story.calm, strict=True):
        assert host.end is not None
        rounds, _, metrics = host.end
        numbers = [record.number for record in log if isinstance(record, Round)]
        in_rounds = sum(
            any(c.slot == int(metrics["slot"]) for c in record.contributions)
            for record in log
            if isinstance(record, Round)
        )
        rows.append(
            {
                "machine": host.number,
                "slot": int(metrics["slot"]),
                "rounds": rounds,
                "with its contribution": in_rounds,
                "interface bytes sent per round": counted.tx_bytes / rounds,
                "in calm": calm,
                "received": counted.rx_bytes / rounds,
                "undone": int(metrics["rounds_undone"]),
                "equal weights": "yes" if len(hashes) == 1 else "NO",
                "log without gap or repetition": "yes" if numbers == list(range(rounds)) else "NO",
                "log as the others'": "yes" if log.chain(len(log)) == longest.chain(len(log)) else "NO",
            }
        )
    for log in logs:
        log.close()
    return rows


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] == "--machine":
        run_machine(Path(sys.argv[2]), json.loads(sys.argv[3]))
        return
    claim = str(__doc__).splitlines()[0]
    parser = arguments(claim)
    parser.add_argument("--rate", type=float, default=10e6, help="bits per second of each link")
    parser.add_argument("--delay", type=float, default=0.05, help="seconds, one way")
    parser.add_argument("--calm", type=int, default=20, help="rounds between two events")
    options = parser.parse_args()
    settings = {"heartbeat_s": 0.5, "suspicion_s": 1.5, "deadline_s": 10.0, "samples": 4}
    with tempfile.TemporaryDirectory() as name, Lab(FOUNDERS + 1, options.rate, options.delay) as lab:
        story = play(lab, Path(name), machine_command, settings, options.calm)
        rows = verdicts(story)
    report(claim, story.rows, device=torch.device("cpu"), path=options.json)
    print()
    path = options.json and options.json.with_stem(options.json.stem + "_machines")
    report("What each machine has at the end", rows, device=torch.device("cpu"), path=path)


def machine_command(folder: Path, settings: str) -> Sequence[str]:
    return [sys.executable, str(Path(__file__).resolve()), "--machine", str(folder), settings]


def run_machine(folder: Path, settings: dict[str, Any]) -> None:
    """A machine with the real optimizer: a small network that learns from this machine's own data."""
    from torch import nn

    from thinwire.comm.onebyte.membership.door import elastic
    from thinwire.comm.onebyte.membership.settings import MembershipSettings
    from thinwire.comm.onebyte.optimizer import OneByteSPSA

    torch.set_num_threads(1)
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4))
    teacher = nn.Linear(32, 4)
    generator = torch.Generator().manual_seed(hash(settings["name"]) % 1000)
    made = MembershipSettings(**settings)
    optimizer = OneByteSPSA(
        model.named_parameters(), 1e-3, eps=1e-3, snapshot_every=25, log=folder / "run.log", join=elastic(made)
    )
    print("at", made.listen, flush=True)
    for _ in itertools.count():
        turn = optimizer.exchange.begin()
        if turn.round and turn.round % GATE_EVERY == 0 and not may_pass(folder.parent, turn.round):
            break
        x = torch.randn(64, 32, generator=generator)
        target = teacher(x).detach()
        optimizer.step(lambda x=x, target=target: nn.functional.mse_loss(model(x), target))
        newest = optimizer.replica.newest
        if newest and newest.number == turn.round and turn.slot in [c.slot for c in newest.contributions]:
            print("round", turn.round, flush=True)
    metrics = optimizer.exchange.metrics()
    model_hash = optimizer.replica.model_hash().hex()
    print("end", optimizer.replica.rounds, model_hash, json.dumps(metrics), flush=True)
    optimizer.remove()


def may_pass(folder: Path, gate: int) -> bool:
    """Wait for leave to go on, or to end: so all machines end after the same round."""
    print("gate", gate, flush=True)
    while not (folder / f"pass-{gate}").exists():
        if (folder / "end").exists():
            return (folder / f"pass-{gate}").exists()
        time.sleep(0.02)
    return True


if __name__ == "__main__":
    main()
