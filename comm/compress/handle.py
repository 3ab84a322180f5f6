"""What every door of compression has in common: the pipeline, the clipping factor, and the members of a Method."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from thinwire.comm.channel import Channel
from thinwire.comm.compress.assemble import assemble
from thinwire.comm.compress.pipeline import Pipeline
from thinwire.comm.compress.routes import describe_routes
from thinwire.comm.compress.settings import CompressSettings
from thinwire.comm.queue import CommQueue, Pending

_NORM_BYTES = 8


class LossScale(Protocol):
    """What torch.amp.GradScaler is to a door."""

    def get_scale(self) -> float: ...


class CompressedExchange(ABC):
    """A comm.method.Method without a door: doors say when buckets are complete, and call begin(), send() and finish().

    Args:
        settings: what is sent.
        shapes: of all tensors, by name, in an order that all ranks share.
        queue: joins the ranks.
        buckets: the names of each bucket, as far as they are known before the first step.
        inner: groups of ranks of the queue that average exactly; see CompressSettings.exact_within.
        clip_norm: largest norm of the true gradient; 0 = no limit.
        scaler: the GradScaler by whose scale the gradients are multiplied.
        operation: what the exchanges are called on the queue.
        learning_rate: that of a parameter in the present step, by its name.
    """

    def __init__(
        self,
        settings: CompressSettings,
        shapes: Mapping[str, torch.Size],
        queue: CommQueue,
        *,
        buckets: Sequence[Sequence[str]],
        inner: Sequence[Sequence[int]] | None = None,
        clip_norm: float = 0.0,
        scaler: LossScale | None = None,
        learning_rate: Callable[[str], float] | None = None,
        operation: str = "compress",
    ) -> None:
        self.settings = settings
        self.clip_norm = clip_norm
        self._queue = queue
        self._operation = operation
        self._scaler = scaler
        self._buckets = [list(bucket) for bucket in buckets]
        self._gradient_norm = math.nan
        self._factor = 1.0
        self._scale = 1.0
        self._under_way: list[tuple[list[str], Pending[bool]]] = []
        self._pipeline: Pipeline = assemble(
            settings, shapes, rank=queue.rank, size=queue.size, inner=inner, learning_rate=learning_rate
        )

    @property
    def sends_at_the_end(self) -> bool:
        """Whether nothing can be sent before all gradients are there: what is sent depends on all of them."""
        return bool(self.clip_norm) or self._pipeline.takes_all_at_once

    def state_dict(self) -> dict[str, Any]:
        """Error memories and the like, by parameter name; warm starts and thresholds of the collective."""
        return self._pipeline.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what state_dict() gave; or, after another number of ranks, {"all_ranks": [state of rank 0, ...]}.

        The errors are then averaged: every rank gets the mean of the old ranks' errors, so that their mean is kept.

        Raises:
            ValueError: the state is another method's, or of another compressor or feedback.
        """
        states = state.get("all_ranks", [state])
        if any("collectives" not in one for one in states):
            raise ValueError(
                f"method: compress finds {sorted(states[0])} in the checkpoint, which is not its own state; set "
                "`method:` to the one that wrote it, or start without the checkpoint"
            )
        if "all_ranks" in state:
            self._pipeline.load_states_of_all_ranks(states, self._queue.rank, self._queue.size)
        else:
            self._pipeline.load_state_dict(state)

    def predicted_bytes(self) -> dict[str, int]:
        """Payload bytes that this rank sends per step, by level, for the present buckets.

        Of compressors whose size depends on the data, as in the last step; before the first, what is expected.
        """
        levels: dict[str, int] = defaultdict(int)
        for peer, count in self._pipeline.sent_bytes(self._buckets, self._queue.rank, self._queue.size).items():
            levels[self._queue.meter.level_of(self._queue.peers[peer])] += count + bool(self.clip_norm) * _NORM_BYTES
        return dict(levels)

    def metrics(self) -> dict[str, float]:
        """Pieces sent, bytes of the last step, steps rolled back, norms of what is remembered; norm before clipping."""
        found = {
            "buckets": float(len(self._buckets)),
            "payload_bytes": float(sum(self.predicted_bytes().values())),
            "skipped_steps": float(self._pipeline.skipped),
            **self._pipeline.feedback.metrics(),
        }
        return {**found, "gradient_norm": self._gradient_norm} if self.clip_norm else found

    def describe(self) -> str:
        """A table: for each tensor the codec, its bytes dense and sent, and why."""
        return describe_routes(self._pipeline.shapes, self._pipeline.routes)

    @abstractmethod
    def remove(self) -> None:
        """Leave the trainer as it was before the method entered."""

    def begin(self) -> None:
        """Before the first bucket of a step; what an interrupted step has left is forgotten."""
        self._under_way = []
        self._factor = 1.0
        self._scale = 1.0 if self._scaler is None else self._scaler.get_scale()
        self._pipeline.begin_step(self._scale)

    def send(self, bucket: Mapping[str, Tensor]) -> None:
        """Exchange one bucket, in place, in the background."""
        number = len(self._under_way)
        pending = self._queue.submit(f"{self._operation}/bucket{number}", partial(self._exchange, bucket))
        self._under_way.append((list(bucket), pending))

    def send_all(self, buckets: Sequence[Mapping[str, Tensor]]) -> None:
        """Exchange all buckets of a step: clipped first if so wished, and joined if they must be."""
        if self.clip_norm:
            gradients = [gradient for bucket in buckets for gradient in bucket.values()]
            self._queue.submit(f"{self._operation}/norm", partial(self._agree_on_factor, gradients))
        if self._pipeline.takes_all_at_once:
            given = {name: gradient for bucket in buckets for name, gradient in bucket.items()}
            buckets = [{name: given[name] for name in self._pipeline.shapes if name in given}]
        for bucket in buckets:
            self.send(bucket)

    def finish(self, agree: Callable[[bool], bool] = bool) -> bool:
        """Wait for all buckets, then keep or forget what the step has changed; returns whether all was finite.

        Args:
            agree: makes of this rank's verdict that of more ranks than the queue joins.
        """
        submitted, self._under_way = self._under_way, []
        finite = agree(all([pending.wait() for _, pending in submitted]))
        finite = finite if agree is None else agree(finite)
        self._pipeline.end_step(finite)
        self._buckets = [names for names, _ in submitted]
        return finite

    def _exchange(self, bucket: Mapping[str, Tensor], channel: Channel) -> bool:
        return self._pipeline.exchange(channel, bucket, self._factor)

    def _agree_on_factor(self, gradients: Sequence[Tensor], channel: Channel) -> None:
        """factor <- min(1, clip_norm / sqrt(1/n sum_r ||g_r||^2)), from numbers that every rank adds in rank order."""
        device = gradients[0].device
        squares = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients]).square().sum()
        gathered = channel.all_gather_same(squares.to(device)).tolist()
        self._gradient_norm = math.sqrt(math.fsum(gathered) / channel.size) / self._scale
        # Where it is not finite neither is a gradient, and the exchange will say so.
        if math.isfinite(self._gradient_norm) and self._gradient_norm > self.clip_norm:
            self._factor = self.clip_norm / self._gradient_norm


def learning_rates(optimizer: Optimizer, names: Mapping[int, str]) -> Callable[[str], float]:
    """The learning rate of a parameter by its name, as it is when asked.

    Args:
        names: by id() of the parameter.
    """
    groups = {names[id(p)]: group for group in optimizer.param_groups for p in group["params"] if id(p) in names}
    return lambda name: float(groups[name]["lr"])
