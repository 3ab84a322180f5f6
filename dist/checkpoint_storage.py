"""torch DCP on raw bytes and JSON: a StorageWriter and a StorageReader that never pickle, safe with hostile files.

DCP's own FileSystemWriter pickles `.metadata` and every value that is not a tensor, and unpickling runs whatever a
file says. Here a state is one JSON file (StoredState: the tree of plain values and, for each tensor, dtype, size and
chunks with their place in the data files) and one raw data file per writing rank. Planning is DCP's
(checkpoint_plan.py): a DTensor is written by the ranks that hold its shards and may be read back under any other
mesh.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, NonNegativeInt, ValidationError
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from thinwire.dist.checkpoint_agreement import CheckpointError
from thinwire.dist.checkpoint_tree import DTYPE_NAMES, DTYPES

ALIGNMENT_BYTES = 64
PIECE_BYTES = 4 << 20
METADATA_LIMIT_BYTES = 256 << 20
_DIMENSIONS_LIMIT = 64
_CHUNKS_LIMIT = 4096
_NUMEL_LIMIT = 1 << 56


class _Stored(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class StoredChunk(_Stored):
    """One box of a tensor: its corner and sizes in the whole tensor, and its bytes in a data file."""

    offsets: tuple[NonNegativeInt, ...]
    sizes: tuple[NonNegativeInt, ...]
    file: str = Field(pattern=r"^[a-z0-9-]+\.bin$")
    at: NonNegativeInt
    nbytes: NonNegativeInt


class StoredTensor(_Stored):
    """One tensor and the chunks that it is stored in; they need not cover it where disks are not shared."""

    dtype: str
    size: tuple[NonNegativeInt, ...]
    chunks: tuple[StoredChunk, ...]


class StoredState(_Stored):
    """The JSON file of a state."""

    format: Literal[1]
    byteorder: Literal["little", "big"]
    tree: JsonValue
    tensors: dict[str, StoredTensor] = Field(default_factory=dict)


class HashedFile:
    """A new file that knows its size and SHA-256 and is on the disk when closed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.nbytes = 0
        self._digest = hashlib.sha256()
        self._file: BinaryIO = open(path, "xb")  # noqa: SIM115 - closed by __exit__

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), PIECE_BYTES):
            piece = view[start : start + PIECE_BYTES]
            self._digest.update(piece)
            with self._named():
                self._file.write(piece)
        self.nbytes += len(view)

    def entry(self) -> dict[str, Any]:
        """Size and checksum, as the manifest has them."""
        return {"bytes": self.nbytes, "sha256": self._digest.hexdigest()}

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if error is None:
                with self._named():
                    self._file.flush()
                    os.fsync(self._file.fileno())
        finally:
            with contextlib.suppress(OSError):  # a full disk has been told of already
                self._file.close()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error


class RawWriter(StorageWriter):
    """Writes this rank's share of a plan to `folder/data_file`; finish() writes `folder/metadata_file`.

    `files` then holds size and SHA-256 of each file that this object wrote.
    """

    def __init__(self, folder: Path, data_file: str, metadata_file: str) -> None:
        self.folder = folder
        self.data_file = data_file
        self.metadata_file = metadata_file
        self.files: dict[str, dict[str, Any]] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self.folder = self.folder if checkpoint_id is None else Path(checkpoint_id)
        self.files = {}

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = []
        if plan.items:
            with HashedFile(self.folder / self.data_file) as file:
                for item in plan.items:
                    data = planner.resolve_data(item)
                    if not isinstance(data, Tensor):
                        raise CheckpointError(f"checkpoint: {item.index.fqn} is not a tensor; use TreeSavePlanner")
                    file.write(bytes(-file.nbytes % ALIGNMENT_BYTES))
                    place = (self.data_file, file.nbytes)
                    data_bytes = _bytes_of(data)
                    file.write(data_bytes)
                    results.append(WriteResult(item.index, len(data_bytes), place))
            self.files[self.data_file] = file.entry()
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        place_of = {r.index: (*r.storage_data, r.size_in_bytes) for of_rank in results for r in of_rank}
        tensors = {}
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)
            chunks = []
            for chunk in tensor.chunks:
                file, at, nbytes = place_of[MetadataIndex(name, chunk.offsets)]
                chunks.append(
                    {
                        "offsets": list(chunk.offsets),
                        "sizes": list(chunk.sizes),
                        "file": file,
                        "at": at,
                        "nbytes": nbytes,
                    }
                )
            dtype = DTYPE_NAMES[tensor.properties.dtype]
            tensors[name] = {"dtype": dtype, "size": list(tensor.size), "chunks": chunks}
        state = {"format": 1, "byteorder": sys.byteorder, "tree": metadata.planner_data, "tensors": tensors}
        with HashedFile(self.folder / self.metadata_file) as file:
            text = json.dumps(state, allow_nan=False).encode()
            if len(text) > METADATA_LIMIT_BYTES:
                raise CheckpointError(f"{self.metadata_file} would have {len(text)} bytes; keep numbers in tensors")
            file.write(text)
        self.files[self.metadata_file] = file.entry()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def storage_meta(self) -> StorageMeta | None:
        return None


class RawReader(StorageReader):
    """Reads what RawWriter wrote. Every number in the JSON file is checked against the files before anything is
    allocated.

    verify(names) is called with the files that are about to be read; it raises if one is not what was written.
    """

    def __init__(self, folder: Path, metadata_file: str, verify: Callable[[list[str]], None]) -> None:
        self.folder = folder
        self.metadata_file = metadata_file
        self._verify = verify

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self.folder = self.folder if checkpoint_id is None else Path(checkpoint_id)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        self._verify([self.metadata_file])
        state = read_state(self.folder, self.metadata_file)
        tensors: dict[str, Any] = {}
        places: dict[MetadataIndex, StoredChunk] = {}
        for name, tensor in state.tensors.items():
            boxes = [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in tensor.chunks]
            properties = TensorProperties(dtype=DTYPES[tensor.dtype])
            tensors[name] = TensorStorageMetadata(properties, torch.Size(tensor.size), boxes)
            places |= {MetadataIndex(name, c.offsets): c for c in tensor.chunks}
        return Metadata(tensors, planner_data=state.tree, storage_data=places)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._metadata = metadata

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        places = self._metadata.storage_data
        self._verify(sorted({places[item.storage_index].file for item in plan.items}))
        files: dict[str, BinaryIO] = {}
        try:
            for item in plan.items:
                chunk = places[item.storage_index]
                stored = self._metadata.state_dict_metadata[item.storage_index.fqn]
                assert isinstance(stored, TensorStorageMetadata)
                if chunk.file not in files:
                    files[chunk.file] = open(self.folder / chunk.file, "rb")  # noqa: SIM115 - closed below
                source = _read_box(
                    files[chunk.file], chunk, stored.properties.dtype, item.storage_offsets, item.lengths
                )
                target = planner.resolve_tensor(item)
                target.copy_(source)
                planner.commit_tensor(item, target)
        finally:
            for file in files.values():
                file.close()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def read_state(folder: Path, metadata_file: str) -> StoredState:
    """Parse and check a state's JSON file. Raises CheckpointError if it is malformed or contradicts the data files."""
    path = folder / metadata_file
    nbytes = path.stat().st_size
    if nbytes > METADATA_LIMIT_BYTES:
        raise CheckpointError(f"{metadata_file} has {nbytes} bytes; at most {METADATA_LIMIT_BYTES}")
    try:
        state = StoredState.model_validate_json(path.read_bytes())
    except (ValidationError, RecursionError) as error:
        raise CheckpointError(f"{metadata_file} is malformed: {error}") from error
    if state.byteorder != sys.byteorder:
        raise CheckpointError(
            f"{metadata_file}: written on a {state.byteorder}-endian machine; this one is {sys.byteorder}"
        )
    file_bytes: dict[str, int] = {}
    occupied: dict[str, list[tuple[int, int]]] = {}
    for name, tensor in state.tensors.items():
        where = f"{metadata_file}: tensor {name!r}"
        if tensor.dtype not in DTYPES:
            raise CheckpointError(f"{where}: unknown dtype {tensor.dtype!r}")
        if len(tensor.size) > _DIMENSIONS_LIMIT or math.prod(max(1, n) for n in tensor.size) > _NUMEL_LIMIT:
            raise CheckpointError(f"{where}: impossible size {tensor.size}")
        if len(tensor.chunks) > _CHUNKS_LIMIT:
            raise CheckpointError(f"{where}: {len(tensor.chunks)} chunks; at most {_CHUNKS_LIMIT}")
        for chunk in tensor.chunks:
            if not len(chunk.offsets) == len(chunk.sizes) == len(tensor.size) or any(
                offset + size > whole
                for offset, size, whole in zip(chunk.offsets, chunk.sizes, tensor.size, strict=True)
            ):
                raise CheckpointError(f"{where}: chunk {chunk.offsets}+{chunk.sizes} is outside {tensor.size}")
            if math.prod(chunk.sizes) * DTYPES[tensor.dtype].itemsize != chunk.nbytes:
                raise CheckpointError(f"{where}: chunk of sizes {chunk.sizes} cannot have {chunk.nbytes} bytes")
            if chunk.file not in file_bytes:
                try:
                    file_bytes[chunk.file] = (folder / chunk.file).stat().st_size
                except OSError as error:
                    raise CheckpointError(f"{where}: data file {chunk.file!r}: {error.strerror}") from error
            if chunk.at + chunk.nbytes > file_bytes[chunk.file]:
                raise CheckpointError(
                    f"{where}: bytes {chunk.at}..{chunk.at + chunk.nbytes} lie past the end of {chunk.file} "
                    f"({file_bytes[chunk.file]} bytes)"
                )
            occupied.setdefault(chunk.file, []).append((chunk.at, chunk.at + chunk.nbytes))
        _refuse_overlap(where, tensor.chunks)
    for file, spans in occupied.items():
        in_order = sorted(span for span in spans if span[0] < span[1])
        for (_, end), (start, _) in itertools.pairwise(in_order):
            if start < end:
                raise CheckpointError(f"{metadata_file}: two tensors share bytes {start}..{end} of {file}")
    return state


def _refuse_overlap(where: str, chunks: Sequence[StoredChunk]) -> None:
    boxes = [(c.offsets, [o + s for o, s in zip(c.offsets, c.sizes, strict=True)]) for c in chunks if c.nbytes]
    if len({c.offsets for c in chunks}) != len(chunks):
        raise CheckpointError(f"{where}: two chunks begin at the same place")
    for index, (low, high) in enumerate(boxes):
        for other_low, other_high in boxes[:index]:
            if all(a < d and c < b for a, b, c, d in zip(low, high, other_low, other_high, strict=True)):
                raise CheckpointError(f"{where}: chunks at {other_low} and {low} overlap")


def _read_box(
    file: BinaryIO, chunk: StoredChunk, dtype: torch.dtype, offsets: torch.Size, lengths: torch.Size
) -> Tensor:
    """A box of a chunk: reads whole rows of dimension 0, which is how FSDP shards, and narrows the other dimensions."""
    if math.prod(lengths) == 0:
        return torch.empty(lengths, dtype=dtype)
    rows = chunk.sizes[0] if chunk.sizes else 1
    row_bytes = chunk.nbytes // rows
    first, count = (offsets[0], lengths[0]) if chunk.sizes else (0, 1)
    buffer = bytearray(count * row_bytes)
    file.seek(chunk.at + first * row_bytes)
    if file.readinto(buffer) != len(buffer):  # type: ignore[attr-defined]
        raise CheckpointError(f"checkpoint: {chunk.file} ended early: it was cut while it was read")
    box = torch.frombuffer(buffer, dtype=dtype).reshape((count, *chunk.sizes[1:]) if chunk.sizes else ())
    for dim in range(1, len(lengths)):
        box = box.narrow(dim, offsets[dim], lengths[dim])
    return box


def _bytes_of(tensor: Tensor) -> bytes | memoryview:
    local = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    # A 0-dimensional tensor has no last dimension to view as bytes.
    return local.reshape(-1).view(torch.uint8).numpy().data
