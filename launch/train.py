"""`thinwire train` and `thinwire config show`."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from thinwire.launch.complaint import complain, is_ours

if TYPE_CHECKING:
    from thinwire.dist.config import RunConfig
    from thinwire.dist.metrics import Sink
    from thinwire.dist.train import Outcome
    from thinwire.dist.world import World

FAILURE = 1
USER_ERROR = 2
INTERRUPTED = 130


def show(path: Path, overrides: Sequence[str]) -> int:
    """Print the fully resolved configuration; returns the exit code."""
    from thinwire.dist.config import ConfigError, dump_config, load_config

    try:
        print(dump_config(load_config(path, overrides)), end="")
    except ConfigError as error:
        return complain(error, USER_ERROR)
    return 0


def main(path: Path, overrides: Sequence[str]) -> int:
    """Train as this process's rank of the job; returns the exit code.

    0: finished, or stopped by SIGTERM or SIGUSR1 with a checkpoint. 2: the user's mistake, told in one message.
    1: anything else. Once the job is joined, an error ends the process here and at once, after telling the other ranks:
    threads of the transport may hang.
    """
    from thinwire.comm.errors import CommError
    from thinwire.dist.config import load_config
    from thinwire.dist.world import join
    from thinwire.launch.env import detect

    try:
        config = load_config(path, overrides)
        world = join(detect(), config.world, config.mesh)
    except ValueError as error:
        if not is_ours(error):
            raise
        return complain(error, USER_ERROR)
    except CommError as error:
        return complain(error, FAILURE)
    try:
        outcome, together = _train(config, world)
        world.close(together=together)
    except BaseException as error:
        _leave(world, error)
    if world.rank == 0 and outcome.stopped_by:
        ranks = ", ".join(map(str, outcome.stopped_by))
        print(f"stopped after step {outcome.step}: signal at rank {ranks}; the same command continues", flush=True)
    return 0


def _train(config: RunConfig, world: World) -> tuple[Outcome, bool]:
    """Returns also whether all ranks are there to leave together."""
    from thinwire.dist.gossip_run import GossipRunSettings
    from thinwire.dist.gossip_train import GossipTrainer
    from thinwire.dist.onebyte_run import OneByteRunSettings
    from thinwire.dist.run_facts import describe_run, write_facts
    from thinwire.dist.stop import StopRequest
    from thinwire.dist.train import Trainer
    from thinwire.dist.zeroth_order import ZerothOrderTrainer

    stop = StopRequest()
    stop.listen()
    if world.rank == 0:
        print(world.describe(), flush=True)
    trainer: Trainer | ZerothOrderTrainer | GossipTrainer
    if isinstance(config.method, GossipRunSettings):
        trainer = GossipTrainer(config, world, stop)
    elif isinstance(config.method, OneByteRunSettings):
        trainer = ZerothOrderTrainer(config, world, stop)
    else:
        trainer = Trainer(config, world, stop)
    if world.rank > 0:
        return trainer.run(), _all_there(trainer)
    print(trainer.describe(), flush=True)
    _print_what_is_logged()
    sinks, seconds_before = _open_sinks(config, trainer.state.step)
    machines = trainer.machines if isinstance(trainer, GossipTrainer) else world.size
    facts = describe_run(trainer, world, global_batch=config.train.global_batch, machines=machines)
    write_facts(config.folder, facts, trainer.state.step)
    try:
        return trainer.run(sinks, seconds_before), _all_there(trainer)
    finally:
        for sink in sinks:
            sink.close()


def _all_there(trainer: object) -> bool:
    from thinwire.dist.gossip_train import GossipTrainer

    return not (isinstance(trainer, GossipTrainer) and trainer.lost)


def _print_what_is_logged() -> None:
    """Show what the communication layer tells while it works, such as what `compressor: auto` has chosen."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("thinwire")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)


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
    from thinwire.comm.errors import CommError, NonFiniteGradientError, NonFiniteWeightsError
    from thinwire.comm.onebyte.errors import ModelMismatchError, WeightRangeError
    from thinwire.comm.verdict import Verdict
    from thinwire.dist.checkpoint import CheckpointError
    from thinwire.dist.preflight import PreflightError
    from thinwire.dist.step_reports import NonFiniteError

    if isinstance(error, RuntimeError) and not isinstance(error, (CommError, ModelMismatchError)):
        error = world.queue.blame(error, "train")
    told = f"rank {world.rank} on {world.host}: {type(error).__name__}: {error}"
    users_mistake = isinstance(error, ValueError) and is_ours(error)
    code = USER_ERROR if users_mistake else FAILURE
    if isinstance(error, KeyboardInterrupt):
        code = INTERRUPTED
        print(f"rank {world.rank}: interrupted", file=sys.stderr)
    elif isinstance(
        error,
        (
            CommError,
            CheckpointError,
            NonFiniteError,
            NonFiniteGradientError,
            NonFiniteWeightsError,
            ModelMismatchError,
            WeightRangeError,
        ),
    ):
        print(told, file=sys.stderr)
    elif isinstance(error, PreflightError):
        if world.local_rank == 0:  # every rank has the same text: once on each host
            complain(error, code)
    elif users_mistake:
        complain(f"rank {world.rank}: {error}", code)
    else:
        print(told, file=sys.stderr)
        traceback.print_exception(error)
    world.monitor.announce(Verdict("failed", "train", (world.rank,), told[:2000]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
