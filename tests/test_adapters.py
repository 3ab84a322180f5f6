"""Other libraries' loops with thinwire inside learn what thinwire's own loop learns, to the last bit, also resumed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from memory import Memory
from ranks import Rank, run_ranks
from worlds import close_world, small_settings, thread_world

from thinwire.comm.same_weights import weights_digest
from thinwire.dist.config import load_config
from thinwire.dist.train import Trainer

PROGRAM = Path(__file__).with_name("adapters_program.py")
STEPS = 4
METHODS: dict[str, dict[str, Any]] = {
    "allreduce": {"kind": "allreduce", "dtype": "bf16"},
    "compress": {"kind": "compress", "compressor": {"kind": "lowrank", "rank": 2}, "dense_below": 64},
    "local_sgd": {"kind": "local_sgd", "every": 2, "outer": "nesterov"},
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("cases")
    paths = {}
    for name, method in METHODS.items():
        settings = small_settings(folder) | {"method": method, "name": name}
        settings["schedule"] = {"kind": "constant"}
        # Two micro-batches per step, and a norm that is always too long.
        settings["train"] = {"steps": STEPS, "global_batch": 8, "micro_batch": 2, "clip_norm": 0.1, "eval_windows": 0}
        paths[name] = folder / f"{name}.yaml"
        paths[name].write_text(yaml.safe_dump(settings))
    return paths


@pytest.fixture(scope="module")
def own(cases: dict[str, Path]) -> dict[str, tuple[list[float], str]]:
    """Losses and weights of thinwire's own trainer."""

    def train(path: Path) -> tuple[list[float], str]:
        def work(rank: Rank) -> tuple[list[float], str]:
            world = thread_world(rank)
            try:
                trainer = Trainer(load_config(path), world)
                memory = Memory()
                trainer.run([memory])
                return [record["loss"] for record in memory.records], weights_digest(
                    dict(trainer.engine.network.named_parameters())
                ).hex()
            finally:
                close_world(world)

        first, second = run_ranks(2, work)
        assert first == second
        return first

    return {name: train(path) for name, path in cases.items()}


def need(library: str) -> None:
    """Not by importing it: that takes seconds, and changes this process's environment."""
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed: pip install 'thinwire[{library}]'")


def run(libraries: str, cases: dict[str, Path], folder: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """What each rank found, and what a single process was told."""
    given = folder / "cases.json"
    given.write_text(json.dumps({name: str(path) for name, path in cases.items()}))
    done = subprocess.run(
        [sys.executable, str(PROGRAM), libraries, str(given), str(folder)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return (
        [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)],
        json.loads((folder / "alone.json").read_text()),
    )


def check_runs(library: str, found: list[dict[str, Any]], own: dict[str, tuple[list[float], str]]) -> None:
    for name, (losses, weights) in own.items():
        runs = [rank[f"{library}/{name}"] for rank in found]
        assert [run["weights"] for run in runs] == [weights, weights], f"{library}, {name}"
        assert [sum(pair) / 2 for pair in zip(*(run["losses"] for run in runs), strict=True)] == losses


def check_refusals(told: dict[str, str], expected: dict[str, str]) -> None:
    assert told.keys() == expected.keys()
    for name, words in expected.items():
        assert words in told[name], f"{name}: {told[name]}"


def test_accelerate_and_hugging_face_trainer(
    tmp_path: Path, cases: dict[str, Path], own: dict[str, tuple[list[float], str]]
) -> None:
    need("accelerate")
    found, alone = run("accelerate,hf_trainer", cases, tmp_path)
    check_runs("accelerate", found, own)
    check_runs("hf_trainer", found, own)
    check_refusals(alone, {"alone": "there is one process, and nothing to exchange"})
    for rank in found:
        check_refusals(
            rank["accelerate/refused"],
            {
                "before prepare": "expected a model in DistributedDataParallel, found Linear",
                "dropped hook": "Accelerate silently drops those that are not in its own list",
                "hook twice": "already has a communication hook",
                "each batch": "sync_each_batch=True) exchanges the accumulated gradient 2 times in each step",
                "no optimizer": "method local_sgd counts the steps of the one optimizer",
                "gossip": "call tw.gossip(optimizer, model=...) in a loop of your own",
                "unknown key": "method.dytpe: unknown key",
                "no level": "give world=thinwire.init()",
                "clip elsewhere": "clip_norm: 1.0 is for method compress",
            },
        )
        check_refusals(
            rank["hf_trainer/refused"],
            {
                "clipping": "TrainingArguments(max_grad_norm=...): 1.0 would clip the decoded mean",
                "unused": "TrainingArguments(ddp_find_unused_parameters=False)",
                "wrong steps": "max_steps is 4, no multiple of method.every 3",
                "two methods": "it already has a method of thinwire",
            },
        )


def test_lightning_and_fabric(tmp_path: Path, cases: dict[str, Path], own: dict[str, tuple[list[float], str]]) -> None:
    need("lightning")
    found, alone = run("lightning,fabric", cases, tmp_path)
    check_runs("lightning", found, own)
    check_runs("fabric", found, own)
    for name in METHODS:
        seen = [rank[f"lightning/{name}"]["validated"] for rank in found]
        assert len(seen[0]) == STEPS, name
        assert seen[0] == seen[1], f"{name}: ranks validate different weights"
    # Between two exchanges what is validated is what all have agreed on at the last one.
    seen = found[0]["lightning/local_sgd"]["validated"]
    assert seen[1] == seen[2] != seen[3]
    check_refusals(alone, {"alone": "expected a model in DistributedDataParallel, found Linear"})
    for rank in found:
        check_refusals(
            rank["lightning/refused"],
            {
                "skipped hook": "Lightning silently skips its own where there is no CUDA",
                "clipping": "Trainer(gradient_clip_val=...): 1.0 would clip the decoded mean",
                "wrong steps": "4 steps are no multiple of method.every 3",
            },
        )
        check_refusals(rank["fabric/refused"], {"not set up": "expected what fabric.setup() returned, got Linear"})
