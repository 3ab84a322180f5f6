"""What a gossip run remembers from step to step, and how it gets into a checkpoint and back."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from thinwire.comm.gossip.handle import Gossip
from thinwire.dist.checkpoint import Checkpointer, CheckpointSettings, Loaded
from thinwire.dist.config_errors import ConfigError
from thinwire.dist.run_folder import CHECKPOINTS, check_same_run
from thinwire.dist.world import World

_log = logging.getLogger(__name__)


class GossipState:
    """A machine's model, optimizer, method and random numbers, with the checkpoints that hold them.

    A checkpoint is a consistent cut: all machines save when nothing is on the wire. Among other machines a run goes on
    from the mean of the old ones' weights, each with the optimizer of one of them.

    Args:
        folder: of the run.
        facts: numeric settings and data, which a checkpoint that is continued must share.
    Attributes: resumed, what the run continues from, or "".
    Raises:
        CheckpointError, ConfigError: what the folder holds cannot be continued.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        method: Gossip,
        world: World,
        folder: Path,
        settings: CheckpointSettings,
        facts: Mapping[str, Any],
    ) -> None:
        if settings.resume not in ("auto", "never"):
            raise ConfigError(
                f"checkpoint.resume: {settings.resume}, but a gossip run continues only its own checkpoints; give "
                "auto or never, and begin at other weights with model.weights"
            )
        self._model = model
        self._optimizer = optimizer
        self._method = method
        self._world = world
        self._facts = {"settings": dict(facts)}
        self.resumed = ""
        self._checkpoints = Checkpointer(
            folder / CHECKPOINTS, settings, group=world.group, rank=world.rank, world_size=world.size
        )
        loaded = self._checkpoints.load_latest({}, world_size_changed="all_ranks")
        if loaded is not None:
            check_same_run(loaded.facts["settings"], facts, loaded.path)
            self._restore(loaded)

    @property
    def step(self) -> int:
        """Optimizer steps that this machine has taken."""
        return self._method.step

    def save(self) -> frozenset[int]:
        """Write a checkpoint of this moment. All machines call it; where one has not come, none is written.

        Returns: those that have not, the same set to each.
        """
        own = {
            "method": self._method.state_dict(),
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "random": self._random_state(),
        }
        absent = self._method.absent
        if self._world.size > 1 and absent:
            _log.warning(
                "checkpoint: none is written after step %d, since machines %s have not come and all ranks write "
                "together; start the job anew to go on from the last one, with as many ranks as there are",
                self.step,
                sorted(absent),
            )
            return absent
        self._checkpoints.save(self._common_step(), {}, own, self._facts)
        return absent

    def _common_step(self) -> int:
        """The most steps that any machine has taken: the checkpoint's name, the same on all."""
        mine = torch.tensor([self.step])
        if self._world.size == 1:
            return self.step
        told = self._world.queue.submit("control/step", lambda channel: channel.all_gather_same(mine)).wait()
        return int(told.max())

    def _restore(self, loaded: Loaded) -> None:
        old = loaded.per_rank_of_all
        own = loaded.per_rank or old[self._world.rank % len(old)]
        self._model.load_state_dict(own["model"])
        options = [{k: v for k, v in group.items() if k != "params"} for group in self._optimizer.param_groups]
        self._optimizer.load_state_dict(own["optimizer"])
        for group, present in zip(self._optimizer.param_groups, options, strict=True):
            group.update(present)  # torch would go on with the checkpoint's, whatever the configuration says
        method = own["method"] if loaded.per_rank else {"all_ranks": [old[r]["method"] for r in sorted(old)]}
        self._method.load_state_dict(method)
        if loaded.per_rank or self._world.rank in old:  # a rank that is new keeps the generators it was started with
            torch.set_rng_state(own["random"]["cpu"])
            if "cuda" in own["random"] and self._world.device.type == "cuda":
                torch.cuda.set_rng_state(own["random"]["cuda"], self._world.device)
        changed = "" if loaded.per_rank else f", with the weights of {loaded.world_size} machines merged"
        passed_over = "".join(f"\n  passed over {text}" for text in loaded.refused)
        self.resumed = f"continues from {loaded.path} after {self.step} steps{changed}{passed_over}"

    def _random_state(self) -> dict[str, Any]:
        state = {"cpu": torch.get_rng_state()}
        if self._world.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self._world.device)
        return state
