"""Where the text comes from: the running Python's own standard library, or any files."""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# Below the standard library's folder: tests, other people's packages, and tables that a program wrote.
_NOT_TEXT = {
    *("test", "tests", "idle_test", "site-packages", "dist-packages", "_bundled", "_vendor", "__pycache__"),
    *("encodings", "pydoc_data"),
}
_SPLIT_BITS = 32


@dataclass(frozen=True)
class Split:
    """Files for training and files for validation; no content is in both."""

    training: list[bytes]
    validation: list[bytes]


def standard_library() -> list[Path]:
    """The .py files of the running Python's standard library, sorted: about 10 MB of text on every machine.

    Without tests, installed and bundled packages, generated tables, and files named after the machine.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in _NOT_TEXT and not name.startswith("config-")]
        found += [
            Path(folder, name) for name in names if name.endswith(".py") and not name.startswith("_sysconfigdata")
        ]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def matching_files(patterns: Iterable[str]) -> list[Path]:
    """The files that any of the paths or globs (`**` included) names, sorted, each once.

    Raises:
        ValueError: a pattern matches no file.
    """
    found: set[Path] = set()
    for pattern in patterns:
        matches = [
            Path(name) for name in glob.glob(str(Path(pattern).expanduser()), recursive=True) if Path(name).is_file()
        ]
        if not matches:
            raise ValueError(
                f"data.files: {pattern!r} matches no file; it is looked up from {Path.cwd()} on every host"
            )
        found.update(matches)
    return sorted(found)


def split(paths: Iterable[Path], validation_fraction: float) -> Split:
    """Read the files and put each on one side by the SHA-256 of its content.

    So the side of a file depends on nothing else: not on its name, the other files, or the seed; and two copies of one
    file are on the same side. Empty files are left out.
    """
    sides: tuple[list[bytes], list[bytes]] = ([], [])
    for path in paths:
        content = path.read_bytes()
        if content:
            sides[on_validation_side(content, validation_fraction)].append(content)
    return Split(*sides)


def on_validation_side(content: bytes, validation_fraction: float) -> bool:
    """Whether this content is kept for validation: that share of all contents is."""
    draw = int.from_bytes(hashlib.sha256(content).digest()[: _SPLIT_BITS // 8], "big")
    return draw < int(validation_fraction * (1 << _SPLIT_BITS))
