"""What DCP plans for a tree, how plans travel between ranks, and the two calls that save and load a tree.

The ranks that share a disk exchange their local plans as JSON and each computes the same global plan from them.
DCP's own save and load would gather and scatter pickled plans instead, which is why thinwire drives planner and
storage itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_global_save_plan,
    create_default_local_load_plan,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

from thinwire.dist.checkpoint_agreement import CheckpointError, CheckpointMismatchError
from thinwire.dist.checkpoint_storage import RawReader, RawWriter
from thinwire.dist.checkpoint_tree import DTYPE_NAMES, DTYPES, flatten, unflatten


class TreeSavePlanner(DefaultSavePlanner):
    """Saves a tree (checkpoint_tree.py): tensors as DCP items, all else in the metadata.

    create_global_plan gives each chunk to one of the ranks that hold it, so that all write about as many bytes; it
    is a pure function of the local plans, in rank order. Unlike DCP's it does not insist on a complete tensor:
    without a shared disk, each disk has the chunks of its own ranks.
    """

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        self.tree, tensors = flatten(state_dict)
        super().set_up_planner(tensors, storage_meta, is_coordinator)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = create_default_global_save_plan(_spread(all_plans))
        return plans, dataclasses.replace(metadata, planner_data=self.tree)


class TreeLoadPlanner(DefaultLoadPlanner):
    """Loads a tree into fresh memory; `loaded()` is the result.

    The state_dict given to DCP is a template and is never written to: where it has a DTensor, the result has one of
    the same mesh and placements; elsewhere the result is a CPU tensor. What the template has beside the checkpoint,
    or lacks, is left to whoever takes the result (an optimizer that has not stepped yet has no state to compare
    with).
    """

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        assert metadata is not None
        _, templates = flatten(state_dict)
        fresh: dict[str, Any] = {}
        for name, stored in metadata.state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata)
            template = templates.get(name)
            if template is not None:
                _compare(name, template, stored)
            if isinstance(template, DTensor):
                fresh[name] = DTensor.from_local(
                    torch.empty_like(template.to_local().detach()),
                    template.device_mesh,
                    template.placements,
                    run_check=False,
                    shape=template.shape,
                    stride=template.stride(),
                )
                continue
            held = sum(math.prod(chunk.sizes) for chunk in stored.chunks)
            if held != math.prod(stored.size):
                raise CheckpointMismatchError(
                    f"checkpoint: {name} of size {tuple(stored.size)} is stored in part on this disk ({held} "
                    "values); it can be read only into a DTensor whose shards lie within that part"
                )
            fresh[name] = torch.empty(stored.size, dtype=stored.properties.dtype)
        super().set_up_planner(fresh, metadata, is_coordinator)

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        plan = create_default_local_load_plan(self.state_dict, self.metadata)
        read = dict.fromkeys(self.state_dict, 0)
        for item in plan.items:
            read[item.dest_index.fqn] += math.prod(item.lengths)
        for name, tensor in self.state_dict.items():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if read[name] != local.numel():
                raise CheckpointMismatchError(
                    f"checkpoint: {name}: this disk has {read[name]} of the {local.numel()} values that this rank needs"
                )
        return plan

    def loaded(self) -> Any:
        """The tree, after read_data."""
        assert self.metadata is not None
        return unflatten(self.metadata.planner_data, self.state_dict)


def plan_to_json(plan: SavePlan) -> list[Any]:
    """A SavePlan as JSON values, for the other ranks of the disk."""
    rows = []
    for item in plan.items:
        assert item.tensor_data is not None
        data = item.tensor_data
        box = [list(data.chunk.offsets), list(data.chunk.sizes), list(data.size)]
        rows.append([item.index.fqn, item.type == WriteItemType.SHARD, *box, DTYPE_NAMES[data.properties.dtype]])
    return rows


def plan_from_json(rows: Iterable[Any]) -> SavePlan:
    """The inverse of plan_to_json."""
    items = []
    for name, is_shard, offsets, sizes, size, dtype in rows:
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        properties = TensorProperties(dtype=DTYPES[dtype])
        items.append(
            WriteItem(
                index=MetadataIndex(name, offsets),
                type=WriteItemType.SHARD if is_shard else WriteItemType.TENSOR,
                tensor_data=TensorWriteData(chunk, properties, torch.Size(size)),
            )
        )
    return SavePlan(items)


def results_to_json(results: Iterable[WriteResult]) -> list[Any]:
    """Where a rank wrote which chunk, as JSON values."""
    return [[r.index.fqn, list(r.index.offset or ()), r.size_in_bytes, *r.storage_data] for r in results]


def results_from_json(rows: Iterable[Any]) -> list[WriteResult]:
    """The inverse of results_to_json."""
    return [WriteResult(MetadataIndex(name, offsets), nbytes, (file, at)) for name, offsets, nbytes, file, at in rows]


def save_state(state: Mapping[str, Any], writer: RawWriter) -> None:
    """Save a tree of this rank alone."""
    planner = TreeSavePlanner()
    planner.set_up_planner(dict(state), None, True)
    plans, metadata = planner.create_global_plan([planner.create_local_plan()])
    results = writer.write_data(planner.finish_plan(plans[0]), planner).wait()
    writer.finish(metadata, [results])


def load_state(reader: RawReader, template: Mapping[str, Any]) -> Any:
    """Load a tree: what this rank needs of it, no more."""
    planner = TreeLoadPlanner()
    metadata = reader.read_metadata()
    planner.set_up_planner(dict(template), metadata, True)
    reader.set_up_storage_reader(metadata, True)
    plan = planner.create_global_plan([planner.create_local_plan()])[0]
    reader.read_data(planner.finish_plan(plan), planner).wait()
    return planner.loaded()


def _compare(name: str, template: Tensor, stored: TensorStorageMetadata) -> None:
    if (template.shape, template.dtype) != (stored.size, stored.properties.dtype):
        raise CheckpointMismatchError(
            f"checkpoint: {name} is {stored.properties.dtype} of size {tuple(stored.size)} in the checkpoint and "
            f"{template.dtype} of size {tuple(template.shape)} here; resume with the model and precision that wrote it"
        )


def _spread(plans: list[SavePlan]) -> list[SavePlan]:
    """Give every chunk to one of the ranks that hold it: to the one with the fewest bytes so far."""
    holders: dict[MetadataIndex, list[int]] = {}
    chunk_of: dict[MetadataIndex, TensorWriteData] = {}
    for rank, plan in enumerate(plans):
        for item in plan.items:
            assert item.tensor_data is not None
            data = item.tensor_data
            first = chunk_of.setdefault(item.index, data)
            if (first.size, first.chunk, first.properties.dtype) != (data.size, data.chunk, data.properties.dtype):
                raise CheckpointError(
                    f"checkpoint: {item.index.fqn} is {first.properties.dtype} of size {tuple(first.size)} on one rank "
                    f"and {data.properties.dtype} of size {tuple(data.size)} on another; state that differs belongs in "
                    "per_rank"
                )
            holders.setdefault(item.index, []).append(rank)
    load_bytes = [0] * len(plans)
    writer: dict[MetadataIndex, int] = {}
    for index, ranks in holders.items():
        data = chunk_of[index]
        writer[index] = min(ranks, key=lambda rank: load_bytes[rank])
        load_bytes[writer[index]] += math.prod(data.chunk.sizes) * data.properties.dtype.itemsize
    return [
        dataclasses.replace(plan, items=[item for item in plan.items if writer[item.index] == rank])
        for rank, plan in enumerate(plans)
    ]
