"""DeepSpeed's ZeRO stages, with their defaults and DeepSpeed's own collectives."""

from __future__ import annotations

import os
import warnings

from peers.peer import Job, Peer
from thinwire.dist.data import Batch
from thinwire.dist.world import World


class DeepSpeed(Peer):
    """deepspeed.initialize() around the same optimizer."""

    def __init__(self, job: Job, stage: int) -> None:
        os.environ["DS_ACCELERATOR"] = "cpu"
        warnings.filterwarnings("ignore", message=".*is deprecated")  # what it calls in torch
        import deepspeed

        model = job.model()
        optimizer = job.optimizer(model)
        batch, micro_batches = job.config.train.share(job.size)
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": batch,
                "gradient_accumulation_steps": micro_batches,
                "gradient_clipping": job.config.train.clip_norm,
                "zero_optimization": {"stage": stage},
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "steps_per_print": 1 << 62,
            },
        )
        super().__init__(job, model, engine, optimizer)
        self._engine = engine
        self.forward_is_collective = stage == 3

    def step(self, batch: Batch, lr: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = self.loss(batch)
        self._engine.backward(loss)
        self._engine.step()
        return float(loss.detach())


def zero(job: Job, world: World, stage: int) -> Peer:
    return DeepSpeed(job, stage)
