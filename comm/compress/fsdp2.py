"""The door of FSDP2: fully_shard inside the fast domain, and a compressed mean of every shard across the slow links."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from thinwire.comm.compress.ddp import check_gradients
from thinwire.comm.compress.fsdp2_shards import Shards, find_shards
from thinwire.comm.compress.handle import CompressedExchange, LossScale, learning_rates
from thinwire.comm.compress.settings import CompressSettings
from thinwire.comm.queue import CommQueue
from thinwire.comm.same_weights import check_same_weights


class CompressedFSDP(CompressedExchange):
    """The handle of compress() for a model of fully_shard() on a 1-D mesh: a comm.method.Method.

    When FSDP2 has reduce-scattered the gradients of a module over its mesh, this rank's shard of them is averaged with
    the same shard on the other hosts. Memories are those of the shards, so 1/mesh size of what DDP's door keeps. The
    exchange of a module is over when its hook returns; backward waits meanwhile.

    Args:
        model: the root.
        settings: what is sent.
        queue: joins the ranks that hold the same shard.
    """

    def __init__(
        self,
        model: FSDPModule,
        settings: CompressSettings,
        queue: CommQueue,
        *,
        inner: Sequence[Sequence[int]] | None = None,
        scaler: LossScale | None = None,
        optimizer: Optimizer | None = None,
    ) -> None:
        self._shards = check_fsdp2(model)
        shapes = {name: shape for shards in self._shards for name, shape in shards.shapes.items()}
        assert isinstance(model, nn.Module)
        names = {id(p): name for name, p in model.named_parameters()}
        super().__init__(
            settings,
            shapes,
            queue,
            groups=[list(shards.shapes) for shards in self._shards],
            inner=inner,
            scaler=scaler,
            learning_rate=learning_rates(optimizer, names) if optimizer is not None else None,
        )
        if self.sends_at_the_end:
            raise ValueError(
                "compressor.scope: global ranks the entries of all parameters together, but FSDP2 frees each module's "
                "gradients before it computes the next one's; give scope: tensor"
            )
        first = self._shards[0]
        self._place = [first.mesh_rank, first.mesh_size]
        local = {name: tensor for shards in self._shards for name, tensor in shards.parameters().items()}
        place = f"shard {first.mesh_rank} of {first.mesh_size}"
        check_same_weights(local, queue, method="compress", place=place)
        self._backward = -1
        for shards in self._shards:
            shards.module.set_all_reduce_hook(partial(self._take, shards))

    def state_dict(self) -> dict[str, Any]:
        """Error memories and the like of this rank's shards, by parameter name, and which shards they are."""
        return {**super().state_dict(), "shard": list(self._place)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what state_dict() gave; after another number of hosts, {"all_ranks": [state of rank 0, ...]}.

        Raises:
            ValueError: the state is another method's, or of a mesh of another size or another place in it.
        """
        states = [one for one in state.get("all_ranks", [state]) if one.get("shard", self._place) == self._place]
        if not states:
            given = state.get("shard", "of a mesh of another size")
            raise ValueError(
                f"method: the state is that of shard {given}, but this rank holds shard {self._place} (its rank in the "
                "mesh of fully_shard, and the mesh's size), and memories are kept shard by shard; use the same mesh, "
                "or start without the memories"
            )
        super().load_state_dict({"all_ranks": states} if "all_ranks" in state else state)

    def remove(self) -> None:
        """Leave each host's gradients to themselves from now on, as fully_shard on a mesh of one host does."""
        for shards in self._shards:
            shards.module.set_all_reduce_hook(None)  # type: ignore[arg-type]

    def _take(self, shards: Shards, flat: Tensor) -> None:
        """FSDP2's hook: the mean over the hosts of the mesh's mean, in place."""
        if not shards.exchanges:
            shards.hold_back(flat)
            return
        shards.add_held_back(flat)
        backward = torch._C._current_graph_task_id()
        if backward != self._backward:
            self._backward = backward
            self.begin()
            # After FSDP2's own callback, which is queued when backward enters the root, and may call this hook.
            torch.autograd.Variable._execution_engine.queue_callback(partial(self._end_of_backward, flat.device))
        gradients = shards.gradients(flat)
        if gradients:
            self.send(self._shards.index(shards), gradients).wait()

    def _end_of_backward(self, device: torch.device) -> None:
        if not self.finish(partial(self._agree, device)):
            for shards in self._shards:
                shards.spoil()

    def _agree(self, device: torch.device, finite: bool) -> bool:
        """Whether every shard is finite: those of this rank are the same on all hosts, the mesh has the others."""
        bad = torch.tensor([float(not finite)], device=device)
        dist.all_reduce(bad, dist.ReduceOp.MAX, group=self._shards[0].mesh_group)
        return not bool(bad)


def check_fsdp2(model: FSDPModule) -> list[Shards]:
    """Refuse, before anything is sent or registered, what the door of FSDP2 cannot do; otherwise its modules' shards.

    Raises:
        ValueError: says what, and what to do instead.
    """
    assert isinstance(model, nn.Module)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"model: parameter {name} has no values yet (device meta); call to_empty() and initialise it first"
            )
    check_gradients(model)
    shards = find_shards(model)
    first = shards[0]
    for one in shards:
        if not one.is_only_sharded:
            raise ValueError(
                f"model: {one.name} is sharded on a mesh of two dimensions, over the first of which FSDP2 itself "
                "all-reduces, uncompressed; give fully_shard the dimension of the fast domain alone, such as "
                'mesh["node"], and compress() the group of the other one'
            )
        if one.has_hook:
            raise ValueError(
                f"model: {one.name} already has an all-reduce hook, and FSDP2 takes one only; build the model anew to "
                "change the method"
            )
        if (one.mesh_rank, one.mesh_size) != (first.mesh_rank, first.mesh_size):
            raise ValueError(
                f"model: {one.name} is sharded over {one.mesh_size} ranks, {first.name} over {first.mesh_size}; "
                "compress() needs one mesh for all modules"
            )
    return shards
