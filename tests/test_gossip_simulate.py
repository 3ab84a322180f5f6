"""Simulated runs: the bits of real machines, what is reported, and what the command says to bad input."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ranks import Rank, run_ranks
from torch import Tensor
from worlds import small_settings

from thinwire.comm.gossip.build import build_agent, make_plan
from thinwire.comm.gossip.machine import examine
from thinwire.comm.gossip.optimizer_state import OptimizerState
from thinwire.comm.gossip.post.door import open_post
from thinwire.comm.gossip.post.post import drive
from thinwire.comm.gossip.settings import GossipSettings
from thinwire.dist.config import RunConfig, load_config
from thinwire.dist.local_step import LocalStep
from thinwire.dist.optimizers import build_optimizer
from thinwire.dist.simulate import Circumstances, SimulatedRun
from thinwire.dist.task import build_task
from thinwire.launch.simulate import by_machine, simulate

STEPS = 6


def config_of(folder: Path, method: dict[str, Any], **other: Any) -> RunConfig:
    """A small run."""
    settings = small_settings(folder)
    settings["train"] = {"steps": STEPS, "global_batch": 16, "eval_windows": 8} | other.pop("train", {})
    settings |= {"method": {"kind": "gossip", "probes": 0} | method} | other
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    return load_config(file)


def real_machines(config: RunConfig, size: int) -> list[tuple[Tensor, int]]:
    """(the weights with which it ends, payload bytes that it sent) of each of some machines that talk over sockets."""
    assert isinstance(config.method, GossipSettings)
    method = config.method

    def work(rank: Rank) -> tuple[Tensor, int]:
        task = build_task(config, torch.device("cpu"))
        optimizer = build_optimizer(config.optimizer, task.model)
        machine = examine(optimizer, task.model, statistics=method.statistics == "mix")
        plan = make_plan(method, rank.size, steps=STEPS, numel=machine.replica.numel)
        queue = rank.queue()
        post = open_post(queue)
        agent = build_agent(plan, machine.replica, post)
        state = OptimizerState(optimizer, method.optimizer_state, list(machine.parameters.values()))
        agent.after_merge = state.merged
        local = LocalStep(
            config, task.model, optimizer, task.data, rank=rank.rank, size=rank.size, device=torch.device("cpu")
        )
        while not agent.ended:
            local.gradient(agent.step)
            with torch.no_grad():
                drive(agent.before_step(), post)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                drive(agent.after_step(), post)
        with torch.no_grad():
            drive(agent.cut(), post)
        post.close()
        sent = sum(queue.meter.sent_bytes("gossip/").values())
        queue.close()
        return machine.replica.weights(), sent

    return run_ranks(size, work)


@pytest.mark.parametrize(
    ("method", "other"),
    [
        ({"graph": "base_k"}, {}),
        ({"graph": "ring", "algorithm": {"kind": "dpsgd", "overlap": True, "wire": "bf16"}}, {}),
        ({"graph": "matching", "schedule": {"kind": "single_merge", "probability": 0.5}, "seed": 3}, {}),
        ({"graph": "ring", "algorithm": "gradient_tracking"}, {"optimizer": {"kind": "sgd", "lr": 0.1}}),
        ({"graph": "one_peer_exponential", "algorithm": "sgp"}, {}),
        ({"graph": "ring", "algorithm": "choco"}, {}),
        ({"graph": "base_k", "algorithm": {"kind": "sparta", "density": 0.1}}, {}),
    ],
    ids=["dpsgd", "overlap in bf16", "single merge", "gradient tracking", "sgp", "choco", "sparta"],
)
def test_simulated_and_real_machines_end_with_the_same_bits(
    tmp_path: Path, method: dict[str, Any], other: dict[str, Any]
) -> None:
    config = config_of(tmp_path, method, **other)
    run = SimulatedRun(config, Circumstances(4, rate_bps=1e6, delay_s=0.01, slow={2: 3.0}))
    last = run.run()
    simulated = [machine.parts.replica.weights() for machine in run.machines]
    real = real_machines(config, 4)
    assert [torch.equal(a, b) for a, (b, _) in zip(simulated, real, strict=True)] == [True] * 4
    counted = [sum(count for (rank, _), count in last.edges.items() if rank == sender) for sender in range(4)]
    assert counted == [sent for _, sent in real]
    merged = isinstance(config.method, GossipSettings) and config.method.schedule.kind == "single_merge"
    assert torch.equal(simulated[0], simulated[1]) == merged  # not the same because nothing was learnt


def test_a_view_says_what_was_sent_and_how_far_apart_machines_are(tmp_path: Path) -> None:
    config = config_of(tmp_path, {"graph": "ring"}, train={"eval_every": 2})
    run = SimulatedRun(config, Circumstances(4, compute_s=0.5, scored=2))
    views = []
    last = run.run(views.append)
    weights_bytes = 4 * run.numel
    assert [view.step for view in views] == [2, 4]
    assert [view.seconds for view in (*views, last)] == [1.0, 2.0, 3.0]
    assert last.kinds["gossip/value"] == 4 * 2 * STEPS * weights_bytes
    assert last.edges == {(a, b): STEPS * weights_bytes for a in range(4) for b in ((a + 1) % 4, (a - 1) % 4)}
    assert len(last.local) == 2
    assert last.exposed_s == [0.0] * 4
    vectors = torch.stack([machine.parts.replica.weights() for machine in run.machines]).double()
    assert last.rms_distance == pytest.approx(float((vectors - vectors.mean(0)).square().sum(1).mean().sqrt()))
    assert last.rms_norm == pytest.approx(float(vectors.square().sum(1).mean().sqrt()))
    assert last.merged is not None
    assert last.merged.loss < views[0].merged.loss
    assert json.loads(json.dumps(last.record()))["alive"] == 4


def test_machines_at_their_own_pace_end_together_and_a_run_repeats(tmp_path: Path) -> None:
    config = config_of(tmp_path, {"graph": "ring", "algorithm": "acid"}, train={"steps": 10})
    given = Circumstances(4, compute_s=0.1, delay_s=0.01, slow={2: 7.0})
    runs = [SimulatedRun(config, given) for _ in range(2)]
    first, second = (run.run() for run in runs)
    assert (first.step, first.least_step) == (10, 2)  # the slow machine ends with the step that it is at
    assert 1.0 < first.seconds < 1.5
    assert first.record() == second.record()
    for a, b in zip(runs[0].machines, runs[1].machines, strict=True):
        assert torch.equal(a.parts.replica.weights(), b.parts.replica.weights())


def test_what_a_final_merge_gives_up_is_told(tmp_path: Path) -> None:
    config = config_of(tmp_path, {"graph": "ring", "schedule": {"kind": "single_merge", "probability": 0.3}})
    last = SimulatedRun(config, Circumstances(4)).run()
    assert last.rms_distance == 0.0
    assert last.merged is not None
    assert [score.loss for score in last.local] == [last.merged.loss] * 4
    assert last.unmerged_distance is not None
    assert last.unmerged_distance > 0.01
    assert len({score.loss for score in last.unmerged}) == 4


def test_time_passes_as_computing_links_and_slow_machines_say(tmp_path: Path) -> None:
    """One machine of a ring of 4 is slow: the others wait for it at each step, and it for nobody."""
    config = config_of(tmp_path, {"graph": "ring"})
    run = SimulatedRun(config, Circumstances(4, compute_s=0.1, delay_s=0.05, slow={1: 5.0}))
    last = run.run()
    done = STEPS * 0.5
    assert last.exposed_s[1] == pytest.approx(0.0, abs=1e-12)
    assert last.exposed_s[0] == pytest.approx(done + 0.05 - STEPS * 0.1)
    assert last.seconds == pytest.approx(done + 4 * 0.05)  # and a cut: each comes, hears that all have, passes it on


def test_machines_die_and_the_others_go_on(tmp_path: Path) -> None:
    config = config_of(tmp_path, {"graph": "ring", "deadline_s": 2.0})
    run = SimulatedRun(config, Circumstances(4, killed_s={3: 0.25}))
    last = run.run()
    assert last.alive == 3
    assert run.alive() == [0, 1, 2]
    assert last.step == last.least_step == STEPS
    assert last.seconds < 0.1 * STEPS + 2.0 + 15.0 + 1.0
    assert math.isfinite(last.local_loss)


def test_one_machine_alone_trains(tmp_path: Path) -> None:
    last = SimulatedRun(config_of(tmp_path, {"graph": "complete"}), Circumstances(1)).run()
    assert (last.step, sum(last.sent_bytes), last.rms_distance) == (STEPS, 0, 0.0)


def test_the_command_prints_what_a_run_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config_of(tmp_path, {"graph": "base_k"}, train={"eval_every": 3})
    out = tmp_path / "figures.json"
    code = simulate(tmp_path / "run.yaml", [], hosts=4, rate="10mbit", delay="5ms", slow=["1=2"], output=out)
    printed = capsys.readouterr()
    assert (code, printed.err) == (0, "")
    assert "4 machines with" in printed.out
    assert "machine 1 2 times slower; lines of 10 Mbit/s, 5 ms one way" in printed.out
    for beginning in ("took ", "sent ", "edges ", "distance ", "validation "):
        assert any(line.startswith(beginning) for line in printed.out.splitlines())
    figures = json.loads(out.read_text())
    assert [view["step"] for view in figures["views"]] == [3, 6]
    assert figures["config"]["method"]["kind"] == "gossip"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"rate": "fast"}, "--rate: cannot read 'fast'"),
        ({"delay": "20"}, "--delay: '20' needs a unit"),
        ({"slow": ["9=2"]}, "--slow: 9=2, but the machines are 0..3"),
        ({"slow": ["1=0"]}, "--slow: 1=0; a machine takes some positive multiple"),
        ({"slow": ["one"]}, "--slow: 'one' has not the form MACHINE=NUMBER, such as 3=10"),
        ({"kill": ["1=1", "1=2"]}, "--kill: machine 1 is given twice"),
        ({"kill": [f"{i}=1" for i in range(4)]}, "--kill: it names all machines"),
        ({"compute_ms": -1.0}, "--compute-ms: -1"),
        ({"score": 0}, "--score: 0"),
        ({"hosts": 3}, "train.global_batch: 16 sequences cannot be shared equally by 3"),
        ({"output": Path("/nowhere/at/all.json")}, "there is no folder /nowhere/at"),
        ({"overrides": ["method={kind: allreduce}"]}, "method.kind: allreduce, but only gossip can be simulated"),
        ({"overrides": ["method.algorithm=decentlam"]}, "corrects the step of SGD"),
        ({"overrides": ["method.graph={kind: torus, rows: 3, columns: 3}"]}, "3"),
        ({"overrides": ["method.graf=ring"]}, "method.graf"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_refused_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: dict[str, Any], reason: str
) -> None:
    config_of(tmp_path, {"graph": "ring"})
    overrides = given.pop("overrides", [])
    code = simulate(tmp_path / "run.yaml", overrides, **{"hosts": 4, **given})
    assert reason in capsys.readouterr().err
    assert code == 2


def test_numbers_by_machine() -> None:
    assert by_machine("--slow", ["3=10", "0=0.5"], "") == {3: 10.0, 0: 0.5}
