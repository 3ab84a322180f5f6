"""Weights alone, as one safetensors file that other tools read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from thinwire.dist.checkpoint_generation import fsync_directory


def export_safetensors(model_state: Mapping[str, Tensor], path: Path, facts: Mapping[str, str] | None = None) -> None:
    """Write tensors by name to `path`, which is either as before or complete whatever happens meanwhile.

    model_state: model.state_dict(); tied weights are written under each of their names. facts: strings for the
    file's header. Raises ValueError for what is not a dense tensor in this process (gather a DTensor with
    full_tensor() first).
    """
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, value in model_state.items():
        if not isinstance(value, Tensor) or isinstance(value, DTensor) or value.is_meta or value.is_sparse:
            raise ValueError(
                f"export_safetensors: {name} is a {type(value).__name__}; pass dense tensors (full_tensor())"
            )
        tensor = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        # safetensors refuses tensors that share memory.
        tensors[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.writing")
    try:
        save_file(tensors, unfinished, metadata=dict(facts or {}))
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)
