"""Lightning Trainer: a callback that lets a method into the DDP model of each fit(), on CPUs too."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from thinwire.comm.allreduce import AllReduceSettings
from thinwire.comm.local_sgd.door import LocalSGDSettings
from thinwire.dist.adapters.attached import (
    AttachableSettings,
    Attached,
    MethodChoice,
    attach,
    check_clipping,
    ddp_module,
    settings_of,
)
from thinwire.dist.world import World


def for_lightning(
    method: MethodChoice, *, clip_norm: float = 0.0, world: World | None = None, timeout_s: float = 60.0
) -> Any:
    """A callback for lightning.Trainer(strategy="ddp", callbacks=[...]) under which a method carries the gradients.

    Lightning's own DDPStrategy(ddp_comm_hook=...) is registered on CUDA alone, and silently skipped on CPUs. The
    state of all ranks goes into Lightning's checkpoints, and fit(ckpt_path=...) continues from it. Under local_sgd
    validation sees the weights that all ranks have agreed on, and checkpoints belong at the end of a round.

    Args:
        method: settings, a mapping as under `method:` of a configuration, or a kind: allreduce, compress, local_sgd.
        clip_norm: largest norm of the true gradient, for method compress, in place of gradient_clip_val.
        world: of thinwire.init(), called before fit(), for the machine's levels and one deadline for all.
        timeout_s: deadline of one operation without a world, in seconds.
    Returns: the callback; its attribute `attached` is the method, once fit() has begun.
    Raises:
        ValueError: here, a setting; from fit(), a trainer under which the method would not run, or would run wrongly.

    Example:
        trainer = lightning.Trainer(strategy="ddp", callbacks=[thinwire.for_lightning("allreduce")])
    """
    settings = settings_of(method, "for_lightning")
    kind = type("ThinwireCallback", (LightningMethod, _lightning().Callback), {})
    callback: Any = kind(settings, clip_norm=clip_norm, world=world, timeout_s=timeout_s)
    return callback


class LightningMethod:
    """What the callback does: Lightning calls these by their names. attached: the method, once fit() has begun."""

    def __init__(
        self, settings: AttachableSettings, *, clip_norm: float, world: World | None, timeout_s: float
    ) -> None:
        super().__init__()
        self.settings = settings
        self.attached: Attached | None = None
        self._clip_norm = clip_norm
        self._world = world
        self._timeout_s = timeout_s
        self._loaded: Mapping[str, Any] | None = None
        self._validating: AbstractContextManager[None] | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """The model has just been wrapped, and holds the weights of the checkpoint if there is one."""
        strategy = trainer.strategy
        model = ddp_module(strategy.model, f"Trainer(strategy={type(strategy).__name__})")
        if (
            getattr(strategy, "_ddp_comm_hook", None) is not None
            or getattr(strategy, "_ddp_comm_state", None) is not None
        ):
            raise ValueError(
                "DDPStrategy(ddp_comm_hook=...): DDP takes one hook only, and Lightning silently skips its own where "
                "there is no CUDA; leave ddp_comm_hook and ddp_comm_state out"
            )
        check_clipping(self.settings, trainer.gradient_clip_val, "Trainer(gradient_clip_val=...)", "for_lightning")
        if self.attached is not None:  # of an earlier fit(), whose model is wrapped no more
            self.attached.remove()
        optimizers = trainer.optimizers
        self.attached = attach(
            self.settings,
            model,
            optimizers[0] if len(optimizers) == 1 else None,
            scaler=getattr(trainer.precision_plugin, "scaler", None),
            clip_norm=self._clip_norm,
            world=self._world,
            timeout_s=self._timeout_s,
        )
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            self.attached.load_state_dict(loaded)
        elif trainer.ckpt_path is not None and not isinstance(self.settings, AllReduceSettings):
            raise ValueError(
                f"fit(ckpt_path={str(trainer.ckpt_path)!r}): the checkpoint holds no state of method "
                f"{self.settings.kind}: it was written without this callback; start from its weights alone, by "
                "load_state_dict() before fit()"
            )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """The number of steps is known from here on."""
        steps = trainer.estimated_stepping_batches
        if isinstance(self.settings, LocalSGDSettings) and steps % self.settings.every:  # of infinity: nan
            if steps == float("inf"):
                return
            raise ValueError(
                f"Trainer: {steps} steps are no multiple of method.every {self.settings.every}, so the run would end "
                "in the middle of a round, where each rank has weights of its own; change max_steps or every"
            )

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Score the weights that all ranks have agreed on."""
        if self.attached is not None:
            self._validating = self.attached.agreed()
            self._validating.__enter__()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Each rank goes on with its own."""
        self._leave_validation()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """A validation that has failed leaves no borrowed weights behind."""
        self._leave_validation()

    def state_dict(self) -> dict[str, Any]:
        """Into Lightning's checkpoint, on rank 0; collective, as trainer.save_checkpoint() is."""
        return self.attached.state_dict() if self.attached is not None else {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Out of Lightning's checkpoint, before on_fit_start."""
        self._loaded = state_dict

    def _leave_validation(self) -> None:
        validating, self._validating = self._validating, None
        if validating is not None:
            validating.__exit__(None, None, None)


def _lightning() -> Any:
    """lightning.pytorch, or the package pytorch_lightning where the caller has imported that one."""
    names = ["lightning.pytorch", "pytorch_lightning"]
    if names[0] not in sys.modules and names[1] in sys.modules:
        names.reverse()
    for name in names:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name not in (name, name.partition(".")[0]):
                raise
    raise ValueError("for_lightning: Lightning is not installed: pip install 'thinwire[lightning]'")
