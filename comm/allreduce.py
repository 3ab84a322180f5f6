"""The baseline: DDP's gradients averaged over all ranks, at full or half precision, through a CommQueue."""

# No `from __future__ import annotations` here: DDP reads the hook's annotations and refuses strings.
import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.distributed import GradBucket, ProcessGroup
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from thinwire.comm.forecast import Exchange, Forecast, Parameter, Seat
from thinwire.comm.queue import CommQueue, Pending, open_queue
from thinwire.comm.settings import Settings
from thinwire.comm.two_level import Groups, TwoLevelMean
from thinwire.comm.two_shot import TwoShotMean

WIRE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WireDtype = Literal["fp32", "bf16", "fp16"]


class AllReduceSettings(Settings):
    """`method: {kind: allreduce, dtype: bf16}`: what crosses the wire is the gradient, in this dtype.

    exact_within: name of a level of the mesh, such as node: its ranks average in fp32 first, so that each link between
      groups carries the gradient once and not once for each rank; null averages among all ranks at once.
    """

    kind: Literal["allreduce"] = "allreduce"
    dtype: WireDtype = "fp32"
    exact_within: str | None = Field(None, min_length=1)


class AllReduce:
    """The handle of allreduce(): a comm.method.Method. Keeps no state from step to step."""

    def __init__(
        self, model: DistributedDataParallel, dtype: WireDtype, queue: CommQueue, groups: Groups | None
    ) -> None:
        self._queue = queue
        self._group = model.process_group
        self._make_mean = functools.partial(make_mean, WIRE_DTYPES[dtype], groups)
        self._mean = self._make_mean()
        self._pending: list[tuple[Pending[None], Future[Tensor], Tensor]] = []
        self._layout = _first_layout(model)
        self._steps = 0
        self._removed = False
        model.register_comm_hook(self, _hook)

    def state_dict(self) -> dict[str, Any]:
        """Empty: an average remembers nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Accept the empty state, of this rank or of any number of ranks.

        Raises:
            ValueError: the state is another method's.
        """
        held = sorted({key for one in state.get("all_ranks", [state]) for key in one})
        if held:
            raise ValueError(
                f"method: allreduce keeps no state, but the checkpoint holds {held}: it was written by "
                "another method; set `method:` to that one, or start without the checkpoint"
            )

    def predicted_bytes(self) -> dict[str, int]:
        """Payload bytes that this rank sends per step, by level, for DDP's present buckets.

        DDP lays its buckets out anew after the first step. Until a backward has shown them, one bucket per dtype is
        assumed, which is what the first step uses (unless find_unused_parameters is set).
        """
        levels: dict[str, int] = defaultdict(int)
        for numel in self._layout:
            for peer, count in self._mean.sent_bytes(numel, self._queue.rank, self._queue.size).items():
                levels[self._queue.meter.level_of(self._queue.peers[peer])] += count
        return dict(levels)

    def metrics(self) -> dict[str, float]:
        """`buckets`: how many pieces the gradient is sent in."""
        return {"buckets": float(len(self._layout))}

    def remove(self) -> None:
        """Average with torch's own all-reduce from now on: DDP itself has no way to take a hook back."""
        self._removed = True

    def _submit(self, bucket: GradBucket) -> Future[Tensor]:
        buffer = bucket.buffer()
        if self._removed:
            return _plain_mean(self._group, buffer)
        if bucket.index() == 0:
            # Runs before DDP's own end-of-backward callback, which is queued with the last bucket. An error raised here
            # keeps its type and leaves loss.backward(); one set on a Future would reach the user as a RuntimeError.
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        future: Future[Tensor] = Future()
        pending = self._queue.submit(f"allreduce/bucket{bucket.index()}", lambda channel: self._mean(channel, buffer))
        self._pending.append((pending, future, buffer))
        return future

    def _finish(self) -> None:
        """End of backward: wait for every bucket, so that DDP finds its futures complete."""
        submitted, self._pending = self._pending, []
        for pending, future, buffer in submitted:
            pending.wait()
            future.set_result(buffer)
        layout = [buffer.numel() for _, _, buffer in submitted]
        if max(layout) < max(self._layout):  # the first step has one bucket of all, whose scratch would stay for good
            self._mean = self._make_mean()
        self._layout = layout


def allreduce(
    model: DistributedDataParallel,
    *,
    dtype: WireDtype = "fp32",
    exact_within: Sequence[Sequence[int]] | None = None,
    queue: CommQueue | None = None,
    group: ProcessGroup | None = None,
    timeout_s: float = 60.0,
) -> AllReduce:
    """Average the gradients of a DDP model over the ranks, metered, under a deadline, with typed errors.

    g <- cast(1/n * sum_r cast(g_r)): each rank's gradient is rounded to `dtype` for the wire, summed in fp32 in rank
    order, and the mean rounded to `dtype` once. All ranks get the same bits. Unlike torch's bf16_compress_hook it never
    sums in half precision. With exact_within the g_r are the means of groups of ranks, which are exact in fp32.

    Args:
        model: the wrapped model; its parameters are fp32, bf16 or fp16 and their gradients dense.
        dtype: what crosses the wire: "fp32", "bf16" or "fp16".
        exact_within: groups of ranks of the queue, such as world.mesh.groups("node"), that average in fp32 first: where
            several ranks share a link, it carries the gradient once and not once for each.
        queue: CommQueue over the ranks of the model's process group; default: a new one over `group`.
        group: ranks to average over when no queue is given; default: all.
        timeout_s: deadline of one bucket when no queue is given, in seconds.
    Raises:
        ValueError: not a DDP model, a hook is already there, an unsupported dtype, sparse gradients, groups that are
            not of equal size, or the queue's ranks are not the model's.
        PeerLostError, PeerLateError, PeerFailedError: from loss.backward(), when a rank is gone or overdue.

    Example:
        model = DistributedDataParallel(model)
        thinwire.allreduce(model, dtype="bf16")
    """
    _check(model, dtype)
    queue = queue or open_queue(group, timeout_s=timeout_s)
    if queue.size != model.process_group.size():
        raise ValueError(
            f"queue: it joins {queue.size} ranks, the model's process group {model.process_group.size()}; "
            "give both the same ranks"
        )
    groups = None if exact_within is None else Groups(exact_within)
    if groups is not None:
        groups.places(queue.rank, queue.size)
    return AllReduce(model, dtype, queue, groups)


def make_mean(wire_dtype: torch.dtype, groups: Groups | None) -> TwoShotMean | TwoLevelMean:
    """The mean over all ranks; `groups`: which of them average exactly first."""
    return TwoShotMean(wire_dtype) if groups is None else TwoLevelMean(groups, wire_dtype)


def forecast_allreduce(
    settings: AllReduceSettings,
    buckets: Sequence[Sequence[Parameter]],
    seat: Seat,
    *,
    inner: Sequence[Sequence[int]] | None = None,
) -> Forecast:
    """What allreduce() will send in a step, without a process.

    Args:
        buckets: DDP's, in the order in which backward fills them.
        inner: the groups of settings.exact_within.
    """
    mean = make_mean(WIRE_DTYPES[settings.dtype], None if inner is None else Groups(inner))
    exchanges = []
    for index, bucket in enumerate(buckets):
        for sent, shots in _shots(mean, _numel(bucket), seat):
            by_level = seat.by_level(sent)
            exchanges.append(
                Exchange(
                    f"allreduce/bucket{index}",
                    by_level,
                    messages=shots * len(sent),
                    shots=dict.fromkeys(by_level, shots),
                    when="backward",
                    needs=tuple(p.name for p in bucket),
                )
            )
    buffers = [mean.scratch_bytes(_numel(b), seat.rank, seat.size, cast=_is_cast(b, mean)) for b in buckets]
    return Forecast(tuple(exchanges), {"buffers": max(buffers, default=0)})


def _hook(state: AllReduce, bucket: GradBucket) -> Future[Tensor]:
    return state._submit(bucket)


def _shots(mean: TwoShotMean | TwoLevelMean, numel: int, seat: Seat) -> list[tuple[dict[int, int], int]]:
    """Parts of one average that come one after another: bytes by receiver, and messages that follow one another."""
    if isinstance(mean, TwoShotMean):
        return [(mean.sent_bytes(numel, seat.rank, seat.size), 2)]
    # What is handed to the group at the end counts with the first part: both use the same links, at different times.
    return [(part, 2) for part in mean.parts(numel, seat.rank, seat.size) if part]


def _numel(bucket: Sequence[Parameter]) -> int:
    return sum(p.numel for p in bucket)


def _is_cast(bucket: Sequence[Parameter], mean: TwoShotMean | TwoLevelMean) -> bool:
    return any(p.dtype != mean.wire_dtype for p in bucket)


def _check(model: DistributedDataParallel, dtype: str) -> None:
    if dtype not in WIRE_DTYPES:
        raise ValueError(f"method.dtype: {dtype!r} is not known; allowed: {', '.join(WIRE_DTYPES)}")
    if not isinstance(model, DistributedDataParallel):
        raise ValueError(
            f"model: expected a torch.nn.parallel.DistributedDataParallel, got {type(model).__name__}; wrap the model "
            "first: DistributedDataParallel(model)"
        )
    if model._comm_hooks:
        raise ValueError(
            f"model: it already has a communication hook ({model._comm_hooks[0][0].__qualname__}), and DDP takes one "
            "only; wrap the model anew to change the method"
        )
    for name, parameter in model.module.named_parameters():
        if parameter.requires_grad and parameter.dtype not in WIRE_DTYPES.values():
            raise ValueError(
                f"model: parameter {name} is {parameter.dtype}; method allreduce averages fp32, bf16 and fp16 gradients"
            )
    for name, module in model.module.named_modules():
        if isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag) and module.sparse:
            raise ValueError(
                f"model: {name} makes sparse gradients; method allreduce averages dense ones: set sparse=False"
            )


def _first_layout(model: DistributedDataParallel) -> list[int]:
    numels: dict[torch.dtype, int] = defaultdict(int)
    for name, parameter in model.module.named_parameters():
        if parameter.requires_grad and name not in model.parameters_to_ignore:
            numels[parameter.dtype] += parameter.numel()
    return list(numels.values())


def _plain_mean(group: ProcessGroup, buffer: Tensor) -> Future[Tensor]:
    work = group.allreduce([buffer.div_(group.size())])
    return work.get_future().then(lambda done: done.value()[0])
