"""By how much the loss pulls at each expert's score: the coefficients of its gradient, for all layers at once."""

from __future__ import annotations

import torch
from torch import Tensor

from thinwire.comm.balance.convention import Convention
from thinwire.comm.balance.modes.mode import Setting
from thinwire.comm.balance.settings import BalanceSettings
from thinwire.comm.balance.target import Target, fractions_of
from thinwire.comm.balance.unit import Unit


class Pulls:
    """w_i = kappa E / N (a f_i + a_micro f_i of the micro-batch itself), and kappa a_z / N, which z-loss takes.

    Made in the first layer's backward pass and kept for the others: on a GPU a small operation takes as long as all of
    a router's gradient, and counts may have come by another device.
    """

    def __init__(self, settings: BalanceSettings, convention: Convention, setting: Setting) -> None:
        self._settings = settings
        self._convention = convention
        self._setting = setting
        self._made_for: tuple[Unit, Target, torch.device] | None = None
        self._pulls: Tensor | None = None
        self._z_scales: Tensor | None = None

    def of(self, unit: Unit, target: Target, layer: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Of one layer: (num_experts,) and a scalar, fp64; None = no z-loss."""
        made = self._made_for
        if made is None or made[0] is not unit or made[1] is not target or made[2] != device:
            self._make(unit, target, device)
            self._made_for = unit, target, device
        assert self._pulls is not None
        return self._pulls[layer], None if self._z_scales is None else self._z_scales[layer]

    def _make(self, unit: Unit, target: Target, device: torch.device) -> None:
        settings, columns = self._settings, self._setting.columns
        kappa = self._convention.factor(self._setting.size, self._setting.micro_batches)
        # A checkpoint's tensors may be on another device.
        per_token = kappa / target.tokens.to(device)
        pull = settings.coef * target.fractions.to(device)
        if settings.micro_coef:
            pull = pull + settings.micro_coef * fractions_of(unit.rows.to(device), columns)
        self._pulls = pull * (columns.num_experts * per_token)[:, None]
        self._z_scales = settings.z_coef * per_token if settings.z_coef else None
