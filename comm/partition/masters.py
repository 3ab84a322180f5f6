"""The fp32 weights that the optimizer changes: the rows of a unit that this rank owns, as DTensors."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from thinwire.comm.partition.unit import Unit
from thinwire.comm.partition.weight_shard import WeightShard


class Masters:
    """Views of the weights' own memory, or separate copies where weights are not fp32 or travel inexactly.

    FSDP2 replaces the memory of its shards when a state_dict is loaded, and when the model leaves the meta device;
    users change weights in place. follow() notices both, so that the optimizer always starts from the weights that the
    model has. The parameters stay the same objects: optimizers and schedulers hold on to them.

    Args:
        mesh: of the states: see StateMeshes.
        separate: copies, of 4 bytes for each element that this rank owns.
    Attributes:
        parameters: fp32, by name, with placement Shard(0) in every dimension of the mesh.
    """

    def __init__(self, unit: Unit, weights: WeightShard, mesh: DeviceMesh, *, separate: bool) -> None:
        self.separate = separate
        self._unit = unit
        self._weights = weights
        self._mesh = mesh
        self._seen: list[tuple[object, ...]] = []
        self.parameters: dict[str, nn.Parameter] = {
            name: self._wrap(name, self._begin(rows)) for name, rows in self._rows().items()
        }
        self.note_weights()

    def local(self, name: str) -> Tensor:
        """This rank's rows of a master, without gradient."""
        return cast(DTensor, self.parameters[name]).to_local().detach()

    def follow(self) -> bool:
        """Begin anew from weights that somebody else has changed; returns whether there were any."""
        if self._versions() == self._seen:
            return False
        for name, rows in self._rows().items():
            local = self.local(name)
            if self.separate and local.device == rows.device:
                local.copy_(rows)
            elif local.device != rows.device or local.data_ptr() != rows.data_ptr():
                self._replace(name, self._begin(rows))
        self.note_weights()
        return True

    def note_weights(self) -> None:
        """Take the weights as they are now for what these masters have become."""
        self._seen = self._versions()

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

    def _versions(self) -> list[tuple[object, ...]]:
        """Of the trained weights only: that frozen ones are changed is nothing to the masters."""
        weights = [cast(DTensor, parameter) for parameter in self._unit.parameters().values()]
        # A change counts in the DTensor or in its local part, depending on which of them it was made.
        return [
            (w._version, w._local_tensor._version, w._local_tensor.data_ptr(), w._local_tensor.device) for w in weights
        ]
