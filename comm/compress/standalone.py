"""Compression for other trainers: a mean of named tensors over the ranks, in place, whenever it is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from thinwire.comm.compress.compressor import Compressor
from thinwire.comm.compress.feedback import FeedbackSettings
from thinwire.comm.compress.handle import CompressedExchange, LossScale, in_groups
from thinwire.comm.compress.settings import make_settings
from thinwire.comm.queue import CommQueue, open_queue

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class CompressedMean(CompressedExchange):
    """x_r <- the mean over the ranks of what feedback and compressor make of x_q, for a fixed set of named tensors.

    The method of compress() without DDP: for trainers that hold gradients, or differences of parameters, in hand. It
    is itself a comm.method.Method.

    Args:
        tensors: names with tensors like those to come; the same names, shapes and order on every rank.
        compressor, feedback, collective, dense_below, start_step, seed: as in compress().
        clip_norm: largest norm of the tensors before compression, as in compress(); 0 = no limit.
        scaler: a GradScaler by whose scale the tensors are multiplied.
        exact_within: as in compress().
        group_bytes: tensors are exchanged in groups of about this many bytes of fp32.
        queue: CommQueue over the ranks; default: a new one over `group`.
        group: the ranks when no queue is given; default: all.
        timeout_s: deadline of one group of tensors when no queue is given, in seconds.
    Raises:
        ValueError: a setting or a combination is not allowed, a name is given twice, or a tensor is not fp32, bf16 or
            fp16.

    Example:
        mean = thinwire.CompressedMean(model.named_parameters(), compressor="int8", feedback="ef")
        finite = mean.allreduce({name: p.grad for name, p in model.named_parameters()})
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
        *,
        compressor: Compressor | Mapping[str, Any] | str,
        feedback: FeedbackSettings | Mapping[str, Any] | str = "ef",
        collective: str = "auto",
        dense_below: int = 1024,
        start_step: int = 0,
        seed: int = 0,
        clip_norm: float = 0.0,
        scaler: LossScale | None = None,
        exact_within: Sequence[Sequence[int]] | None = None,
        group_bytes: int = 25_000_000,
        queue: CommQueue | None = None,
        group: ProcessGroup | None = None,
        timeout_s: float = 60.0,
    ) -> None:
        settings = make_settings(
            compressor=compressor,
            feedback=feedback,
            collective=collective,
            dense_below=dense_below,
            start_step=start_step,
            seed=seed,
        )
        pairs = list(tensors.items() if isinstance(tensors, Mapping) else tensors)
        self._shapes = {name: x.shape for name, x in pairs}
        if len(self._shapes) != len(pairs):
            raise ValueError(f"tensors: {len(pairs)} of them have {len(self._shapes)} names; give each its own")
        _check_dtypes(pairs)
        super().__init__(
            settings,
            self._shapes,
            queue or open_queue(group, timeout_s=timeout_s),
            groups=in_groups(self._shapes, group_bytes),
            inner=exact_within,
            clip_norm=clip_norm,
            scaler=scaler,
        )

    def allreduce(self, tensors: Mapping[str, Tensor]) -> bool:
        """Replace the tensors by their mean as the compression sees it, in place; the same bits on every rank.

        One step of the feedback. Collective.

        Args:
            tensors: all that were named at the start, with those shapes; fp32, bf16 or fp16.
        Returns: whether all tensors of all ranks were finite, the same on every rank. If not, some are NaN or infinite
            now on every rank, and nothing is remembered of this step.
        Raises:
            ValueError: other names, shapes or dtypes.
            PeerLostError, PeerLateError, PeerFailedError: a rank is gone or overdue.
        """
        if {name: x.shape for name, x in tensors.items()} != self._shapes:
            differing = sorted(
                name
                for name in {*tensors, *self._shapes}
                if name not in tensors or tensors[name].shape != self._shapes.get(name)
            )
            raise ValueError(
                f"tensors: {', '.join(differing[:3])} differ in name or shape from those given at the start; give all "
                "of these, with their shapes"
            )
        _check_dtypes(tensors.items())
        self.begin()
        self.send_all([{name: x.detach() for name, x in tensors.items()}])
        return self.finish()

    def remove(self) -> None:
        """Nothing to leave: it acts when called."""


def _check_dtypes(tensors: Iterable[tuple[str, Tensor]]) -> None:
    for name, x in tensors:
        if x.dtype not in _DTYPES or x.layout != torch.strided:
            raise ValueError(f"tensors: {name} is {x.dtype}, {x.layout}; give dense fp32, bf16 or fp16 tensors")
