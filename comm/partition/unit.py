"""What must be known of the inside of a module that fully_shard() manages. Read in torch 2.13."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam


class Unit:
    """The parameters that one FSDPModule gathers and reduces together.

    Args:
        module: with one parameter group.
        names: of the root's parameters, by id().
    Attributes:
        name: of the module in the model.
        shapes: of its trained parameters, whole, by name, in the order in which FSDP2 keeps them.
        is_root: whether its weights stay gathered from forward to backward, as FSDP2 does with the root's.
    """

    def __init__(self, module: FSDPModule, name: str, names: Mapping[int, str], *, is_root: bool) -> None:
        self.module = module
        self.name = name or "the root"
        self.is_root = is_root
        (group,) = module._get_fsdp_state()._fsdp_param_groups
        self._group = group
        self._all: dict[str, FSDPParam] = {names[id(p.sharded_param)]: p for p in group.fsdp_params}
        self._trained = {name: p for name, p in self._all.items() if p.sharded_param.requires_grad}
        self.shapes = {name: cast(DTensor, p.sharded_param).shape for name, p in self._trained.items()}

    @property
    def sends_on_backward(self) -> bool:
        """What model.set_requires_all_reduce() has said for the backward under way."""
        return bool(self._group.all_reduce_grads)

    @property
    def is_gathered_for_backward(self) -> bool:
        """Whether FSDP2 frees the weights after forward: not the root's, unless set_reshard_after_forward() said."""
        stays = self.is_root and self.module._get_fsdp_state()._auto_reshard_after_forward
        return self._group._reshard_after_forward and not stays

    @property
    def is_in_backward(self) -> bool:
        """Whether FSDP2 is at this unit's backward now, or fetches ahead for it."""
        return self._group._training_state is TrainingState.PRE_BACKWARD

    def reshard(self) -> None:
        """Free gathered weights, also those fetched ahead in vain: they are about to be old."""
        if self._group._all_gather_result is not None:
            if isinstance(work := self._group._all_gather_result.all_gather_work, dist.Work):
                work.wait()
            self._group._all_gather_result = None
        self.module.reshard()

    def restore_collectives(self) -> None:
        """Undo what partition() has told FSDP2."""
        self.module.set_custom_all_gather(DefaultAllGather())
        self.module.set_custom_reduce_scatter(DefaultReduceScatter())
        self.module.set_all_reduce_hook(None)  # type: ignore[arg-type]
        self._group.gradient_divide_factor = None
        self._group.force_sum_reduction_for_comms = False
        self._group.reduce_scatter_unused_params = False
        self._group.all_reduce_grads = True

    def check_trained(self) -> None:
        """Raises: ValueError if requires_grad of a parameter is no longer what it was when units were found."""
        for name, p in self._all.items():
            if p.sharded_param.requires_grad != (name in self._trained):
                raise ValueError(
                    f"model: requires_grad of {name} has changed since partition(), which shares out the states of "
                    "what is trained then; set it before, and build model and optimizer anew to change it"
                )

    @property
    def padded_numel(self) -> int:
        """Elements that this rank puts into a gather: shards of all parameters, padded to the largest rank's."""
        return sum(p.padded_sharded_param_size.numel() for p in self._group.fsdp_params)

    @property
    def gather_dtype(self) -> torch.dtype:
        """What FSDP2 gathers: param_dtype of its policy, or the parameters' own."""
        return self._group.mp_policy.param_dtype or self._group.fsdp_params[0].sharded_param.dtype

    @property
    def weights_dtype(self) -> torch.dtype:
        """What the shards are kept in."""
        return self._group.fsdp_params[0].sharded_param.dtype

    def shard(self) -> dict[str, Tensor]:
        """This rank's rows of each trained parameter, in FSDP2's own memory."""
        return {name: cast(DTensor, p.sharded_param).to_local().detach() for name, p in self._trained.items()}

    def whole_shard(self) -> dict[str, Tensor]:
        """As shard(), of the frozen parameters too."""
        return {name: cast(DTensor, p.sharded_param).to_local().detach() for name, p in self._all.items()}

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters themselves: DTensors."""
        return {name: p.sharded_param for name, p in self._trained.items()}

    def versions(self) -> tuple[int, ...]:
        """Changes whenever weights, frozen ones too, are changed in place or replaced; torch hides changes of .data.

        A change counts in the DTensor or in its local part, depending on which of them it was made.
        """
        weights = [cast(DTensor, p.sharded_param) for p in self._group.fsdp_params]
        return tuple(n for w in weights for n in (w._version, w._local_tensor._version, w._local_tensor.data_ptr()))


def find_units(model: nn.Module) -> list[Unit]:
    """All FSDPModules of a model that have parameters of their own, in the order of named_modules()."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    return [
        Unit(module, name, names, is_root=not name)
        for name, module in found
        if module._get_fsdp_state()._fsdp_param_groups
    ]
