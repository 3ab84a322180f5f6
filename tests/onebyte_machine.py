"""One machine of a run, as a process: `python onebyte_machine.py FOLDER ROUNDS SETTINGS`. Its weights are one integer.

Prints `at ADDRESS`, `round NUMBER slot SLOT` for every round that it has taken part in, and at the end
`end ROUNDS WEIGHTS METRICS`. On a line on its standard input it leaves early.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from thinwire.comm.onebyte.exchange import Change
from thinwire.comm.onebyte.log import Log
from thinwire.comm.onebyte.membership.elastic import Membership
from thinwire.comm.onebyte.membership.settings import MembershipSettings
from thinwire.comm.onebyte.rounds import Round

MANIFEST = b"an integer"
SNAPSHOT_EVERY = 10
WORK_S = 0.01


class Integer:
    """Weights: the sum of the rounds' hashes. fault: added once after so many rounds, as by a bit that flipped."""

    def __init__(self, fault_after: int = -1) -> None:
        self.value = self.rounds = self.rebuilt = 0
        self.fault_after = fault_after

    def carry_out(self, changes: Sequence[Change]) -> None:
        for record, undone in changes:
            if isinstance(record, Round):
                assert record.number == self.rounds - undone
                self.rounds += -1 if undone else 1
                self.value += -weight(record) if undone else weight(record)
                if self.rounds == self.fault_after:
                    self.value, self.fault_after = self.value + 1, -1

    def model_hash(self) -> bytes:
        return hashlib.sha256(repr((self.rounds, self.value)).encode()).digest()

    def rebuild(self) -> None:
        self.value, self.rounds, self.rebuilt = 0, 0, self.rebuilt + 1


def weight(record: Round) -> int:
    return int.from_bytes(hashlib.sha256(repr(record).encode()).digest(), "little")


def main() -> None:
    folder, until, settings = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    model = Integer(settings.pop("fault_after", -1))
    path = folder / "run.log"
    log = Log.open(path) if path.exists() else Log.create(path, MANIFEST)
    base_hash = Integer().model_hash()
    made = MembershipSettings(**settings)
    exchange = Membership(MANIFEST, log, model, made, base_hash=base_hash, snapshot_every=SNAPSHOT_EVERY)
    say(f"at {exchange.address}")
    leave = threading.Event()
    threading.Thread(target=lambda: sys.stdin.readline() and leave.set(), daemon=True).start()
    turn = exchange.begin()
    while model.rounds < until and not leave.is_set():
        time.sleep(WORK_S)  # the evaluation
        codes = hashlib.shake_128(repr(turn).encode()).digest(turn.samples)
        before = model.rounds
        model.carry_out(exchange.commit(turn, codes, 0.5))
        if model.rounds > before:
            say(f"round {model.rounds - 1} slot {turn.slot}")
        if model.rounds < until:
            turn = exchange.begin()
    metrics = exchange.metrics() | {"rebuilt": model.rebuilt, "leads": exchange.metrics()["leads"]}
    exchange.close()
    log.close()
    say(f"end {model.rounds} {model.value} {json.dumps(metrics)}")


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
