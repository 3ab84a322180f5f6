"""Hugging Face Trainer: a callback that lets a method into the DDP model of train(), and keeps its state by rank."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from thinwire.comm.allreduce import AllReduceSettings
from thinwire.comm.compress.settings import CompressSettings
from thinwire.comm.local_sgd.door import LocalSGDSettings
from thinwire.dist.adapters.accelerate import check_accelerator
from thinwire.dist.adapters.attached import (
    AttachableSettings,
    Attached,
    MethodChoice,
    attach,
    check_clipping,
    ddp_module,
    settings_of,
)
from thinwire.dist.adapters.rank_files import read_rank_states, write_rank_state
from thinwire.dist.world import World


def for_hf_trainer(
    trainer: Any,
    method: MethodChoice,
    *,
    clip_norm: float = 0.0,
    world: World | None = None,
    timeout_s: float = 60.0,
    resume_from: str | Path | None = None,
) -> Any:
    """Let a method carry the gradients of a transformers.Trainer, which has no argument for a communication hook.

    Adds a callback that registers when train() has wrapped the model. Each rank writes its state into the trainer's
    checkpoint folders, and train(resume_from_checkpoint=...) continues from it. Under local_sgd checkpoints and
    evaluations belong at the end of a round, and every rank keeps an optimizer state of its own.

    Args:
        trainer: started under torchrun or the like, without FSDP or DeepSpeed.
        method: settings, a mapping as under `method:` of a configuration, or a kind: allreduce, compress, local_sgd.
        clip_norm: largest norm of the true gradient, for method compress, in place of max_grad_norm, which is then 0.
        world: of thinwire.init(), called before TrainingArguments, for the machine's levels and one deadline for all.
        timeout_s: deadline of one operation without a world, in seconds.
        resume_from: the folder that train() resumes from, where that is not output_dir/checkpoint-STEP.
    Returns: the callback; its attribute `attached` is the method, once train() has begun.
    Raises:
        ValueError: here or from train(): a trainer under which the method would not run, or would run wrongly.
        PeerLostError, PeerLateError, PeerFailedError: from train(), when a rank is gone or overdue in an exchange of
            the method. In a collective of the Trainer's own it is a RuntimeError of torch; that which counts tokens
            over all ranks comes before each step, unless TrainingArguments(average_tokens_across_devices=False).

    Example:
        trainer = Trainer(model, args, train_dataset=texts)
        thinwire.for_hf_trainer(trainer, "allreduce")
        trainer.train()
    """
    settings = settings_of(method, "for_hf_trainer")
    check_accelerator(trainer.accelerator, settings, trainer.args.gradient_accumulation_steps)
    limit = trainer.args.max_grad_norm
    check_clipping(settings, limit, "TrainingArguments(max_grad_norm=...)", "for_hf_trainer")
    if isinstance(settings, CompressSettings) and getattr(
        trainer.accelerator.ddp_handler, "find_unused_parameters", False
    ):
        raise ValueError(
            "trainer: its DistributedDataParallel looks for unused parameters, as it does by default, and method "
            "compress sends all gradients in every step; give TrainingArguments(ddp_find_unused_parameters=False), "
            "and freeze unused parameters with requires_grad_(False)"
        )
    base = importlib.import_module("transformers").TrainerCallback
    callback: Any = type("ThinwireCallback", (HFTrainerMethod, base), {})(trainer, settings)
    callback.clip_norm, callback.world, callback.timeout_s = clip_norm, world, timeout_s
    callback.resume_from = Path(resume_from) if resume_from is not None else None
    if any(isinstance(other, HFTrainerMethod) for other in trainer.callback_handler.callbacks):
        raise ValueError("trainer: it already has a method of thinwire; make a new Trainer to change it")
    trainer.add_callback(callback)
    return callback


class HFTrainerMethod:
    """What the callback does: the Trainer calls these by their names. attached: the method, once train() has begun.

    The model that the Trainer hands to callbacks is the one inside DDP, so this holds the trainer itself.
    """

    clip_norm = 0.0
    world: World | None = None
    timeout_s = 60.0
    resume_from: Path | None = None

    def __init__(self, trainer: Any, settings: AttachableSettings) -> None:
        self.settings = settings
        self.attached: Attached | None = None
        self._trainer = trainer
        self._model: object = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The model is wrapped, and a checkpoint's weights and optimizer are in place."""
        if state.is_hyper_param_search:
            raise ValueError("trainer: each trial of hyperparameter_search() needs a method of its own; run one trial")
        self._check_rounds(args, state)
        model = ddp_module(self._trainer.model_wrapped, "trainer")
        if self._model is not model:
            self.attached = attach(
                self.settings,
                model,
                self._trainer.optimizer,
                scaler=self._trainer.accelerator.scaler,
                clip_norm=self.clip_norm,
                world=self.world,
                timeout_s=self.timeout_s,
            )
            self._model = model
        if state.global_step:
            self._resume(self.resume_from or self._folder(args, state))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The Trainer evaluates and saves as if all ranks had the same weights."""
        if self.attached is not None and (control.should_evaluate or control.should_save):
            self.attached.check_agreed("an evaluation or a checkpoint")

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The same."""
        self.on_step_end(args, state, control)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Beside the random states, which the Trainer writes by rank too."""
        if self.attached is not None and not args.save_only_model:
            weights = dict(self._trainer.model.named_parameters())
            write_rank_state(self._folder(args, state), self.attached.own_state(), self.attached.queue, weights)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """What save_model() will write must be the model of all ranks."""
        if self.attached is not None:
            self.attached.check_agreed("the end of training")

    def _resume(self, folder: Path) -> None:
        assert self.attached is not None
        weights = dict(self._trainer.model.named_parameters())
        states = read_rank_states(folder, weights)
        if states:
            self.attached.take_over(states)
        elif not isinstance(self.settings, AllReduceSettings):
            raise ValueError(
                f"{folder}: no states of method {self.settings.kind} (thinwire-rank0-of-N.safetensors) for this run to "
                "go on from; give for_hf_trainer(..., resume_from=FOLDER) the folder that train() resumes from, or "
                "start a new run from its weights"
            )

    def _check_rounds(self, args: Any, state: Any) -> None:
        if not isinstance(self.settings, LocalSGDSettings):
            return
        every = self.settings.every
        wanted = {"max_steps": state.max_steps}
        if str(getattr(args.eval_strategy, "value", args.eval_strategy)) == "steps":
            wanted["eval_steps"] = state.eval_steps
        if str(getattr(args.save_strategy, "value", args.save_strategy)) == "steps":
            wanted["save_steps"] = state.save_steps
        for name, steps in wanted.items():
            if steps % every:
                raise ValueError(
                    f"TrainingArguments: {name} is {steps}, no multiple of method.every {every}; between two exchanges "
                    f"each rank has weights of its own. Nearest: {steps // every * every or every} or "
                    f"{(steps // every + 1) * every}"
                )

    def _folder(self, args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}"
