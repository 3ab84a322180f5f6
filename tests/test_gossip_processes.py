"""Real processes of a gossip run, against its simulation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from worlds import small_settings

from thinwire.dist.checkpoint import Checkpointer, CheckpointSettings
from thinwire.dist.config import load_config
from thinwire.dist.metrics import read_records
from thinwire.dist.run_folder import CHECKPOINTS
from thinwire.dist.simulate import Circumstances, SimulatedRun

MACHINES = 3
STEPS = 7


def test_processes_and_their_simulation_end_with_the_same_bits(tmp_path: Path) -> None:
    """torchrun starts three `thinwire train`: weights, optimizer, losses and bytes are those of the simulation."""
    settings: dict[str, Any] = small_settings(tmp_path) | {
        "train": {"steps": STEPS, "global_batch": 6 * MACHINES, "eval_windows": 10},
        "world": {"threads": 1},
        "method": {
            "kind": "gossip",
            "graph": "base_k",
            "algorithm": {"kind": "dpsgd", "overlap": True, "wire": "bf16"},
            "schedule": {"kind": "random", "probability": 0.7},
            "deadline_s": 60.0,
            "probes": 8,
            "probe_every": 2,
        },
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    starter = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(MACHINES)]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    done = subprocess.run(
        [sys.executable, *starter, "-m", "thinwire", "train", str(file)],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    config = load_config(file)
    written = Checkpointer(config.folder / CHECKPOINTS, CheckpointSettings(), group=None, rank=0, world_size=1)
    loaded = written.load_latest({}, world_size_changed="all_ranks")
    assert loaded is not None

    run = SimulatedRun(config, Circumstances(MACHINES, rate_bps=1e6, delay_s=0.02, slow={1: 4.0}))
    last = run.run()
    for rank, machine in enumerate(run.machines):
        real = loaded.per_rank_of_all[rank]
        assert torch.equal(real["method"]["weights"], machine.parts.replica.weights())
        assert real["optimizer"]["state"].keys() == machine.optimizer.state_dict()["state"].keys()
        for number, state in machine.optimizer.state_dict()["state"].items():
            assert all(torch.equal(real["optimizer"]["state"][number][name], state[name]) for name in state)
    records = read_records(config.folder / "metrics.jsonl")
    assert records[-1]["loss"] == run.machines[0].loss
    assert last.merged is not None
    assert records[-1]["own_val_loss"] == last.local[0].loss
    edges = {int(k.partition("/")[2]): v for k, v in records[-1]["method"].items() if k.startswith("sent_to/")}
    assert edges.keys() == {to for (sender, to) in last.edges if sender == 0}
    assert last.rms_distance > 0
