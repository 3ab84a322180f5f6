"""Machines that no launcher has started: they begin together, one dies and enters again, other starts are refused."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Rank, run_ranks
from test_gossip_training import Records
from worlds import close_world, small_config, thread_world

from thinwire.comm.gossip.post.machines import MachinesSettings
from thinwire.dist.gossip_run import GossipRunSettings
from thinwire.dist.gossip_train import GossipTrainer

SIZE = 3


def free_addresses(count: int) -> list[str]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    addresses = [f"127.0.0.1:{sock.getsockname()[1]}" for sock in sockets]
    for sock in sockets:
        sock.close()
    return addresses


def configuration(folder: Path, addresses: list[str], rank: int, *overrides: str) -> Any:
    config = small_config(
        folder, f"name=machine{rank}", "train.global_batch=6", "schedule={kind: constant}", *overrides
    )
    machines = MachinesSettings(
        machines=tuple(addresses),
        rank=rank,
        secret="only these three",
        wait_for=2 if "name=again" in overrides else None,
    )
    method = GossipRunSettings(graph="complete", machines=machines, schedule={"kind": "every", "merge_at": "end"})
    return config.model_copy(update={"method": method})


def run_machine(config: Any, prepare: Any = None) -> tuple[list[dict[str, Any]], list[torch.Tensor], str]:
    def work(rank: Rank) -> tuple[list[dict[str, Any]], list[torch.Tensor], str]:
        world = thread_world(rank)
        try:
            trainer, records = GossipTrainer(config, world), Records()
            if prepare is not None:
                prepare(trainer)
            trainer.run([records])
            return records.all, [p.detach().clone() for p in trainer.model.parameters()], trainer.state.resumed
        finally:
            close_world(world)

    (outcome,) = run_ranks(1, work, timeout_s=100)
    return outcome


class DiedError(Exception):
    pass


def test_a_machine_dies_and_enters_again(tmp_path: Path) -> None:
    addresses = free_addresses(SIZE)
    steps = "train.steps=40"
    entered = threading.Event()

    def wait_for_the_other(trainer: GossipTrainer) -> None:
        """Nobody comes to the end before the machine that has died is back."""

        def pause(*_: object) -> None:
            if trainer.state.step == 30:
                assert entered.wait(60)

        trainer.optimizer.register_step_pre_hook(pause)

    def die(trainer: GossipTrainer) -> None:
        def at_step_three(*_: object) -> None:
            if trainer.state.step == 3:
                raise DiedError

        trainer.optimizer.register_step_pre_hook(at_step_three)

    def is_back(trainer: GossipTrainer) -> None:
        entered.set()

    def dies_and_comes_back() -> Any:
        with pytest.raises(DiedError):
            run_machine(configuration(tmp_path, addresses, 2, steps), die)
        return run_machine(configuration(tmp_path, addresses, 2, steps, "name=again"), is_back)

    with ThreadPoolExecutor(SIZE) as pool:
        others = [
            pool.submit(run_machine, configuration(tmp_path, addresses, rank, steps), wait_for_the_other)
            for rank in (0, 1)
        ]
        back = pool.submit(dies_and_comes_back)
        first, second, third = others[0].result(100), others[1].result(100), back.result(100)
    assert "enters the run after" in third[2]
    assert "a share of 0.5 in the mean" in third[2]
    assert all(torch.equal(a, b) for one in (second, third) for a, b in zip(first[1], one[1], strict=True))
    assert {records[-1]["step"] for records, _, _ in (first, second, third)} == {40}
    masses = [records[-1]["method"]["mass"] for records, _, _ in (first, second, third)]
    assert abs(sum(masses) - 2.0) < 1e-9  # the first share of the machine that died went with it


def test_machines_with_other_settings_are_refused(tmp_path: Path) -> None:
    addresses = free_addresses(2)
    configs = [configuration(tmp_path, addresses, rank, f"optimizer.lr={0.01 * (rank + 1)}") for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        for rank, outcome in enumerate([pool.submit(run_machine, config) for config in configs]):
            with pytest.raises(ValueError, match=f"settings of machine {1 - rank} differ"):
                outcome.result(60)
