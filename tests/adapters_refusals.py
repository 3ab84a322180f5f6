"""What the adapters must refuse, in each library: what that library would drop in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from adapters_loops import SIZE, Case, hf_trainer, loader, quiet
from torch import Tensor, nn

from thinwire.comm.allreduce import AllReduceSettings


def refusals(provoked: dict[str, Callable[[], object]]) -> dict[str, str]:
    errors = {}
    for name, provoke in provoked.items():
        try:
            provoke()
        except ValueError as error:
            errors[name] = str(error)
        else:
            errors[name] = "nothing was refused"
    return errors


def accelerate_refusals(case: Case) -> dict[str, Callable[[], object]]:
    import accelerate

    import thinwire as tw

    def prepared(**options: Any) -> tuple[Any, Any]:
        accelerator = accelerate.Accelerator(cpu=True, **options)
        return accelerator, accelerator.prepare(nn.Linear(2, 2))

    class Mine(str):
        value = "mine"

    def dropped() -> object:
        kwargs = accelerate.DistributedDataParallelKwargs(comm_hook=Mine())  # type: ignore[arg-type]
        accelerator = accelerate.Accelerator(cpu=True, kwargs_handlers=[kwargs])
        return tw.for_accelerate(accelerator, nn.Linear(2, 2), "allreduce")

    def hook_twice() -> object:
        accelerator, model = prepared()
        tw.for_accelerate(accelerator, model, "allreduce")
        return tw.for_accelerate(accelerator, model, "allreduce")

    plugin = accelerate.utils.GradientAccumulationPlugin(num_steps=2, sync_each_batch=True)
    return {
        "before prepare": lambda: tw.for_accelerate(prepared()[0], nn.Linear(2, 2), "allreduce"),
        "dropped hook": dropped,
        "hook twice": hook_twice,
        "each batch": lambda: tw.for_accelerate(*prepared(gradient_accumulation_plugin=plugin), "allreduce"),
        "no optimizer": lambda: tw.for_accelerate(*prepared(), {"kind": "local_sgd", "every": 2}),
        "gossip": lambda: tw.for_accelerate(*prepared(), "gossip"),
        "unknown key": lambda: tw.for_accelerate(*prepared(), {"kind": "allreduce", "dytpe": "bf16"}),
        "no level": lambda: tw.for_accelerate(
            *prepared(), {"kind": "compress", "compressor": "lowrank", "exact_within": "node"}
        ),
        "clip elsewhere": lambda: tw.for_accelerate(*prepared(), AllReduceSettings(), clip_norm=1.0),
    }


def hf_trainer_refusals(case: Case) -> dict[str, Callable[[], object]]:
    import thinwire as tw

    def trainer(**more: Any) -> Any:
        return hf_trainer(case, 4, **more)

    def wrong_steps() -> object:
        made = trainer()
        tw.for_hf_trainer(made, {"kind": "local_sgd", "every": 3})
        return made.train()

    def twice() -> object:
        made = trainer()
        tw.for_hf_trainer(made, "allreduce")
        return tw.for_hf_trainer(made, "allreduce")

    return {
        "clipping": lambda: tw.for_hf_trainer(
            trainer(max_grad_norm=1.0), {"kind": "compress", "compressor": "lowrank"}
        ),
        "unused": lambda: tw.for_hf_trainer(
            trainer(ddp_find_unused_parameters=True, max_grad_norm=0.0), {"kind": "compress", "compressor": "lowrank"}
        ),
        "wrong steps": wrong_steps,
        "two methods": twice,
    }


def lightning_refusals(case: Case) -> dict[str, Callable[[], object]]:
    import lightning
    from lightning.pytorch.strategies import DDPStrategy
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

    import thinwire as tw

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return self.layer(batch).sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def fit(method: Any, **options: Any) -> object:
        given = {"strategy": "ddp", "max_steps": 4, **quiet(), **options}
        trainer = lightning.Trainer(callbacks=[tw.for_lightning(method)], **given)
        return trainer.fit(Module(), loader([torch.ones(1, 2)] * 8))

    lowrank = {"kind": "compress", "compressor": "lowrank"}
    return {
        "skipped hook": lambda: fit("allreduce", strategy=DDPStrategy(ddp_comm_hook=fp16_compress_hook)),
        "clipping": lambda: fit(lowrank, gradient_clip_val=1.0),
        "wrong steps": lambda: fit({"kind": "local_sgd", "every": 3}),
    }


def fabric_refusals(case: Case) -> dict[str, Callable[[], object]]:
    import lightning.fabric

    import thinwire as tw

    fabric = lightning.fabric.Fabric(accelerator="cpu", devices=SIZE, strategy="ddp")
    fabric.launch()
    return {"not set up": lambda: tw.for_fabric(fabric, nn.Linear(2, 2), "allreduce")}


REFUSALS = {
    "accelerate": accelerate_refusals,
    "hf_trainer": hf_trainer_refusals,
    "lightning": lightning_refusals,
    "fabric": fabric_refusals,
}


def alone(library: str) -> dict[str, Callable[[], object]]:
    """What a process without others is told."""
    import thinwire as tw

    if library == "accelerate":
        import accelerate

        accelerator = accelerate.Accelerator(cpu=True)
        return {"alone": lambda: tw.for_accelerate(accelerator, nn.Linear(2, 2), "allreduce")}
    import lightning

    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    return {"alone": lambda: tw.for_fabric(fabric, fabric.setup(nn.Linear(2, 2)), "allreduce")}
