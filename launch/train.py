"""`thinwire train` and `thinwire config show`."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from thinwire.dist.config import RunConfig
    from thinwire.dist.metrics import Sink
    from thinwire.dist.train import Outcome
    from thinwire.dist.world import World

USER_ERROR = 2
FAILURE = 1


def show(path: Path, overrides: Sequence[str]) -> int:
    """Print the fully resolved configuration; returns the exit code."""
    from thinwire.dist.config import ConfigError, dump_config, load_config

    try:
        print(dump_config(load_config(path, overrides)), end="")
    except ConfigError as error:
        return _complain(str(error))
    return 0


def main(path: Path, overrides: Sequence[str]) -> int:
    """Train as this process's rank of the job; returns the exit code.

    0: finished, or stopped by SIGTERM or SIGUSR1 after a checkpoint. 2: the user's mistake, told in one message.
    1: anything else; where another rank is at fault this ends the process at once, since threads of the transport may hang.
    """
    from thinwire.dist.config import ConfigError, load_config
    from thinwire.launch.env import LaunchError, detect

    try:
        config = load_config(path, overrides)
        place = detect()
    except (ConfigError, LaunchError) as error:
        return _complain(str(error))
    from thinwire.dist.world import join

    try:
        world = join(place, config.world, config.mesh)
    except ValueError as error:
        return _complain(f"rank {place.rank}: {error}")
    except Exception as error:
        return _fail(f"rank {place.rank}: {error}")
    try:
        outcome = _train(config, world)
        world.close()
    except BaseException as error:
        _leave(world, error)
    if world.rank == 0 and outcome.stopped:
        print(f"stopped after step {outcome.step}: {outcome.stopped}; the same command continues", flush=True)
    return 0


def _train(config: RunConfig, world: World) -> Outcome:
    from thinwire.dist.stop import StopRequest
    from thinwire.dist.train import Trainer

    stop = StopRequest()
    stop.listen()
    if world.rank == 0:
        print(world.describe(), flush=True)
    trainer = Trainer(config, world, stop)
    if world.rank == 0:
        print(trainer.describe(), flush=True)
    sinks, seconds_before = _open_sinks(config, trainer.step) if world.rank == 0 else ([], 0.0)
    try:
        return trainer.run(sinks, seconds_before)
    finally:
        for sink in sinks:
            sink.close()


def _open_sinks(config: RunConfig, finished_steps: int) -> tuple[list[Sink], float]:
    """Where rank 0's records go, and the seconds that the run took before it was resumed."""
    from thinwire.dist.config import dump_config
    from thinwire.dist.metrics import JsonLines, TensorBoard, WandB
    from thinwire.dist.progress import open_progress
    from thinwire.dist.run_folder import METRICS, write_config

    write_config(config.folder, dump_config(config))
    lines = JsonLines(config.folder / METRICS, finished_steps)
    sinks: list[Sink] = [lines]
    if config.output.tensorboard:
        sinks.append(TensorBoard(config.folder, finished_steps))
    if config.output.wandb:
        sinks.append(WandB(config.folder, config.name, config.model_dump(mode="json")))
    sinks.append(open_progress(config.train.steps, finished_steps, config.output.every_s))
    return sinks, lines.seconds_before


def _leave(world: World, error: BaseException) -> NoReturn:
    """Say what happened, tell the other ranks, and end the process even if a thread of the transport hangs."""
    from thinwire.comm.errors import CommError
    from thinwire.comm.verdict import Verdict
    from thinwire.dist.checkpoint import CheckpointError
    from thinwire.dist.train import NonFiniteError

    told = f"rank {world.rank} on {world.host}: {type(error).__name__}: {error}"
    code = FAILURE
    if isinstance(error, CommError):
        print(told, file=sys.stderr)
    elif isinstance(error, (ValueError, NonFiniteError, CheckpointError)):
        # Most of these are raised by all ranks alike: one message is enough, if this rank is not the only one.
        print(f"rank {world.rank}: {error}", file=sys.stderr)
        code = USER_ERROR if isinstance(error, ValueError) else FAILURE
    else:
        print(f"rank {world.rank} on {world.host}:", file=sys.stderr)
        traceback.print_exception(error)
    world.monitor.announce(Verdict("failed", "train", (world.rank,), told[:2000]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _complain(message: str) -> int:
    print(f"thinwire: {message}", file=sys.stderr)
    return USER_ERROR


def _fail(message: str) -> int:
    print(f"thinwire: {message}", file=sys.stderr)
    return FAILURE
