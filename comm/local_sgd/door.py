"""How local SGD enters a training loop: settings, what it refuses, and the one call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field, model_validator
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from thinwire.comm.compress.collectives import CollectiveKind
from thinwire.comm.compress.compressors import AnyCompressor
from thinwire.comm.compress.compressors.dense import Dense
from thinwire.comm.compress.feedback import AnyFeedback, NoFeedback
from thinwire.comm.compress.settings import CompressSettings
from thinwire.comm.local_sgd.exchange import RoundExchange
from thinwire.comm.local_sgd.handle import LocalSGD
from thinwire.comm.local_sgd.outer import AverageSettings, Outer, OuterSettings
from thinwire.comm.queue import CommQueue, open_queue
from thinwire.comm.rank_names import name_ranks
from thinwire.comm.same_weights import check_same_weights
from thinwire.comm.settings import Settings

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class LocalSGDSettings(Settings):
    """`method: {kind: local_sgd, every: 30}`: each rank trains for itself, and all meet every 30 steps.

    every: optimizer steps between two exchanges; train.steps must be a multiple.
    outer: average, {kind: nesterov, lr: 0.7, momentum: 0.9} or {kind: sgd, lr: 1.0}; a name alone means its defaults.
    compressor, feedback, collective, dense_below, seed: as in `kind: compress`, but of what a rank has changed since
    the last exchange. collective contributor_mean divides by the number of ranks that sent an element, not by all.
    bucket_mb: the exchange goes in pieces of about this many MB (10^6 bytes) of fp32.
    """

    kind: Literal["local_sgd"] = "local_sgd"
    every: int = Field(gt=0)
    outer: OuterSettings = AverageSettings()
    compressor: AnyCompressor = Dense()
    feedback: AnyFeedback = NoFeedback()
    collective: Literal["auto"] | CollectiveKind = "auto"
    dense_below: int = Field(1024, ge=0)
    bucket_mb: float = Field(25.0, gt=0)
    seed: int = Field(0, ge=0, lt=1 << 63)

    @model_validator(mode="after")
    def _fit_together(self) -> LocalSGDSettings:
        self.compression()
        return self

    def compression(self) -> CompressSettings:
        """What is sent, as settings of `kind: compress`."""
        return CompressSettings(
            compressor=self.compressor,
            feedback=self.feedback,
            collective=self.collective,
            dense_below=self.dense_below,
            seed=self.seed,
        )


def local_sgd(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    every: int,
    outer: str | Mapping[str, Any] | OuterSettings = "average",
    compressor: str | Mapping[str, Any] | AnyCompressor = "none",
    feedback: str | Mapping[str, Any] | AnyFeedback = "none",
    collective: str = "auto",
    dense_below: int = 1024,
    bucket_mb: float = 25.0,
    seed: int = 0,
    queue: CommQueue | None = None,
    group: ProcessGroup | None = None,
    timeout_s: float = 60.0,
) -> LocalSGD:
    """Let every rank take `every` optimizer steps of its own, then move all to new common weights.

    With theta_r the weights of rank r after its steps from theta, and C the compressor:

        d_r = theta - theta_r;  d = 1/n sum_r C(d_r);  theta <- outer(theta, d);  theta_r <- theta on every rank

    outer "average" is local SGD (Stich 2018, 1805.09767): theta <- theta - d. Without a compressor the mean of theta_r
    is taken itself, which is the same but for rounding, and exact where all ranks have equal weights.
    outer "nesterov" is DiLoCo (Douillard et al. 2023, 2311.08105): b <- momentum b + d,
    theta <- theta - lr (d + momentum b), as torch.optim.SGD does it.
    compressor TopK(chunk=4096, k=64, values="2bit") with feedback EF(decay=0.95) and outer "sgd" is SparseLoCo (Sarfi
    et al. 2025, 2508.15706): e <- decay e + d_r, send C(e), e <- e - C(e). There the outer learning rate multiplies d_r
    before it enters e, here what has been received; the same while it is constant. 1/n sum is the paper's mean; with
    collective "contributor_mean" an element is divided by the number of ranks that sent it, as in the authors' code.
    Unlike that, nothing is clipped to the median of the ranks' norms.

    Each rank keeps the state of its own optimizer. Floating-point buffers that are part of the model's state (batch
    normalisation) are averaged with the weights. Between two exchanges the ranks' models differ: evaluate, and export,
    in `with handle.agreed():`. Memory: theta in fp32, once more for the outer momentum, and the feedback's.

    Args:
        model: its trainable parameters are fp32, bf16 or fp16, and equal on all ranks. A plain module; or one in
            DistributedDataParallel: over the same ranks, its gradients then stay local; over other ranks, such as those
            of this machine, it goes on averaging among these.
        optimizer: of these parameters. All ranks take the same number of steps: a GradScaler that skips one on some
            rank breaks this, unless the optimizer is one that handles found_inf itself (fused=True).
        every: optimizer steps between two exchanges.
        outer: settings of the outer optimizer, or "average", "nesterov" or "sgd".
        compressor, feedback, collective: settings or names, as for compress().
        dense_below: parameters of fewer elements are sent in fp32.
        bucket_mb: the exchange goes in pieces of about this many MB of fp32.
        seed: of all that the compressor draws at random.
        queue: CommQueue over the ranks that meet; default: a new one over `group`.
        group: the ranks that meet when no queue is given; default: all.
        timeout_s: deadline of one bucket when no queue is given, in seconds.
    Raises:
        ValueError: a setting is not allowed; the model or the optimizer cannot be used; or, on every rank, the ranks
            begin with different weights.
        NonFiniteWeightsError: from optimizer.step() on every rank, when a rank's weights are not finite at the end of a
            round. All are then back at theta, and no memory has changed.
        PeerLostError, PeerLateError, PeerFailedError: from optimizer.step(), when a rank is gone or overdue.

    Example:
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
        thinwire.local_sgd(model, optimizer, every=30, outer="nesterov")
    """
    settings = LocalSGDSettings.model_validate(
        {
            "every": every,
            "outer": outer,
            "compressor": compressor,
            "feedback": feedback,
            "collective": collective,
            "dense_below": dense_below,
            "bucket_mb": bucket_mb,
            "seed": seed,
        }
    )
    return enter(model, optimizer, settings, queue=queue, group=group, timeout_s=timeout_s)


def enter(
    model: nn.Module,
    optimizer: Optimizer,
    settings: LocalSGDSettings,
    *,
    queue: CommQueue | None = None,
    group: ProcessGroup | None = None,
    timeout_s: float = 60.0,
) -> LocalSGD:
    """local_sgd() with its settings in one piece: what a configuration file gives."""
    wrapped = model if isinstance(model, DistributedDataParallel) else None
    module = model if wrapped is None else wrapped.module
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    _check(parameters, optimizer, wrapped)
    queue = queue or open_queue(group, timeout_s=timeout_s)
    silenced = wrapped if wrapped is not None and _covers(wrapped, queue) else None
    check_same_weights(parameters, queue, method="local_sgd")
    shapes = {name: p.shape for name, p in parameters.items()}
    plain = isinstance(settings.compressor, Dense) and isinstance(settings.feedback, NoFeedback)
    averaging = isinstance(settings.outer, AverageSettings)
    return LocalSGD(
        module,
        optimizer,
        RoundExchange(settings.compression(), shapes, queue, int(settings.bucket_mb * 1e6)),
        None if plain and averaging else Outer(settings.outer),
        every=settings.every,
        queue=queue,
        silenced=silenced,
    )


def _check(parameters: dict[str, nn.Parameter], optimizer: Optimizer, wrapped: DistributedDataParallel | None) -> None:
    for name, parameter in parameters.items():
        if isinstance(parameter, DTensor):
            raise ValueError(
                f"model: parameter {name} is sharded; method local_sgd exchanges whole parameters: use it without "
                "fully_shard, or tw.compress across the slow links"
            )
        if parameter.dtype not in _DTYPES:
            raise ValueError(
                f"model: parameter {name} is {parameter.dtype}; method local_sgd exchanges fp32, bf16 and fp16 weights"
            )
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if missing := [name for name, parameter in parameters.items() if id(parameter) not in trained]:
        raise ValueError(
            f"optimizer: it does not train {', '.join(missing[:3])}{' and others' if len(missing) > 3 else ''}; give "
            "the optimizer of all of the model's parameters, or set requires_grad of the others to False"
        )
    if wrapped is not None and wrapped._comm_hooks:
        raise ValueError(
            f"model: its gradients already go through the communication hook {wrapped._comm_hooks[0][0].__qualname__}; "
            "method local_sgd keeps gradients local: wrap the model anew, without a hook"
        )
    if wrapped is not None and wrapped.static_graph:
        raise ValueError(
            "model: DistributedDataParallel(static_graph=True) exchanges gradients whatever it is told; leave it out"
        )


def _covers(model: DistributedDataParallel, queue: CommQueue) -> bool:
    """Whether DDP would average among the ranks that shall train apart."""
    group = model.process_group
    try:
        ranks = set(dist.get_process_group_ranks(group))
    except KeyError:  # a group that torch.distributed does not know is one of all ranks
        ranks = set(range(group.size()))
    if ranks & set(queue.peers) == {queue.peers[queue.rank]}:
        return False
    if ranks == set(queue.peers):
        return True
    raise ValueError(
        f"model: DistributedDataParallel averages gradients among {name_ranks(sorted(ranks))}, of which "
        f"{name_ranks(sorted(ranks & set(queue.peers)))} shall train apart, as part of {name_ranks(queue.peers)}; give "
        "both the same ranks, or let them share this rank only"
    )
