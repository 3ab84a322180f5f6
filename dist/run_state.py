"""What a run remembers from step to step, and how it gets into a checkpoint and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thinwire.comm.method import Method, agreed_weights
from thinwire.dist.checkpoint import Checkpointer, CheckpointSettings, Loaded
from thinwire.dist.engine.engine import Engine, merge_method_states
from thinwire.dist.run_folder import CHECKPOINTS, check_same_run
from thinwire.dist.world import World


class RunState:
    """What the engine holds and the random numbers of this rank, with the checkpoints that hold them. Collective.

    The place in the text needs no memory: it is a function of the step. The run's own checkpoints come first, also
    where checkpoint.resume names another run's: the same command starts there once, and continues the run from then on.

    Args:
        folder: of the run.
        facts: numeric settings and data, which a checkpoint that is continued must share.
        balance: of a run that has one; in a checkpoint that knows nothing of it, it begins anew.
    Attributes: step, the finished steps; resumed, what the run continues from, or "".
    Raises:
        CheckpointError, ConfigError: what the folder holds, or checkpoint.resume names, cannot be continued.
        ValueError: checkpoint.resume names a run with another kind of optimizer.
    """

    def __init__(
        self,
        engine: Engine,
        world: World,
        folder: Path,
        settings: CheckpointSettings,
        facts: Mapping[str, Any],
        balance: Method | None = None,
    ) -> None:
        self._engine = engine
        self._balance = balance
        self._device = world.device
        self._facts = {"settings": dict(facts)}
        self.step = 0
        self.resumed = ""
        self._rank = world.rank
        self._checkpoints = Checkpointer(
            folder / CHECKPOINTS, settings, group=world.group, rank=world.rank, world_size=world.size
        )
        loaded = self._load_latest(self._checkpoints)
        if loaded is not None:
            check_same_run(loaded.facts["settings"], facts, loaded.path)
        elif settings.resume not in ("auto", "never"):
            loaded = self._load_other_run(Path(settings.resume).expanduser(), settings, world)
        if loaded is not None:
            self._restore(loaded)

    def save(self) -> None:
        """Write a checkpoint of the finished steps."""
        per_rank = {**self._engine.own_state(), "random": self._random_state()}
        if self._balance is not None:
            per_rank["balance"] = self._balance.state_dict()
        with agreed_weights(self._engine.method):
            self._checkpoints.save(self.step, self._engine.shared_state(), per_rank, self._facts)

    def _load_other_run(self, source: Path, settings: CheckpointSettings, world: World) -> Loaded:
        checkpoints = Checkpointer(
            source, settings, group=world.group, rank=world.rank, world_size=world.size, read_only=True
        )
        loaded = self._load_latest(checkpoints)
        assert loaded is not None  # read-only, no checkpoint is an error
        saved, present = loaded.facts["settings"].get("optimizer.kind"), self._facts["settings"]["optimizer.kind"]
        if saved != present:
            raise ValueError(
                f"optimizer.kind: {present}, but checkpoint.resume names {loaded.path}, written with {saved}, whose "
                f"memory means nothing to it; give optimizer.kind={saved}"
            )
        return loaded

    def _load_latest(self, checkpoints: Checkpointer) -> Loaded | None:
        return checkpoints.load_latest(self._engine.template(), world_size_changed="all_ranks")

    def _restore(self, loaded: Loaded) -> None:
        old = loaded.per_rank_of_all
        self._engine.load_state(loaded.shared, loaded.per_rank, old)
        if self._balance is not None and "balance" in (loaded.per_rank or old[0]):
            self._balance.load_state_dict(merge_method_states(loaded.per_rank, old, "balance"))
        own = loaded.per_rank or old.get(self._rank)
        if own is not None:  # a rank that is new keeps the generators that it was started with
            torch.set_rng_state(own["random"]["cpu"])
            if "cuda" in own["random"] and self._device.type == "cuda":
                torch.cuda.set_rng_state(own["random"]["cuda"], self._device)
        self.step = loaded.step
        passed_over = "".join(f"\n  passed over {text}" for text in loaded.refused)
        changed = "" if loaded.per_rank else f", with the states of {loaded.world_size} ranks merged"
        self.resumed = f"continues from {loaded.path} after {loaded.step} steps{changed}{passed_over}"

    def _random_state(self) -> dict[str, Tensor]:
        state = {"cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self._device)
        return state
