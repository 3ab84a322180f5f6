"""Whole weights and optimizer states of a model under DeepSpeed, by name, and back: no pickle, any stage, any ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class DeepSpeedState:
    """Reads and writes what DeepSpeed has cut to pieces, through its own safe_get_full and safe_set_full functions.

    Weights are the fp32 masters. An optimizer's state is kept as {name of the parameter: {name of the state: tensor}},
    and what is no larger than one number, the step count, once. Collective.

    Args:
        optimizer: the one that DeepSpeed was given, whose parameters it has replaced by flat pieces.
        engine: deepspeed.initialize()'s.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, engine: Any, stage: int) -> None:
        self._model = model
        self._optimizer = optimizer
        self._zero = engine.optimizer
        self._stage = stage

    def whole(self) -> dict[str, Any]:
        """Copies of everything, on the CPU."""
        weights = {name: self._weight(parameter) for name, parameter in self._model.named_parameters()}
        weights |= {name: buffer.detach().cpu().clone() for name, buffer in self._model.named_buffers()}
        numbers, tensors = self._state_names()
        if tensors:
            self._link()
        states = {
            name: {key: self._state(parameter, key) for key in tensors}
            for name, parameter in self._model.named_parameters()
            if parameter.requires_grad and tensors
        }
        return {"model": weights, "optimizer": {"numbers": numbers, "states": states}}

    def load(self, shared: Mapping[str, Any]) -> None:
        """Overwrite weights and states.

        Raises:
            ValueError: another engine or model wrote them.
        """
        weights, optimizer = shared["model"], shared["optimizer"]
        parameters = dict(self._model.named_parameters())
        names = {*parameters, *(name for name, _ in self._model.named_buffers())}
        if set(optimizer) != {"numbers", "states"} or not names <= set(weights):
            missing = sorted(names - set(weights))[:3]
            raise ValueError(
                "checkpoint: it was not written by engine deepspeed with this model"
                + (f": {', '.join(missing)} are missing" if missing else "")
                + "; give the engine that wrote it, or start without it"
            )
        for name, buffer in self._model.named_buffers():
            buffer.copy_(weights[name])
        if optimizer["states"]:
            self._make_states(optimizer["numbers"], next(iter(optimizer["states"].values())))
        for name, parameter in parameters.items():
            self._set_weight(parameter, weights[name])
            for key, value in optimizer["states"].get(name, {}).items():
                self._set_state(parameter, key, value)
        self._spread()

    def clear_padding(self) -> None:
        """Stage 3 fills a tensor's last piece up with what was in the memory, which would spoil a quantised block."""
        for parameter in self._model.parameters():
            if self._stage == 3 and parameter.requires_grad:
                piece, _ = self._zero._get_fp32_opt_state_partition(parameter, False)
                begin = piece.numel() * self._zero._get_param_partition_rank(parameter)
                known: Any = parameter  # DeepSpeed has given it attributes
                own = max(0, min(piece.numel(), known.ds_numel - begin))
                piece.detach()[own:].zero_()
                known.ds_tensor.detach()[own:].zero_()

    def _weight(self, parameter: nn.Parameter) -> Tensor:
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param

        if self._stage > 0 and parameter.requires_grad:
            whole: Tensor = safe_get_full_fp32_param(parameter)
            return whole.detach().to("cpu", torch.float32).view(_shape(parameter)).clone()
        if self._stage == 3:
            with GatheredParameters([parameter]):
                return parameter.detach().cpu().clone()
        return parameter.detach().cpu().clone()

    def _set_weight(self, parameter: nn.Parameter, value: Tensor) -> None:
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_set_full_fp32_param

        if self._stage == 3 and parameter.requires_grad:
            self._set_piece(parameter, value, None)
        elif self._stage > 0 and parameter.requires_grad:
            safe_set_full_fp32_param(parameter, value.to(parameter.device))
        elif self._stage == 3:
            with GatheredParameters([parameter], modifier_rank=0):
                if parameter.numel() == value.numel():
                    parameter.detach().copy_(value)
        else:
            parameter.detach().copy_(value)

    def _state(self, parameter: nn.Parameter, key: str) -> Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        if self._stage == 0:
            own: Tensor = self._optimizer.state[parameter][key]
            return own.detach().cpu().clone()
        whole: Tensor = safe_get_full_optimizer_state(parameter, key)
        return whole.detach().cpu().view(_shape(parameter)).clone()

    def _set_state(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        if self._stage == 0:
            self._optimizer.state[parameter][key].copy_(value)
        elif self._stage == 3:
            self._set_piece(parameter, value, key)
        else:
            safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)

    def _set_piece(self, parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
        """As safe_set_full, which in stage 3 fails for tensors that the ranks cannot share equally."""
        piece, _ = self._zero._get_fp32_opt_state_partition(parameter, False, optim_state_key=key)
        piece = piece.detach()
        begin = piece.numel() * self._zero._get_param_partition_rank(parameter)
        own = value.flatten()[begin : begin + piece.numel()]
        piece[: own.numel()].copy_(own)
        piece[own.numel() :].zero_()

    def _pieces(self) -> list[Tensor]:
        """What the optimizer updates here."""
        if self._stage == 0:
            return [p for group in self._optimizer.param_groups for p in group["params"]]
        pieces: list[Tensor] = (
            self._zero.fp32_partitioned_groups_flat if self._stage == 3 else self._zero.single_partition_of_fp32_groups
        )
        return list(pieces)

    def _state_names(self) -> tuple[dict[str, Tensor], list[str]]:
        """States of one number, with their values, and the names of the others; none before the first step."""
        made = [self._optimizer.state[piece] for piece in self._pieces() if self._optimizer.state.get(piece)]
        state: dict[str, Any] = made[0] if made else {}
        held = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        numbers = {key: value.detach().cpu().clone() for key, value in held.items() if value.dim() == 0}
        return numbers, [key for key in held if key not in numbers]

    def _make_states(self, numbers: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        """What the optimizer would make at its first step, so that there is something to overwrite."""
        for piece in self._pieces():
            self._optimizer.state[piece] = {
                **{key: number.clone() for key, number in numbers.items()},
                **{key: torch.zeros_like(piece, requires_grad=False) for key in tensors},
            }
        self._link()

    def _link(self) -> None:
        """Stages 1 and 2 link states to parameters after the first group's first step, when others have none yet."""
        if self._stage in (1, 2):
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def _spread(self) -> None:
        """Let the weights in use follow their masters, as after a step."""
        if self._stage in (1, 2):
            self._zero.update_lp_params()
        elif self._stage == 3:
            self._zero._partition_all_parameters()
            for index in range(len(self._zero.fp16_groups)):
                self._zero._reassign_or_swap_out_partitioned_parameters(index)
            if self._zero.persistent_parameters:
                self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)
            self._zero.invalidate_secondary_tensor()


def _shape(parameter: nn.Parameter) -> torch.Size:
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape
