"""The fp32 weights that the optimizer changes: the rows of a unit that this rank owns, as DTensors."""

from __future__ import annotations

import logging
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from thinwire.comm.partition.unit import Unit
from thinwire.comm.partition.weight_shard import WeightShard

_log = logging.getLogger(__name__)


class Masters:
    """Views of the weights' own memory, or separate copies where weights are not fp32 or travel inexactly.

    FSDP2 replaces the memory of its shards when a state_dict is loaded, and when the model leaves the meta device;
    users change weights in place. follow() notices both, so that the optimizer always starts from the weights that the
    model has. The parameters stay the same objects: optimizers and schedulers hold on to them.

    Args:
        mesh: of the states: see StateMeshes.
        separate: copies, of 4 bytes for each element that this rank owns.
    Attributes:
        are_restored: whether they came from a checkpoint, and there was no step since.
        parameters: fp32, by name, with placement Shard(0) in every dimension of the mesh.
    """

    def __init__(self, unit: Unit, weights: WeightShard, mesh: DeviceMesh, *, separate: bool) -> None:
        self.separate = separate
        self._unit = unit
        self._weights = weights
        self._mesh = mesh
        self._seen: dict[str, tuple[object, ...]] = {}
        self.parameters: dict[str, nn.Parameter] = {
            name: self._wrap(name, self._begin(rows)) for name, rows in self._rows().items()
        }
        self.note_weights()

    def local(self, name: str) -> Tensor:
        """This rank's rows of a master, without gradient."""
        return cast(DTensor, self.parameters[name]).to_local().detach()

    def follow(self) -> None:
        """Begin anew from weights that somebody else has changed, each parameter by itself."""
        now, rows = self._versions(), self._rows()
        changed = [name for name in rows if now[name] != self._seen[name]]
        for name in changed:
            local = self.local(name)
            if local.device != rows[name].device:
                self._replace(name, self._begin(rows[name]))
            elif not self.separate and local.data_ptr() != rows[name].data_ptr():
                self._replace(name, rows[name])
            elif self.separate and local.numel():  # FSDP2 makes empty shards anew as it likes
                local.copy_(rows[name])
        if self.are_restored and self.separate and any(self.local(name).numel() for name in changed):
            _log.warning(
                "optimizer.step(): weights (%s) were changed after optimizer.load_state_dict(), so their fp32 masters "
                "begin from the rounded weights; to continue exactly, call model.load_state_dict() first",
                ", ".join(changed),
            )
        self._seen = now

    def note_weights(self) -> None:
        """Take the weights as they are now for what these masters have become."""
        self._seen = self._versions()
        self.are_restored = False

    def begin_from(self, name: str, rows: Tensor) -> None:
        """Overwrite this rank's rows of a master; those of a view are the weights' own."""
        with torch.no_grad():
            self.local(name).copy_(rows)

    def _rows(self) -> dict[str, Tensor]:
        return self._weights.own_rows(self._unit.shard())

    def _begin(self, rows: Tensor) -> Tensor:
        return rows.to(torch.float32, copy=True) if self.separate else rows

    def _replace(self, name: str, local: Tensor) -> None:
        """Exchange what is inside the parameter."""
        parameter = self.parameters[name]
        gradient, parameter.grad = parameter.grad, None
        torch.utils.swap_tensors(parameter, self._wrap(name, local))
        parameter.grad = gradient

    def _wrap(self, name: str, local: Tensor) -> nn.Parameter:
        shape = self._unit.shapes[name]
        stride = torch.empty(shape, device="meta").stride()
        cuts = [Shard(0)] * self._mesh.ndim
        whole = DTensor.from_local(local, self._mesh, cuts, run_check=False, shape=shape, stride=stride)
        return nn.Parameter(whole)

    def _versions(self) -> dict[str, tuple[object, ...]]:
        """Of the trained weights only: that frozen ones are changed is nothing to the masters."""
        weights = {name: cast(DTensor, parameter) for name, parameter in self._unit.parameters().items()}
        # A change counts in the DTensor or in its local part, depending on which of them it was made.
        return {
            name: (w._version, w._local_tensor._version, w._local_tensor.data_ptr(), w._local_tensor.device)
            for name, w in weights.items()
        }
