"""What a plan compares: the run as it is configured, and the same run by every other method."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from thinwire.dist.config import RunConfig
from thinwire.dist.config_errors import explain
from thinwire.dist.methods import MethodSettings, engines_for, unused_by
from thinwire.dist.plan.cluster import Cluster

_BY_GRADIENTS = ("allreduce", "compress", "local_sgd", "gossip", "partition")
_LOCAL_STEPS = (10, 8, 12, 5, 16, 20, 6, 4, 15, 3, 2)  # the first that divides the run's steps
_METHODS: TypeAdapter[MethodSettings] = TypeAdapter(MethodSettings)


@dataclass(frozen=True)
class Candidate:
    """A run to be predicted. is_own: as the user has configured it. why_not: why there is no such run; else None."""

    label: str
    config: RunConfig
    is_own: bool = False
    why_not: str | None = None


def candidates_for(config: RunConfig, cluster: Cluster, kinds: tuple[str, ...] = ()) -> list[Candidate]:
    """The run itself, and each other method with settings that make sense on these levels.

    Args:
        kinds: of the methods; empty: all that train by gradients, and the run's own.
    """
    own = Candidate(f"{config.method.kind}, as configured", config, is_own=True)
    found = [own] if not kinds or config.method.kind in kinds else []
    for label, method in _offers(config, cluster):
        if method["kind"] not in (kinds or (*_BY_GRADIENTS, config.method.kind)):
            continue
        other = _by_method(config, label, method)
        if other.why_not is None and (other.config.method, other.config.engine) == (config.method, config.engine):
            if found and found[0] is own:  # the same, under a better name
                found[0] = own = Candidate(label, config, is_own=True)
            continue
        found.append(other)
    return found


def _offers(config: RunConfig, cluster: Cluster) -> Iterator[tuple[str, dict[str, Any]]]:
    """(label, method)."""
    inner = [level.name for level in cluster.levels[:-1] if level.size > 1]
    for dtype in ("fp32", "bf16"):
        yield f"all-reduce {dtype}", {"kind": "allreduce", "dtype": dtype}
        if inner:
            between = {"kind": "allreduce", "dtype": dtype, "exact_within": inner[-1]}
            yield f"all-reduce {dtype} between {inner[-1]}s", between
    compressors = {
        "int8": {"kind": "int8"},
        "int4": {"kind": "int4"},
        "low rank 16": {"kind": "lowrank", "rank": 16, "dtype": "bf16"},
        "low rank 4": {"kind": "lowrank", "rank": 4, "dtype": "bf16"},
        "top-k 1 %, int8": {"kind": "topk", "density": 0.01, "values": "int8"},
    }
    for label, compressor in compressors.items():
        # Clipped after the mean, as all-reduce does it, so that sending overlaps with the backward pass.
        yield label, {"kind": "compress", "compressor": compressor, "clip": "after"}
    if inner:
        for label in ("int8", "int4"):
            method = {"kind": "compress", "compressor": compressors[label], "clip": "after", "exact_within": inner[-1]}
            yield f"{label} between {inner[-1]}s", method
    every = next((n for n in _LOCAL_STEPS if config.train.steps % n == 0), _LOCAL_STEPS[0])
    local = {"kind": "local_sgd", "every": every}
    yield f"DiLoCo, every {every}", {**local, "outer": {"kind": "nesterov"}, "compressor": {"kind": "bf16"}}
    sparse = {
        "outer": {"kind": "sgd", "lr": 1.0},
        "compressor": {"kind": "topk", "k": 64, "chunk": 4096, "values": "2bit"},
        "feedback": {"kind": "ef", "decay": 0.95},
        "collective": "contributor_mean",
    }
    yield f"SparseLoCo, every {every}", {**local, **sparse}
    pairs = {
        "kind": "gossip",
        "graph": {"kind": "matching"},
        "schedule": {"kind": "every", "steps": 4, "merge_at": "end"},
    }
    yield "gossip, pairs every 4", pairs
    where = inner[0] if inner else "rank"
    placed = {"kind": "partition", "params": where, "grads": where, "optim": "world"}
    four_bits = {
        "gradients": {"world": {"kind": "int4", "rounding": "stochastic"}},
        "update": {"kind": "difference", "bits": 4},
    }
    yield "partition, fp32", placed
    yield "partition, 4 bits", {**placed, **four_bits}
    yield "ZeRO-3", {"kind": "partition", "preset": "zero3"}
    yield "one byte", {"kind": "onebyte"}


def _by_method(config: RunConfig, label: str, method: Mapping[str, Any]) -> Candidate:
    """The run by another method, without the settings that mean nothing to it."""
    data = config.resolved() | {"method": dict(method)}
    allowed = engines_for(method["kind"])
    if config.engine.kind not in allowed or config.engine.kind == "deepspeed":
        data["engine"] = {"kind": allowed[0]}
    for path in unused_by(_METHODS.validate_python(method)):
        *parents, leaf = path.split(".")
        node = data
        for name in parents:
            node = node[name]
        node.pop(leaf, None)
    try:
        return Candidate(label, RunConfig.model_validate_json(json.dumps(data)))
    except ValidationError as error:
        reason = explain(error, RunConfig, label).splitlines()[1].strip()
        return Candidate(label, config, why_not=reason)
