"""What the operators of inject.py call back: counts go into the step, and the loss's gradient comes out of its mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from thinwire.comm.balance.bias import SelectionBias
from thinwire.comm.balance.convention import Convention
from thinwire.comm.balance.errors import FAULTS
from thinwire.comm.balance.layer_map import LayerMap
from thinwire.comm.balance.margins import margin_histogram
from thinwire.comm.balance.modes.mode import Mode, Setting
from thinwire.comm.balance.pulls import Pulls
from thinwire.comm.balance.recompute import recognise
from thinwire.comm.balance.replay import in_backward, will_be_recomputed
from thinwire.comm.balance.settings import BalanceSettings
from thinwire.comm.balance.step_units import StepUnits
from thinwire.kernels.router_gradient import Score, router_gradient


class StepRecorder:
    """An inject.Recorder: the part of a LoadBalance that forward and backward passes meet.

    Attributes: mode and steps; bias, None = there is none; removed, whether LoadBalance has left the model.
    """

    def __init__(
        self,
        settings: BalanceSettings,
        setting: Setting,
        layers: LayerMap,
        mode: Mode,
        convention: Convention,
        top_k: int,
        score: Score,
    ) -> None:
        self.mode = mode
        self.steps = StepUnits(layers, mode, setting)
        self.bias = SelectionBias(settings.bias, setting.columns, top_k) if settings.bias else None
        self.removed = False
        self._columns = setting.columns
        self._layers = layers
        self._pulls = Pulls(settings, convention, setting)
        self._top_k = top_k
        self._score: Score = score

    def count(self, layer: str, logits: Tensor, selected: Tensor, valid: Tensor | None, grad: bool) -> int:
        """Count a forward pass: see inject.Recorder."""
        return self._count(
            layer, lambda: self._row(layer, logits, valid, self._columns.row(logits, selected, valid)), grad
        )

    def count_tally(self, layer: str, logits: Tensor, tally: Tensor, valid: Tensor | None, grad: bool) -> int:
        """Count a forward pass whose selections are counted already: see inject.Recorder."""
        return self._count(layer, lambda: self._row(layer, logits, valid, self._columns.of_tally(tally)), grad)

    def _count(self, layer: str, row: Callable[[], Tensor], grad: bool) -> int:
        if in_backward():
            self.steps.forward_is_over()
            return recognise(self.steps.filled, self._layers.number(layer), row()).number
        if not grad and not will_be_recomputed():
            return -1
        if self.bias is not None and layer not in self.bias.asked:
            raise ValueError(
                f"bias: is set, but the router of layer {layer} has not asked for it; let it select the top_k of its "
                "scores + balance.bias(layer, logits), or remove bias"
            )
        counted = row()
        with self.faults_end_the_step():
            return self.steps.put(self._layers.number(layer), counted).number

    def own_bias(self, layer: str, logits: Tensor, grad: bool) -> Tensor | None:
        """Of a router that leaves its bias to us: see inject.Recorder."""
        return None if self.bias is None else self.present_bias(layer, logits, grad)

    def present_bias(self, layer: str, logits: Tensor, grad: bool) -> Tensor:
        """The bias, which changes where a step begins: see inject.Recorder."""
        assert self.bias is not None
        self.bias.asked.add(layer)
        if not in_backward() and (grad or will_be_recomputed()) and self.steps.is_over and not self.removed:
            self.catch_up()
        known = self._layers.complete or layer in self._layers
        return self.bias.of(self._layers.number(layer) if known else None, logits)

    def pull(self, layer: str, unit: int, logits: Tensor, valid: Tensor | None) -> Tensor:
        """The loss's gradient: see inject.Recorder."""
        on_scores, z_scale = self.pull_on(layer, unit, logits.device)
        return router_gradient(logits, on_scores, z_scale, valid, score=self._score)

    def pull_on(self, layer: str, unit: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Its coefficients: see inject.Recorder."""
        self.steps.forward_is_over()
        here = self.steps.unit(unit)
        with self.faults_end_the_step():
            target = self.mode.target(here)
        return self._pulls.of(here, target, self._layers.number(layer), device)

    def _row(self, layer: str, logits: Tensor, valid: Tensor | None, row: Tensor) -> Tensor:
        if self.bias is not None and self._columns.bins:
            bias = self.bias.of(self._layers.number(layer), logits)
            counts = margin_histogram(logits, bias, self._top_k, valid, self._columns.bins, self._score)
            self._columns.margins(row).copy_(counts.view(self._columns.num_experts, -1))
        return row

    @contextmanager
    def faults_end_the_step(self) -> Iterator[None]:
        """A fault is told once, on every rank; the next step goes on from what was known before."""
        try:
            yield
        except FAULTS:
            self.steps.abandon()
            raise

    def catch_up(self) -> None:
        """Learn from the last step's counts. They have travelled during its backward pass, so this hardly waits."""
        bias = self.bias
        if bias is None:
            return
        behind, bias.steps = bias.steps < self.steps.ended, self.steps.ended
        with self.faults_end_the_step():
            rows = self.mode.last_step() if behind else None
        if rows is not None:
            bias.update(rows)
