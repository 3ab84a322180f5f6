"""One file per rank beside a checkpoint of others: safetensors, with the shape of the tree in its header. No pickle."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from thinwire.comm.queue import CommQueue
from thinwire.comm.same_weights import weights_digest
from thinwire.dist.checkpoint_tree import flatten, unflatten

_NAME = re.compile(r"thinwire-rank(\d+)-of-(\d+)\.safetensors")


def write_rank_state(folder: Path, state: Mapping[str, Any], queue: CommQueue, weights: Mapping[str, Tensor]) -> None:
    """Write this rank's state into the folder, whole or not at all.

    Args:
        state: dicts, lists and tuples of tensors and plain values.
        queue: says which rank this is, of how many.
        weights: of the model, by name; the state belongs to these alone.
    """
    form, tensors = flatten(state)
    held = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"thinwire-rank{queue.rank}-of-{queue.size}.safetensors"
    partial = path.with_suffix(".partial")
    save_file(held, partial, metadata={"tree": json.dumps(form), "weights": weights_digest(weights).hex()})
    partial.replace(path)


def read_rank_states(folder: Path, weights: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """The states of all ranks that wrote into the folder, in rank order; empty if none did.

    Args:
        weights: of the model as it is now, by name.
    Raises:
        ValueError: a rank's file is missing, unreadable, or was written beside other weights.
    """
    found: dict[int, dict[int, Path]] = {}
    for path in folder.glob("thinwire-rank*.safetensors") if folder.is_dir() else ():
        if match := _NAME.fullmatch(path.name):
            found.setdefault(int(match[2]), {})[int(match[1])] = path
    if not found:
        return []
    if len(found) > 1:
        raise ValueError(
            f"{folder}: it holds states of {sorted(found)} ranks; remove those of the run that is not meant"
        )
    ((size, paths),) = found.items()
    if missing := [rank for rank in range(size) if rank not in paths]:
        raise ValueError(
            f"{folder}: the states of ranks {missing} of {size} are missing; copy the files of all hosts into it"
        )
    digest = weights_digest(weights).hex()
    return [_read(paths[rank], digest) for rank in range(size)]


def _read(path: Path, digest: str) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            form, written_beside = json.loads(header["tree"]), header["weights"]
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as a state of thinwire: {error}") from None
    if written_beside != digest:
        raise ValueError(
            f"{path}: it was written beside other weights than the model has now; resume weights and state from the "
            "same checkpoint folder (for_hf_trainer(..., resume_from=FOLDER))"
        )
    state: dict[str, Any] = unflatten(form, tensors)
    return state
