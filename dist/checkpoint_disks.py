"""Which ranks see the same folder: found out by looking, since paths, host names and mount tables all mislead."""

from __future__ import annotations

import contextlib
import secrets
from pathlib import Path
from typing import Any

from thinwire.dist.checkpoint_agreement import Agreement


def find_disks(folder: Path, agreement: Agreement) -> list[list[int]]:
    """Create `folder` and group the ranks by the disk that theirs is on; each group in rank order. Collective.

    Every rank leaves a file with a random name and then lists the folder: whose names it finds share its disk. If
    only one of two ranks finds the other's (network file systems show new files late), they share it all the same.
    Raises CheckpointError on every rank if one cannot write there.
    """
    mark = folder / f".seen-{secrets.token_hex(16)}"

    def leave_mark() -> str:
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch(exist_ok=False)
        return mark.name

    def look() -> list[int]:
        present = {path.name for path in folder.iterdir()}
        return [rank for rank, name in enumerate(marks) if name in present]

    try:
        marks: list[Any] = agreement.run("creation of the checkpoint folder", leave_mark)
        seen = agreement.run("search for shared disks", look)
    finally:
        with contextlib.suppress(OSError):
            mark.unlink()
    disk_of = list(range(agreement.world_size))
    for rank, others in enumerate(seen):
        for other in others:
            low, high = sorted((disk_of[rank], disk_of[other]))
            disk_of = [low if disk == high else disk for disk in disk_of]
    return [[r for r in range(agreement.world_size) if disk_of[r] == disk] for disk in sorted(set(disk_of))]
