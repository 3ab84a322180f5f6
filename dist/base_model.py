"""The weights at which a one-byte run began, from the files that models come in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from thinwire.comm.onebyte.manifest import TensorEntry
from thinwire.dist import checkpoint_generation
from thinwire.dist.checkpoint import Checkpointer, CheckpointError, CheckpointSettings
from thinwire.dist.run_folder import CHECKPOINTS

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class BaseModelError(ValueError):
    """There is no model where one was to be, or not the run's."""


@dataclass(frozen=True)
class BaseModel:
    """tensors: all of the file, by its names. names: where in it the trained tensors are, by canonical name."""

    tensors: dict[str, Tensor]
    names: dict[str, str]
    entries: tuple[TensorEntry, ...]

    def trained(self) -> dict[str, Tensor]:
        """The trained tensors by canonical name; 16-bit ones as fp32 where the run had them so."""
        return {entry.name: _widened(self.tensors[self.names[entry.name]], entry) for entry in self.entries}

    def replaced(self, trained: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The file's tensors with the trained ones put in; and what else was taken for one of these, by its name.

        A tied weight that a file holds under two names is trained under one. The other is a tensor that was equal to
        it, bit for bit, and not constant.
        """
        tensors, ties = dict(self.tensors), {}
        for canonical, name in self.names.items():
            before = self.tensors[name]
            tensors[name] = trained[canonical].reshape(before.shape)
            for other, tensor in self.tensors.items():
                if other not in self.names.values() and _tied(before, tensor):
                    tensors[other] = tensors[name]
                    ties[other] = name
        return tensors, ties


def open_base(path: Path, entries: Sequence[TensorEntry]) -> BaseModel:
    """Read a model and find the trained tensors in it, whatever its names have in front.

    Args:
        path: a .safetensors file, a Hugging Face folder with such files, a checkpoint (one generation or a folder of
            them, then the newest) or the run folder around it.
        entries: the manifest's tensors.
    Raises:
        BaseModelError: nothing of the kind is there, it is damaged, or it lacks a tensor.
    """
    tensors = read_weights(path)
    return BaseModel(tensors, _names(tensors, entries, path), tuple(entries))


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a model by name, on the CPU. See open_base."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise BaseModelError(f"{path} is not a .safetensors file; no pickle is read: convert it with safetensors")
        return _load(path)
    if not path.is_dir():
        raise BaseModelError(f"{path} does not exist")
    for folder in (path, path / CHECKPOINTS):
        if checkpoint_generation.generations(folder):
            return _read_checkpoint(folder)
    if (path / _INDEX).is_file():
        return _read_shards(path)
    if (path / _SINGLE).is_file():
        return _load(path / _SINGLE)
    raise BaseModelError(
        f"{path} holds no model: neither {_SINGLE} nor {_INDEX}, nor a checkpoint (step-..., or {CHECKPOINTS}/step-...)"
    )


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise BaseModelError(f"{path} cannot be read: {error}") from None


def _read_shards(folder: Path) -> dict[str, Tensor]:
    try:
        places: dict[str, str] = json.loads((folder / _INDEX).read_text())["weight_map"]
        files = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise BaseModelError(f"{folder / _INDEX} is no index of weights: {error!r}") from None
    if odd := [file for file in files if Path(file).name != file]:
        raise BaseModelError(f"{folder / _INDEX} names {odd[0]!r}, which is not a file beside it")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= _load(folder / file)
    if missing := sorted(set(places) - set(tensors)):
        raise BaseModelError(f"{folder}: its files lack {missing[0]}, which {_INDEX} says they hold")
    return tensors


def _read_checkpoint(folder: Path) -> dict[str, Tensor]:
    checkpoints = Checkpointer(folder, CheckpointSettings(), group=None, rank=0, world_size=1, read_only=True)
    try:
        loaded = checkpoints.load_latest(world_size_changed="all_ranks")
    except CheckpointError as error:
        raise BaseModelError(str(error)) from None
    assert loaded is not None  # read-only, no checkpoint is an error
    model = loaded.shared.get("model")
    if not isinstance(model, dict) or not all(isinstance(tensor, Tensor) for tensor in model.values()):
        raise BaseModelError(f"{loaded.path} holds no model")
    return model


def _names(tensors: Mapping[str, Tensor], entries: Sequence[TensorEntry], path: Path) -> dict[str, str]:
    """Canonical names to those in the file: the same, or with one beginning taken off or another put before all."""
    wanted = [entry.name for entry in entries]
    fewest: list[str] = wanted
    for cut in _beginnings(wanted, of_all=True):
        for put in _beginnings(list(tensors), of_all=False):
            names = {name: put + name[len(cut) :] for name in wanted}
            missing = [name for name, there in names.items() if there not in tensors]
            if not missing:
                return names
            if len(missing) < len(fewest):
                fewest = missing
    raise BaseModelError(
        f"{path} lacks {fewest[0]}"
        + (f" and {len(fewest) - 1} more" if len(fewest) > 1 else "")
        + f" of the {len(wanted)} tensors that the run trains"
    )


def _beginnings(names: Sequence[str], *, of_all: bool) -> list[str]:
    """ "", and what names have in front up to a dot: all of them, or any."""
    found: dict[str, int] = {"": len(names)}
    for name in names:
        parts = name.split(".")
        for count in range(1, len(parts)):
            beginning = ".".join(parts[:count]) + "."
            found[beginning] = found.get(beginning, 0) + 1
    kept = [beginning for beginning, count in found.items() if count == len(names) or not of_all]
    return sorted(kept, key=len)


def _widened(tensor: Tensor, entry: TensorEntry) -> Tensor:
    is_wider = entry.dtype == "float32" and tensor.dtype in (torch.bfloat16, torch.float16)
    return tensor.float() if is_wider else tensor


def _tied(trained: Tensor, other: Tensor) -> bool:
    if (trained.shape, trained.dtype) != (other.shape, other.dtype):
        return False
    if other.data_ptr() == trained.data_ptr() and other.numel():
        return True
    return torch.equal(trained, other) and bool((other != other.flatten()[:1]).any())
