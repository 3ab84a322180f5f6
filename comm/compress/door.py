"""tw.compress(): the one call by which compression enters somebody else's training loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from thinwire.comm.compress.compressor import Compressor
from thinwire.comm.compress.ddp import CompressedDDP, check_ddp
from thinwire.comm.compress.feedback import FeedbackSettings
from thinwire.comm.compress.feedback.dgc import DGC
from thinwire.comm.compress.fsdp2 import CompressedFSDP, check_fsdp2
from thinwire.comm.compress.handle import CompressedExchange, LossScale
from thinwire.comm.compress.settings import CompressSettings, make_settings
from thinwire.comm.queue import CommQueue, open_queue


def compress(
    model: nn.Module,
    *,
    compressor: Compressor | Mapping[str, Any] | str,
    feedback: FeedbackSettings | Mapping[str, Any] | str = "ef",
    collective: str = "auto",
    exact_within: Sequence[Sequence[int]] | None = None,
    dense_below: int = 1024,
    start_step: int = 0,
    seed: int = 0,
    clip_norm: float = 0.0,
    scaler: LossScale | None = None,
    optimizer: Optimizer | None = None,
    queue: CommQueue | None = None,
    group: ProcessGroup | None = None,
    timeout_s: float = 60.0,
) -> CompressedExchange:
    """Send compressed gradients, and remember what was left out.

    On each rank r, with gradient g_r and memory e_r, for feedback "ef" (Karimireddy et al. 2019, arXiv 1901.09847; the
    other kinds are in comm/compress/feedback/):

        c_r = g_r + e_r;  every rank gets 1/n sum_q C(c_q), the same bits;  e_r <- c_r - C(c_r)

    Groups of gradients, of DDP's bucket size, are exchanged while backward still runs, unless clip_norm or a compressor
    of scope "global" needs all of them first. What is decoded is added in fp32 and in rank order. If a gradient of any
    rank is NaN or infinite, every rank's gradients are, in places, and no memory has changed: a GradScaler then skips
    the step on every rank.

    Args:
        model: wrapped in DistributedDataParallel; or by fully_shard() on the 1-D mesh of the fast domain. FSDP2 then
            averages inside that, exactly, and each rank's shard of the gradient is compressed on its way to the ranks
            that hold the same shard elsewhere, with 1/mesh size of the memory. Backward waits for each module's
            exchange. set_requires_gradient_sync(False) and set_requires_all_reduce(False) accumulate without sending.
        compressor: settings, such as TopK(density=0.01, values="int8"), a mapping with `kind`, or the name of a kind.
        feedback: settings, a mapping with `kind`, or a name: "none", "ef", "ef21", "ef21_sgdm", "dgc", ...
        collective: "auto", "two_shot", "all_gather", "leader_indices", "balanced" or "contributor_mean".
        exact_within: groups of ranks of the queue, such as world.mesh.groups("node"), that average exactly in fp32 and
            send one compressed message each.
        dense_below: tensors of fewer elements are sent in fp32.
        start_step: this many first steps are sent in fp32.
        seed: of all that is drawn at random; the same on every rank.
        clip_norm: largest norm of the true gradient: before compression every rank multiplies by
            min(1, clip_norm / sqrt(1/n sum_q ||g_q||^2)), in units without the loss scale; 0 = no limit.
        scaler: the GradScaler whose scale() multiplies the loss: the memory is then kept without its factor.
        optimizer: read, never changed: its learning rate for feedback EF(units="update"), its momentum to refuse it
            beside that of "dgc".
        queue: CommQueue over the ranks of the model's process group, or, for fully_shard, over those that hold the
            same shard; default: a new one over `group`.
        group: the ranks when no queue is given; default: all; for fully_shard, one of the two must be given.
        timeout_s: deadline of one group when no queue is given, in seconds.
    Returns: the handle, a comm.method.Method; describe() says for each tensor what is sent and why.
    Raises:
        ValueError: a setting, a combination or a wrapper that cannot work; nothing has been sent or changed.
        PeerLostError, PeerLateError, PeerFailedError: from loss.backward(), when a rank is gone or overdue.

    Example:
        model = DistributedDataParallel(model)
        thinwire.compress(model, compressor=thinwire.TopK(density=0.01, values="int8"), feedback="ef")
    """
    settings = make_settings(
        compressor=compressor,
        feedback=feedback,
        collective=collective,
        dense_below=dense_below,
        start_step=start_step,
        seed=seed,
    )
    return enter(
        model,
        settings,
        inner=exact_within,
        clip_norm=clip_norm,
        scaler=scaler,
        optimizer=optimizer,
        queue=queue,
        group=group,
        timeout_s=timeout_s,
    )


def enter(
    model: nn.Module,
    settings: CompressSettings,
    *,
    inner: Sequence[Sequence[int]] | None = None,
    clip_norm: float = 0.0,
    scaler: LossScale | None = None,
    optimizer: Optimizer | None = None,
    queue: CommQueue | None = None,
    group: ProcessGroup | None = None,
    timeout_s: float = 60.0,
) -> CompressedExchange:
    """compress() with its settings in one piece: what a configuration file gives."""
    if isinstance(settings.feedback, DGC) and optimizer is not None:
        refuse_momentum(optimizer)
    if not clip_norm >= 0:
        raise ValueError(f"clip_norm: {clip_norm} must be zero (no limit) or positive")
    match model:
        case DistributedDataParallel():
            check_ddp(model, queue)
            return CompressedDDP(
                model,
                settings,
                queue or open_queue(group, timeout_s=timeout_s),
                inner=inner,
                clip_norm=clip_norm,
                scaler=scaler,
                optimizer=optimizer,
            )
        case FSDPModule():
            check_fsdp2(model)
            if clip_norm:
                raise ValueError(
                    f"clip_norm: {clip_norm} needs all gradients before the first is sent, and FSDP2 frees those of a "
                    "module before it computes the next ones; leave it out, and clip after backward"
                )
            if queue is None and group is None:
                raise ValueError(
                    "group: give the ranks that hold the same shard, one of each host, such as "
                    'mesh["hosts"].get_group(), or a CommQueue over them'
                )
            return CompressedFSDP(
                model,
                settings,
                queue or open_queue(group, timeout_s=timeout_s),
                inner=inner,
                scaler=scaler,
                optimizer=optimizer,
            )
        case _:
            raise ValueError(
                f"model: expected a torch.nn.parallel.DistributedDataParallel, got {type(model).__name__}; wrap the "
                "model first: DistributedDataParallel(model), or fully_shard(model) inside the fast domain"
            )


def refuse_momentum(optimizer: Optimizer) -> None:
    """Momentum on each rank before compression, and once more after it, is none that anybody has described.

    Raises:
        ValueError: the optimizer has momentum.
    """
    for group in optimizer.param_groups:
        momentum = group.get("momentum", 0.0) or group.get("betas", (0.0,))[0]
        if momentum:
            raise ValueError(
                f"feedback: dgc keeps the momentum itself, but the optimizer ({type(optimizer).__name__}) has "
                f"{momentum} of its own; give torch.optim.SGD with momentum=0, or another feedback"
            )
