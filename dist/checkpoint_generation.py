"""Generations of a checkpoint folder: complete directories with a manifest, never half of one under its final name.

FOLDER/step-00000100/ is written as FOLDER/.writing-<id>, its manifest last, everything fsynced, then renamed. A step
that is written again first moves the old one to step-00000100.replaced-<id>, which still counts as a generation.
What is removed is first renamed to .removing-*. So a kill at any moment leaves every name either complete or ignored.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, NonNegativeInt, ValidationError

from thinwire.dist.checkpoint_agreement import CheckpointError
from thinwire.dist.checkpoint_storage import METADATA_LIMIT_BYTES, PIECE_BYTES, HashedFile

MANIFEST = "manifest.json"
_DIRECTORY = re.compile(r"step-\d{8,}(\.replaced-[0-9a-f]+)?")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FileEntry(_Strict):
    """Size and checksum of one file of a generation."""

    bytes: NonNegativeInt
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Manifest(_Strict):
    """What a generation consists of. disks: the ranks by the disk that they wrote to; ranks: those of this disk."""

    format: Literal[1]
    step: NonNegativeInt
    save_id: str = Field(pattern="^[0-9a-f]{32}$")
    world_size: int = Field(ge=1, le=1 << 20)
    disks: list[list[int]]
    ranks: list[int]
    torch_version: str
    facts: dict[str, JsonValue]
    files: dict[str, FileEntry]


@dataclass(frozen=True)
class Generation:
    """A directory that claims to be a generation: its manifest, or why it cannot be read."""

    path: Path
    step: int
    manifest: Manifest | None
    refusal: str = ""

    @property
    def is_plain(self) -> bool:
        """Whether it has its step's own name (not .replaced-*)."""
        return "." not in self.path.name


def generations(folder: Path) -> list[Generation]:
    """Every generation in `folder`, oldest first; `folder` itself if it is one."""
    if (folder / MANIFEST).is_file():
        return [_read(folder, 0)]
    return [_read(folder / name, int(name.split(".")[0].removeprefix("step-"))) for name in names(folder)]


def names(folder: Path) -> list[str]:
    """Names of the directories in `folder` that claim to be generations, in order of their steps."""
    if not folder.is_dir():
        return []
    found = [path.name for path in folder.iterdir() if _DIRECTORY.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda name: (int(name.split(".")[0].removeprefix("step-")), "." not in name))


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest of a directory whose other files are complete, and make all of it last a power cut."""
    with HashedFile(folder / MANIFEST) as file:
        file.write(_seal(manifest))
    fsync_directory(folder)


def verify(generation: Generation, files: list[str]) -> None:
    """Compare the named files with the manifest, byte for byte. Raises CheckpointError at the first that differs."""
    manifest = generation.manifest
    assert manifest is not None
    for name in files:
        entry = manifest.files.get(name)
        if entry is None:
            raise CheckpointError(f"{name} is not in the manifest")
        digest = hashlib.sha256()
        nbytes = 0
        try:
            with open(generation.path / name, "rb") as file:
                while piece := file.read(PIECE_BYTES):
                    digest.update(piece)
                    nbytes += len(piece)
        except OSError as error:
            raise CheckpointError(f"{name} cannot be read: {error.strerror}") from error
        if nbytes != entry.bytes:
            raise CheckpointError(f"{name} has {nbytes} bytes instead of {entry.bytes}")
        if digest.hexdigest() != entry.sha256:
            raise CheckpointError(f"{name} is damaged: its SHA-256 is not the manifest's")


def commit(written: Path, target: Path, save_id: str) -> None:
    """Give a complete directory its final name; a generation that has the name already is kept as .replaced-*."""
    if target.exists():
        os.rename(target, target.with_name(f"{target.name}.replaced-{save_id}"))
    os.rename(written, target)
    fsync_directory(target.parent)


def remove(path: Path) -> None:
    """Remove a generation; a kill half-way leaves no directory that looks like one."""
    doomed = path.with_name(f".removing-{path.name}")
    if doomed.exists():
        shutil.rmtree(doomed)
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed writer left: the folder belongs to one run, and that run is not writing now."""
    for path in folder.iterdir():
        if path.name.startswith((".writing-", ".removing-")) and path.is_dir():
            shutil.rmtree(path)
        elif path.name.startswith(".seen-"):
            path.unlink()


def fsync_directory(folder: Path) -> None:
    """Make the names in a directory last a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path, step: int) -> Generation:
    try:
        if (path / MANIFEST).stat().st_size > METADATA_LIMIT_BYTES:
            raise ValueError("it is too large")
        content = (path / MANIFEST).read_bytes()
        body = json.loads(content)["manifest"]
        if _seal(body) != content:
            raise ValueError("its checksum is not that of its content")
        manifest = Manifest.model_validate(body)
    except OSError as error:
        return Generation(path, step, None, f"{MANIFEST} cannot be read: {error.strerror}")
    except (ValidationError, ValueError, TypeError, KeyError, RecursionError) as error:
        return Generation(path, step, None, f"{MANIFEST} is damaged: {error}")
    return Generation(path, manifest.step, manifest)


def _seal(manifest: Any) -> bytes:
    """The one spelling of a manifest: any other byte in the file, even a blank, is damage."""
    text = json.dumps(manifest, indent=1, allow_nan=False)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps({"manifest": manifest, "sha256": digest}, indent=1, allow_nan=False).encode()
