"""The logs of a fixed job's ranks, brought to the same length before a run goes on."""

from __future__ import annotations

from pathlib import Path

import torch

from thinwire.comm.onebyte.log import Log, LogError
from thinwire.comm.rank_names import name_ranks
from thinwire.dist.world import World


def log_path(folder: Path, rank: int) -> Path:
    """Where a rank keeps its log: a file of its own, for ranks may share a disk or not."""
    return folder / ("onebyte.log" if rank == 0 else f"onebyte.rank{rank}.log")


def bring_together(path: Path, world: World) -> None:
    """Give every rank the records of the longest log. Collective.

    A kill may leave one rank a round behind, and a rank of a larger job than before has no log at all. The longest log
    is right: a rank writes a round down once all ranks have told theirs.

    Args:
        path: this rank's log; it need not exist.
    Raises:
        LogError: the logs are not of one run, or this one is damaged.
    """
    log = Log.open(path) if Log.begun(path) else None
    try:
        length = len(log) if log else -1
        chain = log.chain(length) if log else bytes(32)
        mine = torch.frombuffer(bytearray(length.to_bytes(8, "little", signed=True) + chain), dtype=torch.uint8)
        rows = world.queue.submit("control/log", lambda channel: channel.all_gather_same(mine)).wait()
        told = [bytes(row.tolist()) for row in rows]
        lengths = [int.from_bytes(row[:8], "little", signed=True) for row in told]
        longest = max(lengths)
        leader = lengths.index(longest)
        odd = [rank for rank, row in enumerate(told) if lengths[rank] == longest and row != told[leader]]
        if odd:
            raise LogError(
                f"{path}: {name_ranks(odd)} and rank {leader} have logs of {longest} records that differ, so they are "
                "of different runs; remove those of the wrong run, or choose another name or output.folder"
            )
        behind = [rank for rank in range(world.size) if lengths[rank] < longest]
        if world.rank == leader:
            assert log is not None or not behind
            for rank in behind:
                assert log is not None
                world.store.set(f"onebyte/manifest/{rank}", log.manifest.hex())
                world.store.set(f"onebyte/records/{rank}", log.raw(max(0, lengths[rank])).hex())
        if world.rank in behind:
            manifest = bytes.fromhex(world.store.get(f"onebyte/manifest/{world.rank}").decode())
            if log is None:
                path.parent.mkdir(parents=True, exist_ok=True)
                log = Log.create(path, manifest)
            if log.manifest != manifest:
                raise LogError(f"{path} is the log of another run than rank {leader}'s; remove the wrong one")
            log.extend_raw(bytes.fromhex(world.store.get(f"onebyte/records/{world.rank}").decode()))
            log.sync()
    finally:
        if log is not None:
            log.close()
