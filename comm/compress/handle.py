"""What every door of compression has in common: the pipeline, the clipping factor, and the members of a Method."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from thinwire.comm.channel import Channel
from thinwire.comm.compress.assemble import assemble
from thinwire.comm.compress.auto import Auto, Chooser
from thinwire.comm.compress.feedback.ef21_weighted import WeightedEF21
from thinwire.comm.compress.pipeline import Pipeline
from thinwire.comm.compress.routes import describe_routes, routes_from_plain, routes_to_plain
from thinwire.comm.compress.settings import CompressSettings
from thinwire.comm.queue import CommQueue, Pending

NORM_BYTES = 8
_log = logging.getLogger("thinwire")


class LossScale(Protocol):
    """What torch.amp.GradScaler is to a door."""

    def get_scale(self) -> float: ...


class CompressedExchange(ABC):
    """A comm.method.Method without a door: doors say when tensors are there: begin(), send() of each group, finish().

    Args:
        settings: what is sent.
        shapes: of all tensors, by name, in an order that all ranks share.
        queue: joins the ranks.
        groups: names of the tensors that are exchanged together, the same on every rank and in every step.
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
        groups: Sequence[Sequence[str]],
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
        self._gradient_norm = math.nan
        self._factor = 1.0
        self._scale = 1.0
        self._under_way: list[Pending[bool]] = []
        self._pipeline: Pipeline = assemble(
            settings, shapes, rank=queue.rank, size=queue.size, inner=inner, learning_rate=learning_rate
        )
        self._chooser: Chooser | None = None
        if isinstance(settings.compressor, Auto):
            self._chooser = Chooser(settings.compressor, self._pipeline.build, seed=settings.seed)
        self._watched: dict[str, Tensor] = {}  # the tensors of the present step, for the chooser
        self._sent_together = self._pipeline.exchanged_together(groups)

    @property
    def sends_at_the_end(self) -> bool:
        """Whether nothing can be sent before all gradients are there: what is sent depends on all of them."""
        return bool(self.clip_norm) or self._pipeline.takes_all_at_once

    def state_dict(self) -> dict[str, Any]:
        """Error memories and the like, by parameter name; warm starts and thresholds of the collective.

        Of compressor auto its choice too; a run that stops before the choice measures anew when it goes on.
        """
        state = self._pipeline.state_dict()
        if isinstance(self.settings.compressor, Auto):
            state["chosen"] = {} if self._chooser is not None else routes_to_plain(self._pipeline.routes)
        return state

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
        if states[0].get("chosen") and isinstance(self.settings.compressor, Auto):
            self._pipeline.reroute(routes_from_plain(states[0]["chosen"]))
            self._chooser = None
        if "all_ranks" in state:
            self._pipeline.load_states_of_all_ranks(states, self._queue.rank, self._queue.size)
        else:
            self._pipeline.load_state_dict(state)

    def predicted_bytes(self) -> dict[str, int]:
        """Payload bytes that this rank sends per step, by level.

        Of compressors whose size depends on the data, as in the last step; before the first, what is expected.
        """
        levels: dict[str, int] = defaultdict(int)
        for peer, count in self._pipeline.sent_bytes(self._sent_together, self._queue.rank, self._queue.size).items():
            levels[self._queue.meter.level_of(self._queue.peers[peer])] += count + bool(self.clip_norm) * NORM_BYTES
        return dict(levels)

    def metrics(self) -> dict[str, float]:
        """Groups sent; bytes of the last step, and bits per element to each other rank; steps rolled back; norms.

        In some steps, `compression_error`; see ContributionError.

        The norms are those of what is remembered, and, if it is clipped, of the gradient before.
        """
        payload_bytes = sum(self.predicted_bytes().values())
        elements = sum(shape.numel() for shape in self._pipeline.shapes.values())
        found = {
            "groups": float(len(self._sent_together)),
            "payload_bytes": float(payload_bytes),
            "bits_per_element": 8.0 * payload_bytes / max(1, elements * (self._queue.size - 1)),
            "skipped_steps": float(self._pipeline.skipped),
            **self._pipeline.feedback.metrics(),
            **self._pipeline.error.metrics(),
        }
        return {**found, "gradient_norm": self._gradient_norm} if self.clip_norm else found

    def describe(self) -> str:
        """A table: for each tensor the codec, its bytes dense and sent, and why; and the step sizes of EF21-W."""
        lines = [describe_routes(self._pipeline.shapes, self._pipeline.routes)]
        if warm_up := self.settings.start_step:
            lines.append(f"but all tensors dense in the first {warm_up:,} steps")
        told = self._pipeline.feedback.metrics()
        if "step_size" in told:
            lines.append(
                f"feedback ef21_w: proven for step sizes up to {told['step_size']:.4g} (with the arithmetic mean of "
                f"the L_i); EF21's first proof allows {told['step_size_ef21']:.4g} (with the quadratic mean)"
            )
        return "\n".join(lines)

    def weigh_by(self, smoothness: float) -> list[float]:
        """Weigh the ranks of feedback ef21_w by what each has estimated of its L_i; between steps. Collective.

        Args:
            smoothness: this rank's L_i, such as SmoothnessEstimate gives.
        Returns: those of all ranks.
        Raises:
            ValueError: another feedback, or not a positive number on some rank.
        """
        feedback = self._pipeline.feedback
        if not isinstance(feedback, WeightedEF21):
            raise ValueError(
                f"weigh_by: feedback {self.settings.feedback.kind} has no weights; give feedback: ef21_w for them"
            )
        mine = torch.tensor([smoothness], dtype=torch.float64)
        gathered = self._queue.submit("control/smoothness", lambda channel: channel.all_gather_same(mine)).wait()
        values: list[float] = gathered.flatten().tolist()
        feedback.set_smoothness(values)
        return values

    @abstractmethod
    def remove(self) -> None:
        """Leave the trainer as it was before the method entered."""

    def begin(self) -> None:
        """Before the first group of a step; what an interrupted step has left is forgotten."""
        self._under_way = []
        self._watched = {}
        self._factor = 1.0
        self._scale = 1.0 if self._scaler is None else self._scaler.get_scale()
        self._pipeline.begin_step(self._scale)

    def send(self, number: int, group: Mapping[str, Tensor]) -> Pending[bool]:
        """Exchange the tensors of one group, in place, in the background."""
        tensors = {name: group[name] for name in self._sent_together[number]}
        if self._chooser is not None:
            self._watched |= tensors
        pending = self._queue.submit(f"{self._operation}/group{number}", partial(self._exchange, tensors))
        self._under_way.append(pending)
        return pending

    def send_all(self, groups: Iterable[Mapping[str, Tensor]]) -> None:
        """Exchange all groups of a step: clipped first if so wished, and joined if they must be."""
        given = {name: tensor for group in groups for name, tensor in group.items()}
        if self.clip_norm:
            self._queue.submit(f"{self._operation}/norm", partial(self._agree_on_factor, list(given.values())))
        for number in range(len(self._sent_together)):
            self.send(number, given)

    def finish(self, agree: Callable[[bool], bool] = bool) -> bool:
        """Wait for all groups, then keep or forget what the step has changed; returns whether all was finite.

        Args:
            agree: makes of this rank's verdict that of more ranks than the queue joins.
        """
        submitted, self._under_way = self._under_way, []
        finite = agree(all([pending.wait() for pending in submitted]))
        self._pipeline.end_step(finite)
        if finite and self._chooser is not None and self._chooser.observe(self._queue.exposed_s):
            self._choose(self._chooser)
        return finite

    def _choose(self, chooser: Chooser) -> None:
        watched, self._watched = self._watched, {}
        present, groups = self._pipeline.routes, len(self._sent_together)
        pending = self._queue.submit("control/auto", lambda channel: chooser.choose(channel, watched, present, groups))
        self._pipeline.reroute(pending.wait())
        self._chooser = None
        if self._queue.rank == 0:
            _log.info("compressor auto has chosen:\n%s", self.describe())

    def _exchange(self, tensors: Mapping[str, Tensor], channel: Channel) -> bool:
        return self._pipeline.exchange(channel, tensors, self._factor)

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


def in_groups(shapes: Mapping[str, torch.Size], group_bytes: int) -> list[list[str]]:
    """Names of neighbours, at least one, with about this many bytes of fp32 together."""
    groups: list[list[str]] = [[]]
    held = 0
    for name, shape in shapes.items():
        if groups[-1] and held + 4 * shape.numel() > group_bytes:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += 4 * shape.numel()
    return groups
