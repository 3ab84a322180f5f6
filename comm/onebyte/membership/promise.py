"""What a machine must not forget when it dies: whom it has voted for, and whose log it holds."""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from thinwire.comm.onebyte.membership.messages import NO_SLOT

_FIELDS = struct.Struct("<8s8sIHIH")
_CHECKSUM = struct.Struct("<I")
_MAGIC = b"\x89tw1vote"


@dataclass(frozen=True)
class Promise:
    """term: the newest known. vote: slot voted for in it. log_term: whose leader's log this machine's is a copy of.

    slot: this machine's own. It knows it from here alone: one that lost its disk has forgotten what it had promised,
    and must not speak in its old slot.
    """

    term: int = 0
    vote: int = NO_SLOT
    log_term: int = 0
    slot: int = NO_SLOT


class PromiseStore(Protocol):
    """Keeps the newest promise over the death of the process."""

    def load(self) -> Promise:
        """What was last saved, or a fresh promise."""
        ...

    def save(self, promise: Promise) -> None:
        """Returns when it is safe."""
        ...


class PromiseFile:
    """A promise in a small file beside the log.

    Args:
        run: the first 8 bytes of the manifest's SHA-256.
        sync: make it outlive a power cut.
    """

    def __init__(self, path: Path, run: bytes, *, sync: bool) -> None:
        self._path = path
        self._run = run
        self._sync = sync

    def load(self) -> Promise:
        """Raises ValueError if the file is damaged or another run's."""
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return Promise()
        if (
            len(data) != _FIELDS.size + _CHECKSUM.size
            or _CHECKSUM.pack(zlib.crc32(data[: _FIELDS.size])) != data[_FIELDS.size :]
        ):
            raise ValueError(
                f"{self._path} is damaged, so this machine no longer knows what it has promised: move it and the log "
                "beside it away, and join as a new machine"
            )
        magic, run, term, vote, log_term, slot = _FIELDS.unpack_from(data)
        if magic != _MAGIC or run != self._run:
            raise ValueError(f"{self._path} belongs to another run; give this run another file for its log")
        return Promise(term, vote, log_term, slot)

    def save(self, promise: Promise) -> None:
        """Write a new file and put it in the place of the old one."""
        data = _FIELDS.pack(_MAGIC, self._run, promise.term, promise.vote, promise.log_term, promise.slot)
        new = self._path.with_name(self._path.name + ".new")
        with open(new, "wb") as file:
            file.write(data + _CHECKSUM.pack(zlib.crc32(data)))
            file.flush()
            if self._sync:
                os.fsync(file.fileno())
        os.replace(new, self._path)
        if self._sync:
            directory = os.open(self._path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
