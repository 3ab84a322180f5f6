"""The optimizer of a partitioned model: each rank updates the rows that it owns, and all follow."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from thinwire.comm.channel import Channel
from thinwire.comm.errors import NonFiniteGradientError
from thinwire.comm.partition.gather import Gather
from thinwire.comm.partition.gradient_shard import GradientShard
from thinwire.comm.partition.levels import Levels
from thinwire.comm.partition.masters import Masters
from thinwire.comm.partition.memory import measure_memory, predict_memory
from thinwire.comm.partition.micro_batches import MicroBatches
from thinwire.comm.partition.ownership import Ownership
from thinwire.comm.partition.placement import Placement
from thinwire.comm.partition.process_groups import StateMeshes
from thinwire.comm.partition.random_keys import update_key
from thinwire.comm.partition.report import bytes_by_operation, describe
from thinwire.comm.partition.state import PartitionedState
from thinwire.comm.partition.unit import Unit
from thinwire.comm.partition.weight_shard import WeightShard
from thinwire.comm.queue import CommQueue

UPDATE = "partition/update"
_NORM = "control/gradient_norm"


class PartitionedUnit:
    """One unit with its gradients, its gathers, its masters and the way of new weights."""

    def __init__(
        self, unit: Unit, ownership: Ownership, gradients: GradientShard, weights: WeightShard, gather: Gather
    ) -> None:
        self.unit = unit
        self.ownership = ownership
        self.gradients = gradients
        self.weights = weights
        self.gather = gather
        self._masters: Masters | None = None

    def build_masters(self, meshes: StateMeshes, *, separate: bool) -> None:
        """Begin from the weights as they are: their own memory where that is fp32, otherwise a copy."""
        self._masters = Masters(self.unit, self.weights, meshes.state, separate=separate)

    @property
    def own(self) -> Masters:
        """What the optimizer changes."""
        assert self._masters is not None
        return self._masters

    @property
    def masters(self) -> dict[str, nn.Parameter]:
        return self.own.parameters


class PartitionedOptimizer(Optimizer):
    """What partition() returns: a torch.optim.Optimizer, and a comm.method.Method.

    step() ends the exchange of gradients, refuses them on every rank if one is not finite, clips, lets the inner
    optimizer update the rows that this rank owns, spreads them, and forgets the gradients.

    Attributes:
        inner: the optimizer that was asked for, over the masters.
        last_norm: the norm of the last step's mean gradient, before clipping; NaN before the first.
        clip_norm: largest norm of the mean gradient; 0 = no limit.
    """

    def __init__(
        self,
        units: Sequence[PartitionedUnit],
        inner: Optimizer,
        queue: CommQueue,
        levels: Levels,
        placement: Placement,
        backward: MicroBatches,
        *,
        clip_norm: float,
        micro_batches: int,
        seed: int = 0,
        gathers: Sequence[Gather] = (),
        owns_queue: bool = False,
    ) -> None:
        self.inner = inner
        self.last_norm = math.nan
        self._gathers = gathers
        self._owns_queue = owns_queue
        self.clip_norm = clip_norm
        self.micro_batches = micro_batches
        self._seed = seed
        self._units = units
        self._queue = queue
        self._levels = levels
        self._placement = placement
        self._backward = backward
        self._norm: float | None = None
        self._steps = 0
        self._remembered = PartitionedState(units, inner, levels, placement)
        super().__init__(inner.param_groups, inner.defaults)
        # The same lists, so that a scheduler that changes one changes the other.
        self.param_groups = inner.param_groups
        self.state = inner.state

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop what backward has left since the last step(), which has forgotten its own gradients already."""
        self._backward.drop()
        self._norm = None
        for unit in self._units:
            for master in unit.masters.values():
                master.grad = None

    def gradient_norm(self) -> float:
        """The 2-norm of the mean gradient, over all parameters; ends the exchange of gradients. Collective.

        Raises:
            NonFiniteGradientError: on every rank, if some gradient is NaN or infinite; names the ranks.
        """
        if self._norm is None:
            bad = self._backward.finish()
            self._norm = self.last_norm = self._measure(bad)
            for unit in self._units:
                unit.own.follow()  # to_empty() moves them from the meta device
                pieces = unit.ownership.named_pieces(unit.gradients.own, self._owner)
                for name, master in unit.masters.items():
                    master.grad = self._like(master, pieces[name])
        return self._norm

    def clip_grad_norm_(self, max_norm: float) -> float:
        """Scale the mean gradient down to a norm of max_norm; returns its norm before. Collective.

        Raises: as gradient_norm().
        """
        norm = self.gradient_norm()
        if norm > max_norm:
            for unit in self._units:
                unit.gradients.own.mul_(max_norm / (norm + 1e-6))
        return norm

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update. Collective.

        Raises:
            ValueError: there was no backward since the last step.
            NonFiniteGradientError: on every rank; weights and states are as before, and the gradients are dropped.
            PeerLostError, PeerLateError, PeerFailedError: a rank is gone or overdue.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.clip_norm:
            self.clip_grad_norm_(self.clip_norm)
        else:
            self.gradient_norm()
        for unit in self._units:
            unit.unit.reshard()  # whoever kept gathered weights would go on with the old ones
            unit.own.follow()
        self.inner.step()
        for unit in self._units:
            unit.gradients.commit()
        self._spread()
        self._steps += 1
        for gather in self._gathers:
            gather.begin_step()
        self.zero_grad()
        return loss

    @property
    def exposed_s(self) -> float:
        """Seconds since the start in which this rank waited for exchanges, gathers included."""
        return self._backward.exposed_s

    def metrics(self) -> dict[str, float]:
        """Of the last step: the norm, and how often a unit was gathered over all params levels, or from a kept copy."""
        return {
            **({} if math.isnan(self.last_norm) else {"gradient_norm": self.last_norm}),
            "gathers": float(sum(gather.last[0] for gather in self._gathers)),
            "kept_gathers": float(sum(gather.last[1] for gather in self._gathers)),
        }

    def describe(self) -> str:
        """Where each state is, what a step sends, and what is kept."""
        kept = self.predicted_memory()
        return describe(self._units, self._gathers, self._levels, self._placement, self.micro_batches, kept)

    def predicted_bytes(self) -> dict[str, int]:
        """Payload bytes that this rank sends in one step of `micro_batches` micro-batches, by level."""
        sent: Counter[str] = Counter()
        for by_level in bytes_by_operation(self._units, self._gathers, self.micro_batches).values():
            sent.update(by_level)
        return {level: count for level, count in sent.items() if count}

    def predicted_memory(self) -> dict[str, int]:
        """Bytes that this rank keeps between steps, by state.

        For a model of n elements, of which t are trained, with states over s_p, s_g and s_o ranks, up to whole rows:
            params: b n / s_p, b = 4 (weights fp32) or 2 (bf16)
            grads: 4 t / s_g, kept from step to step
            optim: (k + m) t / s_o, k what the optimizer keeps for an element (AdamW: 8), m = 4 where the fp32 masters
                are not the weights themselves
            secondary: c n / s_2, c what an element takes in a gather; from the first gather of a step until its end
            memories: 8 e with e the elements that enter the levels with error feedback
        Beside these come the activations, the gathered weights and whole gradients of the few units in use, and the
        payloads under way. States that an optimizer does not keep by element are guessed from a small parameter.
        """
        return predict_memory(self._units, self._gathers, self.inner)

    def measured_memory(self) -> dict[str, int]:
        """As predicted_memory(), counted in the storages of the tensors that there are now."""
        return measure_memory(self._units, self._gathers, self.inner)

    def remove(self) -> None:
        """Leave the model a plain fully_shard() module over the params level, with torch's own collectives.

        Its gradients are then in .grad, averaged over that level alone. A sharded model cannot be made whole in place.
        This optimizer can no longer be used.
        """
        self._backward.detach()
        if self._owns_queue:
            self._queue.close()
            self._queue.monitor.close()

    @property
    def _owner(self) -> int:
        return self._levels.number(self._levels.rank, self._placement.optim)

    def _measure(self, bad: bool) -> float:
        """The norm over all owners, the same bits on every rank."""
        norms = [torch.linalg.vector_norm(unit.gradients.own, dtype=torch.float64) for unit in self._units]
        squares = sum(float(norm) ** 2 for norm in norms)
        mine = torch.tensor([squares, float(bad)], dtype=torch.float64)
        told = self._queue.submit(_NORM, lambda channel: channel.all_gather_same(mine)).wait()
        copies = self._levels.world_size // self._levels.size(self._placement.optim)
        total = float(told[:, 0].sum()) / copies
        ranks = [self._queue.peers[rank] for rank, flag in enumerate(told[:, 1].tolist()) if flag]
        if ranks or not math.isfinite(total):
            self._backward.drop()
            raise NonFiniteGradientError(ranks)
        return math.sqrt(total)

    def _spread(self) -> None:
        waiting = []
        for unit in self._units:
            new = {name: unit.own.local(name) for name in unit.masters}
            key = update_key(self._seed, self._steps, unit.unit.name, self._owner)
            work = partial(self._spread_one, unit, new, key)
            if unit.weights.spreads_alone:
                work(None)
            else:
                waiting.append(self._queue.submit(UPDATE, work))
        for pending in waiting:
            pending.wait()
        for unit in self._units:
            unit.own.note_weights()
            unit.gather.forget()

    def _spread_one(self, unit: PartitionedUnit, new: Mapping[str, Tensor], key: int, channel: Channel | None) -> None:
        with torch.no_grad():
            unit.weights.spread(channel, unit.unit.shard(), new, key)

    def _like(self, master: nn.Parameter, local: Tensor) -> DTensor:
        assert isinstance(master, DTensor)
        return DTensor.from_local(
            local, master.device_mesh, master.placements, run_check=False, shape=master.shape, stride=master.stride()
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs beside model.state_dict(), by the parameter's name; no copies.

        Returns a tree of
            state, param_groups: as torch's, with names for numbers; tensors of a parameter's shape are DTensors, whose
                local shard are the rows that this rank owns.
            masters: fp32 DTensors by name, where they are not the weights themselves.
            steps, draws: how often step() was called, and random numbers were drawn.
            feedback: levels and states under which error feedback has kept something; "" = it has not.
            own: what it has kept, of this rank alone, so to be kept apart: {"rank3": {...}}.
        All but `own` is equal on every rank, or a DTensor: `shared` of a thinwire Checkpointer, and a tree for
        torch.distributed.checkpoint, to be saved as it is: get_optimizer_state_dict() knows nothing of masters.
        state_template() says how to read it.

        Example:
            dcp.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=folder)
            ...
            state = {"model": model.state_dict(), "optimizer": optimizer.state_template()}
            dcp.load(state, checkpoint_id=folder)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        """
        return self._remembered.save(*self._counters())

    def state_template(self) -> dict[str, Any]:
        """What state_dict() will look like once there was a step(), filled with zeros: to read a checkpoint into.

        torch.distributed.checkpoint.load() overwrites it; a thinwire Checkpointer leaves it alone. Then
        load_state_dict() what was read. On other ranks, levels or states than those that wrote it: without "own".
        """
        return self._remembered.template()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what state_dict() gave, here or on other ranks, after model.load_state_dict(). Collective.

        Tensors may be DTensors as state_template() has them, or whole. The number of ranks, the levels and what is
        sharded over them may have changed: optimizer states, masters and counters are then as before; what error
        feedback has kept belongs to slices that no longer exist, and is dropped with a warning. Where only the writer
        kept masters, they become the weights; where only this optimizer does, they begin from the weights.

        Raises:
            ValueError: the checkpoint belongs to another model, or other parameter groups; nothing has been changed.
        """
        self.zero_grad()
        counters, must_spread = self._remembered.load(state)
        self.param_groups = self.inner.param_groups
        self.state = self.inner.state
        self._steps, self._backward.calls = counters
        if must_spread:
            self._spread()

    def _counters(self) -> tuple[int, int]:
        return self._steps, self._backward.calls
