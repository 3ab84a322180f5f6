"""One machine of a run, as a process: `python onebyte_machine.py FOLDER SETTINGS`. Its weights are one integer.

As benchmarks/onebyte_faults.py wants it: it prints `at ADDRESS`, `round NUMBER` for every round that has its
contribution, `gate NUMBER` where it waits for the file `pass-NUMBER` or `end` in FOLDER's parent, and at the end
`end ROUNDS WEIGHTS METRICS`.
"""

from __future__ import annotations

import hashlib
import json
import sys
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
GATE_EVERY = 20
WORK_S = 0.01


class Integer:
    """Weights: the sum of the rounds' hashes."""

    def __init__(self) -> None:
        self.value = self.rounds = 0
        self.newest: Round | None = None

    def carry_out(self, changes: Sequence[Change]) -> None:
        for record, undone in changes:
            if isinstance(record, Round):
                assert record.number == self.rounds - undone
                self.rounds += -1 if undone else 1
                weight = int.from_bytes(hashlib.sha256(repr(record).encode()).digest(), "little")
                self.value += -weight if undone else weight
                self.newest = record

    def model_hash(self) -> bytes:
        return hashlib.sha256(repr((self.rounds, self.value)).encode()).digest()

    def rebuild(self) -> None:
        self.value = self.rounds = 0


def main() -> None:
    folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    folder.mkdir(exist_ok=True)
    model = Integer()
    path = folder / "run.log"
    log = Log.open(path) if path.exists() else Log.create(path, MANIFEST)
    made = MembershipSettings(**settings)
    exchange = Membership(MANIFEST, log, model, made, base_hash=Integer().model_hash(), snapshot_every=SNAPSHOT_EVERY)
    say(f"at {exchange.address}")
    while True:
        turn = exchange.begin()
        if turn.round % GATE_EVERY == 0 and turn.round and not may_pass(folder.parent, turn.round):
            break
        time.sleep(WORK_S)  # the evaluation
        codes = hashlib.shake_128(repr(turn).encode()).digest(turn.samples)
        model.carry_out(exchange.commit(turn, codes, 0.5))
        newest = model.newest
        if newest and newest.number == turn.round and turn.slot in [c.slot for c in newest.contributions]:
            say(f"round {turn.round}")
    metrics = exchange.metrics()
    say(f"end {model.rounds} {model.model_hash().hex()} {json.dumps(metrics)}")
    exchange.close()
    log.close()


def may_pass(folder: Path, gate: int) -> bool:
    """Wait for leave to go on, or to end. All machines of a run end at the same gate."""
    say(f"gate {gate}")
    while not (folder / f"pass-{gate}").exists():
        if (folder / "end").exists():
            return (folder / f"pass-{gate}").exists()
        time.sleep(0.02)
    return True


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
