"""Weights alone, as one safetensors file that other tools read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from thinwire.dist.checkpoint_agreement import Agreement
from thinwire.dist.checkpoint_generation import fsync_directory


def export_safetensors(model_state: Mapping[str, Tensor], path: Path, facts: Mapping[str, str] | None = None) -> None:
    """Write tensors by name to `path`, which is either as before or complete whatever happens meanwhile.

    model_state: model.state_dict(); tied weights are written under each of their names. facts: strings for the
    file's header. Raises ValueError for what is not a dense tensor in this process (a sharded
    model is for export_sharded_safetensors).
    """
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, value in model_state.items():
        if not isinstance(value, Tensor) or isinstance(value, DTensor) or value.is_meta or value.is_sparse:
            raise ValueError(
                f"export_safetensors: {name} is a {type(value).__name__}; pass dense tensors, or a "
                "sharded model to export_sharded_safetensors()"
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


def export_sharded_safetensors(
    model: nn.Module,
    path: Path,
    *,
    group: ProcessGroup | None,
    rank: int,
    world_size: int,
    facts: Mapping[str, str] | None = None,
) -> None:
    """Write the whole weights of a sharded model, such as a partitioned one, from rank 0. Collective.

    One tensor after another is gathered among the ranks that share rank 0's shards; rank 0 alone keeps them, in CPU
    memory.

    Args:
        path: as rank 0 sees it; as in export_safetensors().
        group: control group, as for a Checkpointer; None for a world of one.
    Raises:
        CheckpointError: on every rank, if rank 0 cannot write.
    """
    whole: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if isinstance(value, DTensor) and 0 not in value.device_mesh.mesh:
            continue
        tensor = value.full_tensor() if isinstance(value, DTensor) else value
        if rank == 0:
            whole[name] = tensor.detach().cpu()
    agreement = Agreement(group, rank, world_size)
    agreement.run(f"export to {path}", lambda: export_safetensors(whole, path, facts) if rank == 0 else None)
