"""Replay: base and log give the run's weights again, to the last bit, fused or not; what does not fit is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onebyte_logs
import pytest
import torch
from onebyte_logs import base_weights, manifest_for, write_run
from torch import Tensor

from thinwire.comm.onebyte import replay as replay_module
from thinwire.comm.onebyte.lattice import Lattice
from thinwire.comm.onebyte.log import Log
from thinwire.comm.onebyte.replay import ReplayError, WrongWeightsError, manifest_of, replay, verify
from thinwire.comm.onebyte.replica import Replica
from thinwire.comm.onebyte.rounds import Roster, Round, Snapshot

ROUNDS = 25
RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"weight_decay": 0.5},
    "kept": {"kept": 0.5, "weight_decay": 0.5},
    "gaussian, sqrt": {"distribution": "gaussian", "scaling": "sqrt"},
    "shared, median": {"directions": "shared", "robust": "median"},
    "std, drop": {"step_size": "std", "robust": "drop"},
    "ema": {"step_size": "ema"},
    "subspace": {"directions": "subspace", "rank": 4},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("run", RUNS)
def test_replay_gives_the_weights_of_the_run(
    tmp_path: Path, run: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_weights(dtype)
    intact = {name: tensor.clone() for name, tensor in base.items()}
    path = tmp_path / "run.log"
    final = write_run(path, base, ROUNDS, snapshot_every=10, **RUNS[run])
    assert all(not torch.equal(final[name], base[name]) for name in base)
    with Log.open(path, read_only=True) as log:
        hashes = set()
        found = [replay(log, base), replay(log, base, step_by_step=True), verify(log, base)]
        monkeypatch.setattr(replay_module, "_MOST_CONTRIBUTIONS", 20)  # several passes between snapshots
        found.append(replay(log, base))
        for replayed in found:
            assert (replayed.rounds, replayed.proved) == (ROUNDS, 20)
            assert all(torch.equal(replayed.tensors[name], final[name]) for name in base)
            assert all(replayed.tensors[name].dtype == dtype for name in base)
            hashes.add(replayed.model_hash)
        assert len(hashes) == 1
        assert all(torch.equal(base[name], intact[name]) for name in base), "the base was changed"


@pytest.mark.parametrize("run", ["plain", "kept"])
def test_replay_stops_where_it_is_told(tmp_path: Path, run: str) -> None:
    base = base_weights()
    write_run(tmp_path / "run.log", base, ROUNDS, snapshot_every=10, **RUNS[run])
    with Log.open(tmp_path / "run.log", read_only=True) as log:
        rounds = [record for record in log if isinstance(record, Round)]
        weights = {name: tensor.clone() for name, tensor in base.items()}
        replica = Replica(manifest_of(log), list(weights.values()))
        for until in (0, 1, 9, 10, 11, 20, 24, ROUNDS):
            for round_ in rounds[replica.rounds : until]:
                replica.apply([round_])
            for step_by_step in (False, True):
                found = replay(log, base, until=until, step_by_step=step_by_step)
                assert (found.rounds, found.proved) == (until, until // 10 * 10)
                assert found.model_hash == replica.model_hash()
        for wrong in (-1, ROUNDS + 1):
            with pytest.raises(ReplayError, match=f"has 25 rounds, not {wrong}; give a number from 0 to 25"):
                replay(log, base, until=wrong)


def test_plain_rounds_take_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Snapshots at which nothing happens to the weights do not divide a replay, but for the last, which proves it."""
    passes: list[int] = []
    add = Lattice.add

    def counted(self: Lattice, coefficients: Tensor, places: Tensor) -> None:
        passes.append(len(places))
        add(self, coefficients, places)

    base = base_weights()
    write_run(tmp_path / "run.log", base, ROUNDS, snapshot_every=5)
    monkeypatch.setattr(Lattice, "add", counted)
    with Log.open(tmp_path / "run.log", read_only=True) as log:
        rounds = [record for record in log if isinstance(record, Round)]
        told: list[int] = []
        replay(log, base, until=23, progress=told.append)
        counts = [
            sum(c.codes.count(bytes([k])) for c in r.contributions for k in range(256) if k != 0x80) for r in rounds
        ]
        assert [count for count in passes if count] == [sum(counts[:20]), sum(counts[20:23])]
        assert told == [20, 20, 23]


def test_a_base_that_is_not_the_runs_is_refused_by_name(tmp_path: Path) -> None:
    base = base_weights()
    final = write_run(tmp_path / "run.log", base, 3)
    nudged = {**base, "block.0.norm": base["block.0.norm"].clone()}
    nudged["block.0.norm"][3] += 2.0**-20
    wrong = {
        r"lacks block\.0\.norm.*it has block.0.proj.weight, embed.weight": {
            k: v for k, v in base.items() if "norm" not in k
        },
        r"embed\.weight as float32\[19, 6\], the run's is float32\[19, 7\]": {
            **base,
            "embed.weight": torch.ones(19, 6),
        },
        r"embed\.weight as bfloat16\[19, 7\]": base_weights(torch.bfloat16),
        r"block\.0\.norm is the first of 1 tensors that differ": nudged,
        r"embed\.weight is the first of 3 tensors that differ; give the model at which the run began": final,
    }
    with Log.open(tmp_path / "run.log", read_only=True) as log:
        for message, other in wrong.items():
            for work in (replay, verify):
                with pytest.raises(ReplayError, match=message):
                    work(log, other)
        extra = {"buffer": torch.ones(3, dtype=torch.int64), **base}
        assert sorted(replay(log, extra).tensors) == sorted(base)
    with Log.create(tmp_path / "odd.log", b"{}") as log, pytest.raises(ReplayError, match="cannot read its manifest"):
        replay(log, base)


def test_a_snapshot_that_others_would_not_sign_is_found(tmp_path: Path) -> None:
    base = base_weights()
    write_run(tmp_path / "run.log", base, ROUNDS, snapshot_every=5)
    with Log.open(tmp_path / "run.log") as log:
        records = list(log)
    wrong = next(i for i, r in enumerate(records) if isinstance(r, Snapshot) and r.rounds == 15)
    records[wrong] = Snapshot(15, bytes(32))
    manifest = manifest_for(base, snapshot_every=5)
    with Log.create(tmp_path / "forged.log", manifest.to_bytes()) as log:
        for record in records:
            log.append(record)
        with pytest.raises(WrongWeightsError, match=r"after 15 rounds .* 0000000000000000\.\.\., .* agreed after 10"):
            verify(log, base)
        assert replay(log, base).proved == ROUNDS, "the last snapshot is right"
        assert replay(log, base, until=14).proved == 10
        with pytest.raises(WrongWeightsError, match="after 15 rounds"):
            replay(log, base, until=17)


def test_who_takes_part_does_not_matter_to_replay(tmp_path: Path) -> None:
    """Rosters say how rounds are written down; the weights follow from the rounds alone."""
    base = base_weights()
    write_run(tmp_path / "run.log", base, 8)
    with Log.open(tmp_path / "run.log") as log:
        rounds = [record for record in log if isinstance(record, Round)]
        expected = replay(log, base).model_hash
    with Log.create(tmp_path / "other.log", manifest_for(base).to_bytes()) as log:
        for number, round_ in enumerate(rounds):
            log.append(Roster(number, onebyte_logs.MEMBERS[: number % 4]))
            log.append(round_)
        assert replay(log, base).model_hash == expected
