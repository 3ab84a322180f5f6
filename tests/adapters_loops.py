"""Runs in the loops of Fabric, Lightning, Accelerate and the Hugging Face Trainer, from one step to another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thinwire.comm.compress.settings import CompressSettings
from thinwire.comm.same_weights import weights_digest
from thinwire.dist.config import RunConfig, load_config
from thinwire.dist.data import shard
from thinwire.dist.optimizers import build_optimizer
from thinwire.dist.task import build_task

SIZE = 2
CPU = torch.device("cpu")


class Case:
    """What thinwire's own trainer would train: the model, its optimizer, and each rank's batches of each step."""

    def __init__(self, path: str, folder: Path) -> None:
        self.config: RunConfig = load_config(Path(path))
        task = build_task(self.config, CPU)
        self.model: nn.Module = task.model
        self.data = task.data
        self.optimizer = build_optimizer(self.config.optimizer, task.model)
        self.micro_batch, self.micro_batches = self.config.train.share(SIZE)
        self.steps = self.config.train.steps
        self.folder = folder
        self.losses: list[float] = []
        self.validated: list[str] = []  # the weights that each validation saw

    @property
    def clip_before(self) -> float:
        """What the adapter is to clip, because the loop must not."""
        method = self.config.method
        return self.config.train.clip_norm if isinstance(method, CompressSettings) and method.clip == "before" else 0.0

    @property
    def clip_in_loop(self) -> float:
        return 0.0 if self.clip_before else self.config.train.clip_norm

    def batch(self, rank: int, step: int, i: int) -> tuple[Tensor, Tensor]:
        samples = shard(step, self.config.train.global_batch, rank, SIZE)
        batch = self.data.training_batch(samples[i * self.micro_batch : (i + 1) * self.micro_batch], CPU)
        return batch.inputs, batch.targets

    def loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(scores.flatten(0, -2), targets.flatten())

    def note(self, i: int, loss: Tensor) -> None:
        """Add up the micro-batches' shares of the step's loss, as thinwire's loop does."""
        part = float(loss.detach() / self.micro_batches)
        if i == 0:
            self.losses.append(part)
        else:
            self.losses[-1] += part

    def lend_modules(self, module: nn.Module) -> None:
        """Give `module` the model's parts under the same names, which random draws and memories go by."""
        for name, child in self.model.named_children():
            module.add_module(name, child)

    def weights(self) -> str:
        return weights_digest(dict(self.model.named_parameters())).hex()


def fabric_run(case: Case, rank: int, first: int, last: int, state: Path) -> None:
    import lightning.fabric

    import thinwire as tw

    fabric = lightning.fabric.Fabric(accelerator="cpu", devices=SIZE, strategy="ddp")
    fabric.launch()
    model, optimizer = fabric.setup(case.model, case.optimizer)
    handle = tw.for_fabric(fabric, model, case.config.method, optimizer=optimizer, clip_norm=case.clip_before)
    kept = {"thinwire": handle, "model": model, "optimizer": optimizer}
    if first:
        fabric.load(state, kept)
    for step in range(first, last):
        optimizer.zero_grad()
        for i in range(case.micro_batches):
            inputs, targets = case.batch(rank, step, i)
            with fabric.no_backward_sync(model, enabled=i + 1 < case.micro_batches):
                loss = case.loss(model(inputs), targets)
                case.note(i, loss)
                fabric.backward(loss / case.micro_batches)
        if case.clip_in_loop:
            fabric.clip_gradients(model, optimizer, max_norm=case.clip_in_loop)
        optimizer.step()
    if not first:
        fabric.save(state, kept)


def lightning_run(case: Case, rank: int, first: int, last: int, state: Path) -> None:
    import lightning

    import thinwire as tw

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            case.lend_modules(self)

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            loss = case.loss(case.model(batch[0]), batch[1])
            case.note(index % case.micro_batches, loss)
            return loss

        def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
            case.validated.append(case.weights())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return case.optimizer

    trainer = lightning.Trainer(
        strategy="ddp",
        accumulate_grad_batches=case.micro_batches,
        gradient_clip_val=case.clip_in_loop or None,
        max_steps=last,
        val_check_interval=case.micro_batches,  # in batches: after every step, so between exchanges too
        limit_val_batches=1,
        num_sanity_val_steps=0,
        callbacks=[tw.for_lightning(case.config.method, clip_norm=case.clip_before)],
        **quiet(),
    )
    # Lightning goes on within the epoch, with whatever the loader gives first.
    steps = [*range(first, case.steps), *range(first)]
    batches = [case.batch(rank, step, i) for step in steps for i in range(case.micro_batches)]
    trainer.fit(Module(), loader(batches), loader(batches[:1]), ckpt_path=state if first else None)
    if not first:
        trainer.save_checkpoint(state)


def quiet() -> dict[str, Any]:
    return {
        "accelerator": "cpu",
        "devices": SIZE,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }


def loader(batches: list[Any]) -> Any:
    return torch.utils.data.DataLoader(batches, batch_size=None, shuffle=False)


def accelerate_run(case: Case, rank: int, first: int, last: int, state: Path) -> None:
    import accelerate

    import thinwire as tw

    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=case.micro_batches)
    model, optimizer = accelerator.prepare(case.model, case.optimizer)
    tw.for_accelerate(accelerator, model, case.config.method, optimizer=optimizer, clip_norm=case.clip_before)
    if first:
        accelerator.load_state(state)
    for step in range(first, last):
        for i in range(case.micro_batches):
            inputs, targets = case.batch(rank, step, i)
            with accelerator.accumulate(model):
                loss = case.loss(model(inputs), targets)
                case.note(i, loss)
                accelerator.backward(loss)
                if accelerator.sync_gradients and case.clip_in_loop:
                    accelerator.clip_grad_norm_(model.parameters(), case.clip_in_loop)
                optimizer.step()
                optimizer.zero_grad()
    if not first:
        accelerator.save_state(state)


class WithLoss(nn.Module):
    """A model as the Hugging Face Trainer wants it."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        case.lend_modules(self)
        self._case = case

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        scores = self._case.model(input_ids)
        return {"loss": self._case.loss(scores, labels), "logits": scores}


class InOrder(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Samples so that the Trainer's dealing of batches to ranks gives each rank what thinwire's trainer gives it."""

    def __init__(self, case: Case) -> None:
        self._case = case

    def __len__(self) -> int:
        return self._case.config.train.global_batch * self._case.steps

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        case = self._case
        dealt, position = divmod(index, case.micro_batch)
        turn, rank = divmod(dealt, SIZE)
        step, i = divmod(turn, case.micro_batches)
        inputs, targets = case.batch(rank, step, i)
        return {"input_ids": inputs[position], "labels": targets[position]}


def hf_trainer(case: Case, last: int, **more: Any) -> Any:
    import transformers

    class Trainer(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def compute_loss(self, model: Any, inputs: Any, *given: Any, **named: Any) -> Any:
            loss = super().compute_loss(model, inputs, *given, **named)
            case.note(self._micro_batch % case.micro_batches, loss)
            self._micro_batch += 1
            return loss

    options = {
        "output_dir": str(case.folder),
        "per_device_train_batch_size": case.micro_batch,
        "gradient_accumulation_steps": case.micro_batches,
        "max_steps": last,
        "save_strategy": "no",
        "max_grad_norm": case.clip_in_loop,
        "use_cpu": True,
        "report_to": "none",
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "logging_strategy": "no",
        "ddp_backend": "gloo",
        "ddp_find_unused_parameters": False,
    }
    schedule = torch.optim.lr_scheduler.LambdaLR(case.optimizer, lambda step: 1.0)
    trainer = Trainer(
        WithLoss(case),
        transformers.TrainingArguments(**(options | more)),
        train_dataset=InOrder(case),
        optimizers=(case.optimizer, schedule),
    )
    trainer._micro_batch = 0
    return trainer


def hf_trainer_run(case: Case, rank: int, first: int, last: int, state: Path) -> None:
    import thinwire as tw

    saving = {} if first else {"save_strategy": "steps", "save_steps": last}
    trainer = hf_trainer(case, last, **saving)
    tw.for_hf_trainer(trainer, case.config.method, clip_norm=case.clip_before)
    trainer.train(resume_from_checkpoint=str(case.folder / f"checkpoint-{first}") if first else None)


RUNS = {
    "fabric": fabric_run,
    "lightning": lightning_run,
    "accelerate": accelerate_run,
    "hf_trainer": hf_trainer_run,
}
