"""What the door of FSDP2 must know of its inside: which part of which parameter is where. Read in torch 2.13."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo


class Shards:
    """The trained parameters that one FSDPModule manages, and the flat gradient of this rank's shards of them.

    Reduce-scatter leaves the shards' gradients one after another, each padded to the size of the largest rank's shard.

    Args:
        module: with one parameter group.
        names: of the root's parameters, by id().
    Attributes: name, of the module; shapes, of the shards that are not empty, by parameter name.
    """

    def __init__(self, module: FSDPModule, name: str, names: Mapping[int, str]) -> None:
        self.module = module
        self.name = name or "the root"
        states = module._get_fsdp_state()._fsdp_param_groups
        if len(states) > 1:
            raise ValueError(
                f"model: {self.name} has parameters on several meshes (shard_placement_fn), for which FSDP2 takes no "
                "all-reduce hook; give them one mesh"
            )
        self._group = states[0]
        self._mesh = cast("FSDPMeshInfo", self._group.mesh_info)
        self._trained = [p for p in self._group.fsdp_params if p.sharded_param.requires_grad]
        self.shapes: dict[str, torch.Size] = {}
        self._offsets: dict[str, int] = {}
        self._numel = 0
        for parameter in self._trained:
            if parameter.sharded_size.numel():
                own = names[id(parameter.sharded_param)]
                self.shapes[own] = parameter.sharded_size
                self._offsets[own] = self._numel
            self._numel += parameter.padded_sharded_param_size.numel()
        self._held_back: Tensor | None = None

    @property
    def is_only_sharded(self) -> bool:
        """Whether FSDP2 does not all-reduce itself, over another dimension of the mesh."""
        return self._mesh.replicate_mesh_dim is None

    @property
    def has_hook(self) -> bool:
        return self._group._all_reduce_hook is not None

    @property
    def exchanges(self) -> bool:
        """False after set_requires_all_reduce(False)."""
        return bool(self._group.all_reduce_grads)

    @property
    def mesh_group(self) -> ProcessGroup:
        group = self._mesh.shard_process_group
        assert isinstance(group, ProcessGroup)
        return group

    @property
    def mesh_rank(self) -> int:
        return self._mesh.shard_mesh_rank

    @property
    def mesh_size(self) -> int:
        return self._mesh.shard_mesh_size

    def parameters(self) -> dict[str, Tensor]:
        """This rank's shards, by name."""
        shards = [cast(DTensor, p.sharded_param).to_local() for p in self._trained if p.sharded_size.numel()]
        return dict(zip(self.shapes, shards, strict=True))

    def gradients(self, flat: Tensor) -> dict[str, Tensor]:
        """The shards' gradients, views of what reduce-scatter gave.

        Raises:
            ValueError: some parameter has no gradient, so that the places of the others are not known.
        """
        if flat.numel() != self._numel:
            raise ValueError(
                f"model: only {flat.numel()} of {self._numel} elements of {self.name} have a gradient in this "
                "backward, and which they are may differ from rank to rank; call "
                "set_reduce_scatter_unused_params(True) on the model, which gives zeros to parameters without one"
            )
        return {
            name: flat[offset : offset + self.shapes[name].numel()].view(self.shapes[name])
            for name, offset in self._offsets.items()
        }

    def hold_back(self, flat: Tensor) -> None:
        """Keep a gradient that is not to be exchanged yet, and hand zeros on."""
        if self._held_back is None:
            self._held_back = flat.clone()
        else:
            self._held_back += flat
        flat.zero_()

    def add_held_back(self, flat: Tensor) -> None:
        """Add what was held back since the last exchange."""
        if self._held_back is not None:
            flat += self._held_back
            self._held_back = None

    def spoil(self) -> None:
        """Another shard is not finite: let every rank see that in its own gradients."""
        for parameter in self._trained:
            if isinstance(gradient := parameter.sharded_param.grad, DTensor):
                gradient.to_local().fill_(torch.nan)


def find_shards(model: nn.Module) -> list[Shards]:
    """Those of all FSDPModules of a model that have parameters of their own, the root's included."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    return [Shards(module, name, names) for name, module in found if module._get_fsdp_state()._fsdp_param_groups]
