"""What an evaluation says of text whose domains are known: how well each is predicted, and by which experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from thinwire.dist.domain_data import DomainData
from thinwire.dist.expert_use import ExpertUse, expert_use
from thinwire.dist.models.moe import MoEGPT
from thinwire.dist.task import TaskData, computing
from thinwire.dist.world import World

if TYPE_CHECKING:
    from thinwire.dist.train import TrainSettings


def evaluate_domains(
    settings: TrainSettings, model: nn.Module, data: TaskData, world: World, *, alone: bool
) -> dict[str, Any]:
    """Of a mixture of experts on data.corpus: domains; nothing of anything else. Collective, unless alone.

    Args:
        alone: this rank scores all windows and asks nobody. Else each rank scores its share, in which it may have more
            batches than others: a model whose forward pass is collective must be scored by all ranks, each alone.
    Returns: under "val_domains", "perplexity" of each domain, and means over layers as ExpertUse.layers() has them.
    """
    if not isinstance(model, MoEGPT) or not isinstance(data, DomainData):
        return {}
    windows = data.validation_by_domain
    wanted = data.validation.count if settings.eval_windows == "all" else settings.eval_windows
    use = expert_use(
        model,
        windows,
        count=-(-wanted // len(windows)),
        batch=settings.eval_batch,
        device=world.device,
        precision=computing(settings.precision, world.device),
        part=(0, 1) if alone else (world.rank, world.size),
    )
    if not alone:
        use = _sum(use, world)
    means = {name: sum(values) / len(values) for name, values in use.layers().items()}
    return {"val_domains": {"perplexity": use.perplexities(), **means}}


def _sum(use: ExpertUse, world: World) -> ExpertUse:
    """Of all ranks, in their order."""
    parts = (use.counts, use.scores, use.nats, use.tokens)
    own = torch.cat([part.double().flatten() for part in parts])
    gathered = world.queue.submit("control/domains", lambda channel: channel.all_gather_same(own)).wait()
    summed = gathered.sum(0).split([part.numel() for part in parts])
    counts, scores, nats, tokens = (
        flat.view(part.shape).to(part.dtype) for flat, part in zip(summed, parts, strict=True)
    )
    return ExpertUse(use.domains, counts, scores, nats, tokens)
