"""The log of a run: with the base model, all that its weights are made of.

magic, version, length of the compressed manifest, this, SHA-256 of all of that; then records (record_code.py), each
followed by the first 4 bytes of the chain hash h_i = SHA-256(h_{i-1} + record), h_0 = SHA-256(manifest). A round of 4
machines with one sample each takes 9 bytes.
"""

from __future__ import annotations

import bisect
import fcntl
import os
import struct
import zlib
from array import array
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from thinwire.comm.onebyte.record_code import Context, RecordError, decode, encode
from thinwire.comm.onebyte.rounds import Record, Roster, Round

__all__ = ["Log", "LogError", "LogLockedError"]

_MAGIC = b"\x89tw1byte"
_VERSION = 1
_HEADER = struct.Struct("<8sHI")
_LARGEST_MANIFEST = 1 << 28
_HASH_BYTES = 32
CHECK_BYTES = 4
_READ_BYTES = 1 << 20


class LogError(ValueError):
    """A file that is no log, is damaged, or cannot be used as asked."""


class LogLockedError(LogError):
    """Another process, or another Log of this one, has the file open for writing."""


class _Mark(NamedTuple):
    """The context of record `start`. Up to the next mark, nothing changes in it but the number of rounds."""

    start: int
    context: Context


class Log:
    """An append-only file of records; all of it is verified when it is opened.

    One process at a time may have it open for writing; others may read it meanwhile (a reader sees what was there when
    it opened the file). One thread at a time may use it. A record counts once append() returns: it then outlives this
    process, and the machine after sync().

    Attributes: path, manifest, read_only; torn_bytes: the length of an incomplete record at the end, left by a process
    that was killed while it wrote; cut off when the file is opened for writing, ignored when only read.
    """

    def __init__(self, file: int, path: Path, manifest: bytes, first: int, *, read_only: bool) -> None:
        self.path = path
        self.manifest = manifest
        self.read_only = read_only
        self.torn_bytes = 0
        self._file = file
        self._offsets = array("Q", [first])  # of every record, and the end
        self._chain = bytearray(sha256(manifest).digest())
        self._marks = [_Mark(0, Context())]
        self._context = Context()

    @classmethod
    def create(cls, path: str | os.PathLike[str], manifest: bytes) -> Log:
        """Begin a log, open for writing. Raises FileExistsError if the file exists."""
        path = Path(path)
        assert len(manifest) <= _LARGEST_MANIFEST
        compressed = zlib.compress(manifest, 9)
        header = _HEADER.pack(_MAGIC, _VERSION, len(compressed)) + compressed
        header += sha256(header).digest()
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            _lock(file, path)
            # A process that was killed while it wrote the header has left less than a log: begin again.
            if not (os.fstat(file).st_size < len(header) and header.startswith(os.pread(file, len(header), 0))):
                raise FileExistsError(f"{path} exists; continue it with Log.open, or choose another name")
            _write_all(file, header, 0)
            os.fsync(file)
            directory = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except BaseException:
            os.close(file)
            raise
        return cls(file, path, manifest, len(header), read_only=False)

    @staticmethod
    def begun(path: str | os.PathLike[str]) -> bool:
        """Whether there is a log to open. A header cut short, by a kill within create(), is none: create it again."""
        try:
            with Path(path).open("rb") as file:
                data = file.read(_HEADER.size)
                size = os.fstat(file.fileno()).st_size
        except FileNotFoundError:
            return False
        if not data.startswith(_MAGIC[: len(data)]):
            return True
        return len(data) == _HEADER.size and size >= _HEADER.size + _HEADER.unpack(data)[2] + _HASH_BYTES

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, read_only: bool = False) -> Log:
        """Open and verify a log. Raises LogError naming the record and byte where it is damaged; FileNotFoundError."""
        path = Path(path)
        file = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
        try:
            if not read_only:
                _lock(file, path)
            data = _read_all(file)
            log = cls(file, path, *_read_header(data, path), read_only=read_only)
            try:
                log._take(data, log.size_bytes)
            except RecordError as error:
                raise LogError(
                    f"{path}: record {len(log)}, at byte {log.size_bytes}: {error}. The records before it are sound: "
                    f"take the log of another machine, or cut this one there (truncate -s {log.size_bytes})"
                ) from None
            log.torn_bytes = len(data) - log.size_bytes
            if log.torn_bytes and not read_only:
                os.ftruncate(file, log.size_bytes)
        except BaseException:
            os.close(file)
            raise
        return log

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> Record:
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of a log of {len(self)} records")
        index %= len(self)
        return next(self.records(index, index + 1))

    def __iter__(self) -> Iterator[Record]:
        return self.records()

    @property
    def rounds(self) -> int:
        """Committed rounds; also the number of the next one."""
        return self._context.rounds

    @property
    def roster(self) -> Roster | None:
        """The newest roster."""
        return self._context.roster

    @property
    def size_bytes(self) -> int:
        """Length of the file, less torn_bytes."""
        return self._offsets[-1]

    def record_bytes(self, index: int) -> int:
        """What record `index` takes in the file, its check bytes with it."""
        return self._offsets[index + 1] - self._offsets[index]

    def chain(self, length: int) -> bytes:
        """h_length, SHA-256 of the manifest and the first `length` records."""
        self._check_length(length)
        return bytes(self._chain[length * _HASH_BYTES : (length + 1) * _HASH_BYTES])

    def records(self, start: int = 0, stop: int | None = None) -> Iterator[Record]:
        """Records start .. stop-1, or to the present end."""
        stop = len(self) if stop is None else stop
        self._check_length(start)
        self._check_length(stop)
        context = self._context_of(start)
        while start < stop:
            first = self._offsets[start]
            until = max(start + 1, min(stop, bisect.bisect_right(self._offsets, first + _READ_BYTES) - 1))
            data = _read_all(self._file, first, self._offsets[until])
            at = 0
            for _ in range(start, until):
                found = decode(data, at, context)
                assert found is not None, "the file was changed while it was open"
                record, end = found
                yield record
                context = context.after(record)
                at = end + CHECK_BYTES
            start = until

    def append(self, record: Record) -> None:
        """Write a record at the end. Raises ValueError if it cannot follow; OSError leaves the log as it was."""
        data = encode(record, self._context)
        hashed = sha256(self._chain[-_HASH_BYTES:] + data).digest()
        self._write(data + hashed[:CHECK_BYTES])
        self._count(record, len(data) + CHECK_BYTES, hashed)

    def truncate(self, length: int) -> None:
        """Keep the first `length` records."""
        self._check_length(length)
        self._check_writable()
        os.ftruncate(self._file, self._offsets[length])
        self._forget(length)

    def sync(self) -> None:
        """Make what was appended outlive a power cut."""
        self._check_writable()
        os.fsync(self._file)

    def raw(self, start: int, stop: int | None = None) -> bytes:
        """Records start .. stop-1 as they lie in the file, for extend_raw() of a log that has those before."""
        stop = len(self) if stop is None else stop
        self._check_length(start)
        self._check_length(stop)
        return _read_all(self._file, self._offsets[start], self._offsets[max(start, stop)])

    def extend_raw(self, data: bytes) -> int:
        """Append what raw() of another machine's log gave, or the beginning of it.

        Every record is verified against this log's chain. Whoever wrote them could have computed the chain too: compare
        chain(len(log)) with a hash that you trust.

        Returns: how many bytes were taken: those of whole records. Hand in the rest again, with what follows it.
        Raises:
            LogError: they do not continue this log, which is then as it was.
        """
        self._check_writable()
        length, offset = len(self), self._offsets[-1]
        try:
            taken = self._take(data, 0)
            self._write(data[:taken], offset)
        except BaseException as error:
            at = self._offsets[-1] - offset
            self._forget(length)
            if isinstance(error, RecordError):
                raise LogError(f"{self.path}: byte {at} of what should follow record {length - 1}: {error}") from None
            raise
        return taken

    def close(self) -> None:
        """Close the file, and let others write it."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _take(self, data: bytes, at: int) -> int:
        """Verify records that follow the last one, and index them. Returns where the last whole one ends."""
        while True:
            found = decode(data, at, self._context)
            if found is None or len(data) < found[1] + CHECK_BYTES:
                return at
            record, end = found
            hashed = sha256(self._chain[-_HASH_BYTES:] + data[at:end]).digest()
            if data[end : end + CHECK_BYTES] != hashed[:CHECK_BYTES]:
                raise RecordError("its check bytes are not those of the chain")
            self._count(record, end + CHECK_BYTES - at, hashed)
            at = end + CHECK_BYTES

    def _count(self, record: Record, size_bytes: int, hashed: bytes) -> None:
        context = self._context.after(record)
        self._context = context
        self._offsets.append(self._offsets[-1] + size_bytes)
        self._chain += hashed
        last = self._marks[-1]
        if not isinstance(record, Round) or context.rate != last.context.rate:
            self._marks.append(_Mark(len(self), context))

    def _forget(self, length: int) -> None:
        self._context = self._context_of(length)
        del self._marks[bisect.bisect_right(self._marks, length, key=_start) :]
        del self._offsets[length + 1 :]
        del self._chain[(length + 1) * _HASH_BYTES :]

    def _context_of(self, index: int) -> Context:
        mark = self._marks[bisect.bisect_right(self._marks, index, key=_start) - 1]
        return mark.context._replace(rounds=mark.context.rounds + index - mark.start)

    def _write(self, data: bytes, offset: int | None = None) -> None:
        self._check_writable()
        offset = self._offsets[-1] if offset is None else offset
        try:
            _write_all(self._file, data, offset)
        except OSError:
            os.ftruncate(self._file, offset)
            raise

    def _check_length(self, length: int) -> None:
        if not 0 <= length <= len(self):
            raise IndexError(f"{length} records of a log of {len(self)}")

    def _check_writable(self) -> None:
        if self.read_only:
            raise LogError(f"{self.path} was opened read-only")


def _start(mark: _Mark) -> int:
    return mark.start


def _read_header(data: bytes, path: Path) -> tuple[bytes, int]:
    """The manifest, and where the first record begins."""
    if len(data) < _HEADER.size and _MAGIC.startswith(data[: len(_MAGIC)]):
        raise LogError(f"{path}: {len(data)} bytes, not even a header: whoever began it was killed. Remove the file")
    if data[: len(_MAGIC)] != _MAGIC:
        raise LogError(f"{path} is not a log of a one-byte run: it begins with {data[: len(_MAGIC)]!r}")
    _, version, length = _HEADER.unpack_from(data)
    if version != _VERSION:
        raise LogError(f"{path}: a log of version {version}; this thinwire reads version {_VERSION}")
    end = _HEADER.size + length
    first = end + _HASH_BYTES
    if len(data) < first:
        raise LogError(f"{path}: {len(data)} bytes end within the header of {first}: damaged, or never begun")
    if sha256(data[:end]).digest() != data[end:first]:
        raise LogError(f"{path}: the manifest, in the first {first} bytes, or its SHA-256 is damaged")
    unpacked = zlib.decompressobj()
    try:
        manifest = unpacked.decompress(data[_HEADER.size : end], _LARGEST_MANIFEST)
    except zlib.error as error:
        raise LogError(f"{path}: the manifest was never whole: {error}") from None
    if not unpacked.eof:
        raise LogError(f"{path}: the manifest was never whole, or has more than {_LARGEST_MANIFEST} bytes")
    return manifest, first


def _lock(file: int, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise LogLockedError(f"{path} is open for writing elsewhere; stop that process, or open it read-only") from None


def _read_all(file: int, offset: int = 0, end: int | None = None) -> bytes:
    pieces = []
    while end is None or offset < end:
        piece = os.pread(file, _READ_BYTES if end is None else end - offset, offset)
        if not piece:
            break
        pieces.append(piece)
        offset += len(piece)
    return b"".join(pieces)


def _write_all(file: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, offset)
        view = view[written:]
        offset += written
