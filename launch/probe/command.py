"""The command: join the job, measure, and on rank 0 print, draw and write what was found."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from thinwire.launch.complaint import complain, is_ours

if TYPE_CHECKING:
    from thinwire.dist.config import RunConfig
    from thinwire.dist.probe.probe import Probe
    from thinwire.dist.world import World

FAILURE = 1
USER_ERROR = 2


def probe(
    config_path: Path | None, overrides: Sequence[str], *, seconds: float, json_path: Path | None, plot: Path | None
) -> int:
    """Measure as this process's rank of the job; the exit code of `thinwire probe`.

    0: measured. 2: the user's mistake, told in one message. 1: a rank was lost.
    """
    from thinwire.comm.errors import CommError
    from thinwire.dist.config import load_config
    from thinwire.dist.mesh import MeshSettings
    from thinwire.dist.world import WorldSettings, join
    from thinwire.launch.env import detect

    try:
        config = None if config_path is None else load_config(config_path, overrides)
        for path in (json_path, plot):
            _check_folder(path)
        world_settings = config.world if config else WorldSettings()
        with join(detect(), world_settings, config.mesh if config else MeshSettings()) as world:
            _measure(world, config, seconds, json_path, plot)
    except ValueError as error:
        if not is_ours(error):
            raise
        return complain(error, USER_ERROR)
    except CommError as error:
        return complain(error, FAILURE)
    return 0


def _measure(world: World, config: RunConfig | None, seconds: float, json_path: Path | None, plot: Path | None) -> None:
    from thinwire.dist.preflight import check_agreement, describe_config, describe_versions
    from thinwire.dist.probe.probe import run_probe
    from thinwire.launch.probe.plot import draw
    from thinwire.launch.probe.tables import print_probe

    told = {"probe": {"seconds": seconds}} if config is None else {**config.resolved(), "probe": {"seconds": seconds}}
    facts = {**describe_versions(), "config": describe_config(told)}
    check_agreement(facts, queue=world.queue, store=world.store)
    if world.rank == 0:
        print(world.describe(), flush=True)
    found = run_probe(world, config, seconds)
    if world.rank:
        return
    print_probe(found)
    if json_path is not None:
        write(found, json_path)
        print(f"\nfor `thinwire plan CONFIG --cluster {json_path}`: {json_path}")
    if plot is not None:
        draw(found.cluster, plot)
        print(f"as a picture: {plot}")
    sys.stdout.flush()


def write(found: Probe, path: Path) -> None:
    """Whole or not at all."""
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(found.cluster.model_dump_json(indent=2) + "\n", encoding="utf-8")
    unfinished.replace(path)


def _check_folder(path: Path | None) -> None:
    """Before the measuring, not after it."""
    if path is not None and not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}; make it first, or give another path")
