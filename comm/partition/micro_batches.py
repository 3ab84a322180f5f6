"""From FSDP2's backward to the gradient shards: inside the grads levels at once, beyond them once per step."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter

from thinwire.comm.channel import Channel
from thinwire.comm.partition.random_keys import gradient_key
from thinwire.comm.queue import CommQueue, Pending
from thinwire.kernels.all_finite import all_finite

if TYPE_CHECKING:
    from thinwire.comm.partition.optimizer import PartitionedUnit
    from thinwire.comm.partition.unit import Unit

INSIDE, BEYOND = "partition/reduce", "partition/reduce_once"
_UNDER_WAY = 2  # units whose whole gradients may wait for their exchange: more would cost memory


class KeptInput(ReduceScatter):
    """Does not reduce: keeps what FSDP2 would have reduced, for the hook that comes next."""

    def __init__(self) -> None:
        self.kept: Tensor | None = None

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: object,
        async_op: bool = False,
    ) -> None:
        self.kept = input_tensor


class MicroBatches:
    """Takes each unit's gradient from FSDP2, and exchanges it on two queues.

    `inside` carries what every micro-batch sends, with the gathers, in the order in which backward makes it; `beyond`
    what is sent once per step: so a slow link never stands between backward and its next weights. What goes beyond the
    grads levels is sent by finish(), or, while backward still runs, in a backward before which the user has said
    model.set_requires_all_reduce(True).

    Attributes: calls, the exchanges so far, from which the keys of random numbers are made; the same on every rank.
    """

    def __init__(
        self,
        units: Sequence[PartitionedUnit],
        inside: CommQueue,
        beyond: CommQueue,
        *,
        rank: int,
        seed: int = 0,
        frozen: Sequence[Unit] = (),
    ) -> None:
        self._units = units
        self._frozen = frozen
        self._inside = inside
        self._beyond = beyond
        self._rank = rank
        self._seed = seed
        self._under_way: deque[tuple[int, Pending[None], bool]] = deque()
        self._sent: dict[int, Pending[None] | None] = {}  # None: needed no other rank
        self._bad = False
        self._handles = []
        self.calls = 0
        self._keep = [KeptInput() for _ in units]
        for index, (part, keep) in enumerate(zip(units, self._keep, strict=True)):
            part.unit.module.set_custom_reduce_scatter(keep)
            part.unit.module.set_all_reduce_hook(partial(self._take, index))
            for parameter in part.unit.parameters().values():
                self._handles.append(parameter.register_post_accumulate_grad_hook(_drop))

    @property
    def exposed_s(self) -> float:
        """Seconds for which somebody waited for one of the queues."""
        return self._inside.exposed_s + self._beyond.exposed_s

    def finish(self) -> bool:
        """Exchange all that has not been; returns whether this rank's own gradient was not finite.

        Raises:
            ValueError: there was no backward since the last step, or requires_grad of a parameter has changed.
        """
        while self._under_way:
            self._settle()
        for unit in self._frozen:
            unit.check_trained()
        if all(part.gradients.is_empty for part in self._units):
            raise ValueError(
                "optimizer.step(): there is no gradient: there was no backward since the last step; call "
                "loss.backward() first, without set_requires_gradient_sync(False) in the last micro-batch"
            )
        for part in self._units:
            if part.gradients.is_empty:  # no backward has reached it, on any rank: all run the same modules
                part.gradients.take_zeros(next(iter(part.unit.shard().values())).device)
        for index in reversed(range(len(self._units))):
            self._send(index)
        self._wait_for_sent()
        return self._bad

    def drop(self) -> None:
        """Forget all gradients that have been taken."""
        while self._under_way:
            self._settle()
        self._wait_for_sent()
        self._sent.clear()
        self._bad = False
        for part in self._units:
            part.gradients.clear()

    def detach(self) -> None:
        """Leave FSDP2 to itself: it gathers and averages over the params level alone, by torch's own collectives."""
        with suppress(Exception):  # of exchanges whose outcome nobody wants any more: a rank may be gone
            self.drop()
        for handle in self._handles:
            handle.remove()
        for unit in [*(part.unit for part in self._units), *self._frozen]:
            unit.restore_collectives()
        self._inside.close()

    def _take(self, index: int, reduced: Tensor) -> None:
        """FSDP2's hook. Where the params level holds one rank, `reduced` is the unit's whole gradient."""
        part, keep = self._units[index], self._keep[index]
        part.unit.check_trained()
        flat = reduced if keep.kept is None else keep.kept
        keep.kept = None
        if index in self._sent:
            raise ValueError(
                f"loss.backward(): the gradient of {part.unit.name} has been sent already in this step; call "
                "model.set_requires_all_reduce(True) only before the last backward of a step, or never: step() sends it"
            )
        self._bad = self._bad or not all_finite(flat)
        work = partial(self._reduce, part, flat, self._new_key())
        sends = part.unit.sends_on_backward
        if part.gradients.takes_alone:
            work(None)
            if sends:
                self._send(index)
            return
        while len(self._under_way) >= _UNDER_WAY:
            self._settle()
        self._under_way.append((index, self._inside.submit(INSIDE, work), sends))

    def _reduce(self, part: PartitionedUnit, flat: Tensor, key: int, channel: Channel | None) -> None:
        with torch.no_grad():
            part.gradients.take_from_fsdp(channel, flat, key)

    def _settle(self) -> None:
        index, pending, sends = self._under_way.popleft()
        pending.wait()
        if sends:
            self._send(index)

    def _send(self, index: int) -> None:
        """Begin what goes beyond the grads levels."""
        if index in self._sent:
            return
        gradients = self._units[index].gradients
        work = partial(self._finish, index, self._new_key())
        if gradients.finishes_alone:
            work(None)
        self._sent[index] = None if gradients.finishes_alone else self._beyond.submit(BEYOND, work)

    def _new_key(self) -> int:
        self.calls += 1
        return gradient_key(self._seed, self.calls, self._rank)

    def _wait_for_sent(self) -> None:
        for pending in self._sent.values():
            if pending is not None:
                pending.wait()

    def _finish(self, index: int, key: int, channel: Channel | None) -> None:
        with torch.no_grad():
            self._units[index].gradients.finish(channel, key)


def _drop(parameter: Tensor) -> None:
    """FSDP2 hangs a view of what it believes to have reduced on every parameter."""
    parameter.grad = None
