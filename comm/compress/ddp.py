"""The door of DistributedDataParallel: a communication hook that overlaps the exchange with backward."""

# No `from __future__ import annotations` here: DDP reads the hook's annotations and refuses strings.
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed import GradBucket
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from thinwire.comm.compress.handle import CompressedExchange, LossScale, in_groups, learning_rates
from thinwire.comm.compress.settings import CompressSettings
from thinwire.comm.queue import CommQueue

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class CompressedDDP(CompressedExchange):
    """The handle of compress() for a DDP model: a comm.method.Method.

    Gradients are exchanged in groups of DDP's bucket size, which unlike its buckets stay the same from the first step
    on, so that nothing depends on when DDP lays these out anew, as it does after every start. A group leaves as soon as
    backward has all of it, unless what is sent depends on all gradients: then all leave with the last one. Under
    no_sync() nothing is sent; the accumulated gradient is, once.
    """

    def __init__(
        self,
        model: DistributedDataParallel,
        settings: CompressSettings,
        queue: CommQueue,
        *,
        inner: Sequence[Sequence[int]] | None = None,
        clip_norm: float = 0.0,
        scaler: LossScale | None = None,
        optimizer: Optimizer | None = None,
    ) -> None:
        parameters = {name: p for name, p in model.module.named_parameters() if p.requires_grad}
        self._names = {id(p): name for name, p in parameters.items()}
        shapes = {name: p.shape for name, p in parameters.items()}
        self._groups = ddp_groups(shapes, settings.dense_below, model.bucket_bytes_cap)
        self._group_of = {name: i for i, group in enumerate(self._groups) for name in group}
        super().__init__(
            settings,
            shapes,
            queue,
            groups=self._groups,
            inner=inner,
            clip_norm=clip_norm,
            scaler=scaler,
            learning_rate=learning_rates(optimizer, self._names) if optimizer is not None else None,
        )
        self._process_group = model.process_group
        self._removed = False
        self._open: list[tuple[Future[Tensor], Tensor]] = []
        self._arrived: list[dict[str, Tensor]] = []
        model.register_comm_hook(self, _hook)

    def remove(self) -> None:
        """Average with torch's own all-reduce from now on: DDP itself has no way to take a hook back."""
        self._removed = True

    def _take(self, bucket: GradBucket) -> Future[Tensor]:
        buffer = bucket.buffer()
        if self._removed:
            work = self._process_group.allreduce([buffer.div_(self._process_group.size())])
            return work.get_future().then(lambda done: done.value()[0])
        if bucket.index() == 0:
            self._open = []
            self._arrived = [{} for _ in self._groups]
            self.begin()
            # Runs before DDP's own end-of-backward callback, which is queued with the last bucket. An error raised here
            # keeps its type and leaves loss.backward(); one set on a Future would reach the user as a RuntimeError.
            torch.autograd.Variable._execution_engine.queue_callback(self._end_of_backward)
        future: Future[Tensor] = Future()
        self._open.append((future, buffer))
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            name = self._names[id(parameter)]
            i = self._group_of[name]
            self._arrived[i][name] = gradient
            if len(self._arrived[i]) == len(self._groups[i]) and not self.sends_at_the_end:
                self.send(i, self._arrived[i])
        if bucket.is_last() and self.sends_at_the_end:
            self.send_all(self._arrived)
        return future

    def _end_of_backward(self) -> None:
        """Wait for every group, so that DDP finds its futures complete."""
        complete = sum(map(len, self._arrived)) == len(self._names)  # if not, DDP will say which parameters are unused
        self._arrived = []
        self.finish(lambda finite: finite and complete)
        for future, buffer in self._open:
            future.set_result(buffer)
        self._open = []


def ddp_groups(shapes: Mapping[str, torch.Size], dense_below: int, group_bytes: int) -> list[list[str]]:
    """Names in the groups in which CompressedDDP exchanges them.

    Backward comes upon the last parameters first. Small ones share one exchange at the end, which in every group would
    cost two latencies for a few bytes.

    Args:
        shapes: by name, in the model's order.
        dense_below: elements; group_bytes: of fp32, in each.
    """
    order = sorted(reversed(list(shapes)), key=lambda name: shapes[name].numel() < dense_below)
    return in_groups({name: shapes[name] for name in order}, group_bytes)


def _hook(state: CompressedDDP, bucket: GradBucket) -> Future[Tensor]:
    return state._take(bucket)


def check_ddp(model: DistributedDataParallel, queue: CommQueue | None = None) -> None:
    """Refuse, before anything is sent or registered, what the door of DDP cannot do.

    Raises:
        ValueError: says what, and what to do instead.
    """
    if model._comm_hooks:
        raise ValueError(
            f"model: it already has a communication hook ({model._comm_hooks[0][0].__qualname__}), and DDP takes one "
            "only; wrap the model anew to change the method"
        )
    if model.static_graph:
        raise ValueError(
            "model: DistributedDataParallel(static_graph=True) silently stops reducing gradients once no_sync() has "
            "been used; leave static_graph out"
        )
    if model.find_unused_parameters:
        raise ValueError(
            "model: with DistributedDataParallel(find_unused_parameters=True) a parameter that no rank has used keeps "
            "no gradient, so what the error memory sends for it would be lost; leave it out, and freeze unused "
            "parameters with requires_grad_(False)"
        )
    if queue is not None and queue.size != model.process_group.size():
        raise ValueError(
            f"queue: it joins {queue.size} ranks, the model's process group {model.process_group.size()}; "
            "give both the same ranks"
        )
    check_gradients(model.module)


def check_gradients(module: nn.Module) -> None:
    """Refuse parameters whose gradients cannot be compressed.

    Raises:
        ValueError: names the first one.
    """
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and parameter.dtype not in _DTYPES:
            raise ValueError(
                f"model: parameter {name} is {parameter.dtype}; method compress exchanges fp32, bf16 and fp16 gradients"
            )
    for name, inner in module.named_modules():
        if isinstance(inner, nn.Embedding | nn.EmbeddingBag) and inner.sparse:
            raise ValueError(
                f"model: {name} makes sparse gradients; method compress takes dense ones: set sparse=False"
            )
