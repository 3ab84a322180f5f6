"""Logs for tests: runs whose codes are drawn at random, carried out round by round as machines do."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thinwire.comm.onebyte.canonical import canonical, describe_run
from thinwire.comm.onebyte.log import Log
from thinwire.comm.onebyte.manifest import Manifest
from thinwire.comm.onebyte.replica import Replica
from thinwire.comm.onebyte.rounds import Contribution, Member, Roster, Round, Snapshot
from thinwire.comm.onebyte.settings import OneByteSettings

MEMBERS = tuple(Member(slot, f"machine{slot}", "", 2) for slot in range(4))
SHAPES = {"embed.weight": (19, 7), "block.0.norm": (7,), "block.0.proj.weight": (7, 31)}


def base_weights(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def manifest_for(base: Mapping[str, Tensor], **settings: Any) -> Manifest:
    chosen = OneByteSettings(**settings)
    group = {
        "param_names": list(base),
        "params": [tensor.clone().requires_grad_() for tensor in base.values()],
        "lr": chosen.lr,
        "eps": chosen.eps,
        "weight_decay": chosen.weight_decay,
    }
    return describe_run(canonical([group]), chosen)


def random_round(number: int, chance: random.Random, machines: int = 4, samples: int = 2) -> Round:
    """Slopes of up to 1; now and then a machine is absent, or one of its slopes."""
    slots = [slot for slot in range(machines) if chance.random() < 0.9]
    codes = [bytes(chance.choice((0x80, 0, *range(1, 65), *range(129, 193))) for _ in range(samples)) for _ in slots]
    rate = 2.0 ** -(6 + number // 10 % 2)
    return Round(number, rate, tuple(Contribution(slot, row) for slot, row in zip(slots, codes, strict=True)))


def write_run(path: Path, base: Mapping[str, Tensor], rounds: int, **settings: Any) -> dict[str, Tensor]:
    """A log of a run that a machine has carried out one round after the other. Returns its weights at the end."""
    manifest = manifest_for(base, **settings)
    weights = {name: tensor.clone() for name, tensor in base.items()}
    replica = Replica(manifest, list(weights.values()))
    chance = random.Random(7)
    with Log.create(path, manifest.to_bytes()) as log:
        log.append(Roster(0, MEMBERS))
        for number in range(rounds):
            round_ = random_round(number, chance)
            replica.apply([round_])
            log.append(round_)
            if replica.is_snapshot(number):
                log.append(Snapshot(replica.rounds, replica.model_hash()))
    return weights
