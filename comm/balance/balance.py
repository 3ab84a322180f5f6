"""LoadBalance: what a router calls, and what then happens when."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from thinwire.comm.balance.arguments import check_call, check_router, check_step, near_ranks
from thinwire.comm.balance.bias import QuantileBiasSettings, SignBiasSettings
from thinwire.comm.balance.columns import Columns
from thinwire.comm.balance.convention import Combine, Convention, LossScale
from thinwire.comm.balance.describe import describe
from thinwire.comm.balance.factor_check import check_factor
from thinwire.comm.balance.fused import Routing, apply, route_experts
from thinwire.comm.balance.inject import inject, register, selection_bias
from thinwire.comm.balance.layer_map import LayerMap
from thinwire.comm.balance.load_metrics import load_metrics
from thinwire.comm.balance.modes.build import build_bus, build_mode, messages_per_step
from thinwire.comm.balance.modes.mode import Setting
from thinwire.comm.balance.recorder import StepRecorder
from thinwire.comm.balance.settings import BalanceSettings, ModeName, Scope
from thinwire.comm.balance.target import fractions_of
from thinwire.comm.gossip.graphs import EachGraph
from thinwire.comm.queue import CommQueue, open_queue
from thinwire.kernels.router_gradient import Score


class LoadBalance:
    """The load-balancing loss over the global batch: a comm.method.Method. One per model.

    Qiu et al. 2025, "Demons in the Detail" (2501.11873). With c_i the selections of expert i, f_i = c_i / sum_j c_j,
    P_i the mean over tokens of p_ti, p_t the softmax (or the normalised sigmoid) of the logits, the loss of a layer is

        a * E * sum_i f_i P_i,    dL / dz_ti = a E / N * p_ti * (f_i - sum_j f_j p_tj),

    where f and the number of tokens N are those of the global batch. Only the counts cross the wire; the P of each
    micro-batch stays where it is, and the trainer's own averaging of gradients does the rest. The loss is never added
    to the trainer's: its gradient enters where the router calls, so it must know what the trainer does to gradients.

    Micro-batches are told by the calls alone: a layer that is called again begins the next one, and after
    `micro_batches` of them the next step begins.

    Modes, that is, when f is known (modes/ has each one's rule):
        late    all micro-batches counted so far: exact where all forward passes come before the backward passes
        sync    the paper's: the micro-batches up to this one
        carry   as sync, with the last step's counts in place of those to come
        stale   the last step's (default): one message per step, and nobody waits
        ema     a moving average of past steps; so too
        hier    this step's within `inner`, the last step's beyond
        gossip  as stale, of counts that neighbours have told each other: no message to all

    Where we differ from the paper: no blocking message per layer, but one for all layers, on a CommQueue; tokens are
    weighted equally whatever their number per rank, and padding is left out; a recomputed forward pass counts once.

    Args:
        group: ranks whose tokens make up the batch: data, expert, context (and, where each has tokens of its own,
            tensor) parallel ones that hold the same layers; default: all.
        num_experts: E, outputs of each router.
        top_k: experts that a token selects.
        coef: a; summed over layers.
        scope: "global", or for comparison "micro" or "node" (the ranks of `inner`).
        mode: see above; default "stale". None with scope micro.
        micro_batches: forward passes per optimizer step. begin_step() can change it.
        ranks: what the trainer does to the ranks' gradients: "mean" (DDP, FSDP2, DeepSpeed) or "sum".
        accumulation: what it does to the micro-batches' gradients: "sum" (as backward() does), or "mean" if it divides
            gradients, not only its loss, by their number.
        loss_scale: gives the present scale of the trainer's loss: GradScaler.get_scale.
        micro_coef, z_coef, decay: see BalanceSettings.
        graph: mode gossip: settings of an undirected graph of comm.gossip, or its kind; default: "ring".
        bias: "sign", "quantile", or settings of one; needs a call of bias() in each router. See BalanceSettings.
        score: of the gate: "softmax" or "sigmoid".
        inner: groups of near ranks, each ascending, for scope node and mode hier.
        layers: names of all layers, in any order; default: learned from the first forward pass.
        queue: CommQueue over the group's ranks that nobody else uses meanwhile; default: a new one.
        timeout_s: deadline of a message when no queue is given, in seconds.
    Raises:
        ValueError: a setting that is not allowed, or this rank is not in the group.

    Example:
        balance = thinwire.LoadBalance(num_experts=64, top_k=4, coef=1e-2)
        # in each router:
        logits = balance("layer 3", logits, selected, valid_mask)
    """

    def __init__(
        self,
        group: ProcessGroup | None = None,
        *,
        num_experts: int,
        top_k: int,
        coef: float,
        scope: Scope = "global",
        mode: ModeName | None = None,
        micro_batches: int = 1,
        ranks: Combine = "mean",
        accumulation: Combine = "sum",
        loss_scale: LossScale | None = None,
        micro_coef: float = 0.0,
        z_coef: float = 0.0,
        decay: float | None = None,
        graph: EachGraph | Mapping[str, Any] | str | None = None,
        bias: SignBiasSettings | QuantileBiasSettings | Mapping[str, Any] | str | None = None,
        score: Score = "softmax",
        inner: Sequence[Sequence[int]] | None = None,
        layers: Sequence[str | int] | None = None,
        queue: CommQueue | None = None,
        timeout_s: float = 60.0,
    ) -> None:
        self.settings = BalanceSettings.model_validate(
            {
                "coef": coef,
                "scope": scope,
                "mode": mode,
                "decay": decay,
                "micro_coef": micro_coef,
                "z_coef": z_coef,
                "bias": bias,
                "graph": graph,
            }
        )
        check_router(num_experts, top_k, score)
        check_step(micro_batches)
        self.num_experts = num_experts
        self.top_k = top_k
        self.score: Score = score
        self._convention = Convention(ranks, accumulation, loss_scale)
        self._queue = queue or open_queue(group, timeout_s=timeout_s)
        self._layers = LayerMap(layers)
        chosen = self.settings.bias
        self._columns = Columns(num_experts, chosen.bins if isinstance(chosen, QuantileBiasSettings) else 0)
        what_for = "scope: node" if scope == "node" else "mode: hier" if mode == "hier" else None
        near = near_ranks(inner, self._queue.rank, self._queue.size, what_for)
        told = {"top_k": top_k, "score": score, "ranks": ranks, "accumulation": accumulation, "inner": inner}
        same = [f"{name} = {value}" for name, value in (self.settings.model_dump() | told).items()]
        self._bus = build_bus(self.settings, self._queue, self._layers, self._columns, near, same)
        self._setting = Setting(self._bus, self._columns, self._queue.size, micro_batches, near=scope == "node")
        self._mode = build_mode(self.settings, self._setting)
        self._recorder = StepRecorder(
            self.settings, self._setting, self._layers, self._mode, self._convention, top_k, score
        )
        self._steps, self._bias = self._recorder.steps, self._recorder.bias
        self._model: nn.Module | None = None
        self._handle = register(self._recorder)

    def __call__(self, layer: str | int, logits: Tensor, selected: Tensor, valid_mask: Tensor | None = None) -> Tensor:
        """The logits, through which the loss's gradient flows back: go on with these.

        Counts and pulls only where gradients are on; in a recomputation it counts nothing.

        Args:
            layer: the layer's name or number.
            logits: (..., num_experts), before softmax or sigmoid; fp32 is best, since ties are common in bf16.
            selected: (..., top_k) integers: the experts that each token selected, before any is dropped.
            valid_mask: (...) bool: tokens that are not padding; default: all.
        Raises:
            ValueError: a shape other than these, or a layer that is not known.
        """
        check_call(self.num_experts, self.top_k, layer, logits, selected, valid_mask)
        if self._recorder.removed or (self._model is not None and not self._model.training):
            return logits
        valid = None if valid_mask is None else valid_mask.reshape(-1)
        flat = logits.reshape(-1, self.num_experts)
        out = inject(flat, selected.reshape(-1, self.top_k), valid, self._handle, str(layer), torch.is_grad_enabled())
        return out.view(logits.shape)

    def route(
        self,
        layer: str | int,
        logits: Tensor,
        valid_mask: Tensor | None = None,
        *,
        bias: Tensor | None = None,
        renormalise: bool = False,
    ) -> Routing:
        """All that a router does behind its logits, with the call above, in one kernel; see kernels.route.route().

        The gradient is that of balance(layer, logits, ...) followed by the scores of what was selected. Where nothing
        is balanced, as in eval mode, it selects and weighs all the same.

        Args:
            layer, logits, valid_mask: as for the call above; logits in fp32, bf16, fp16 or fp64.
            bias: (num_experts,), added to the scores for the selection only; default: this LoadBalance's own, if any.
            renormalise: whether the weights of a token's selected experts are divided by their sum.
        Returns: selected, (..., top_k) int64, best first; weights, (..., top_k) fp32 or fp64.
        Raises:
            ValueError: a shape or dtype other than these, a layer that is not known, or two biases.
        """
        check_call(self.num_experts, self.top_k, layer, logits, None, valid_mask)
        if bias is not None and self._bias is not None:
            raise ValueError("bias: LoadBalance has its own, which it adds itself; give none, or remove its setting")
        if self._recorder.removed or (self._model is not None and not self._model.training):
            if self._bias is not None:
                bias = self.bias(layer, logits)
            return route_experts(
                logits, self.top_k, valid_mask=valid_mask, bias=bias, score=self.score, renormalise=renormalise
            )
        here = (self._handle, str(layer), torch.is_grad_enabled())
        return apply(logits, valid_mask, bias, self.top_k, self.score, renormalise, *here)

    def bias(self, layer: str | int, logits: Tensor) -> Tensor | None:
        """What the router adds to the scores by which tokens select experts, and to nothing else; None without bias.

        Changes when the first layer asks in another step. Where a score enters a weight, it enters without the bias.

        Args:
            layer: as for the call that follows.
            logits: (..., num_experts): the selection is the top_k of softmax(logits) + bias, or of the sigmoid.
        Returns: (num_experts,) fp32, the same on every rank.
        """
        if self._bias is None:
            return None
        return selection_bias(logits.detach(), self._handle, str(layer), torch.is_grad_enabled())

    def watch(self, model: nn.Module) -> None:
        """Do nothing while this model is in eval mode, also where gradients are on."""
        self._model = model

    def begin_step(self, *, micro_batches: int | None = None, valid_tokens: int | None = None) -> None:
        """Say that the next forward pass is the first of a step. All ranks call it, or none.

        Without this call the next step begins after `micro_batches` forward passes. What an unfinished step has counted
        is used as if it had ended there.

        Args:
            micro_batches: of the step, and of those after it.
            valid_tokens: of this rank in the whole step. Modes sync, late and carry, which otherwise suppose that the
                micro-batches to come are as large as those they know, then know N from the first on.
        """
        check_step(micro_batches, valid_tokens)
        self._steps.end()
        if micro_batches is not None:
            self._setting.micro_batches = micro_batches
        self._steps.announced = valid_tokens or 0

    def check_factor(
        self,
        router: nn.Module,
        forward_backward: Callable[[], object],
        *,
        gradient: Callable[[nn.Parameter], Tensor | None] | None = None,
    ) -> None:
        """Measure what the trainer does to a balancing gradient; ranks, accumulation and loss_scale must say the same.

        A gradient of known size goes into the router's parameter beside its own, in the second of two runs of the same
        step; what it has become is compared. Counts and sends nothing of the balance. Call it on all ranks, before
        training and before torch.compile(), and clear the gradients that it leaves.

        Args:
            router: the module of one layer, or of its gate, with a trained parameter.
            forward_backward: runs one step's forward and backward passes on the same data each time: clears gradients
                first, ends when they are reduced and, under AMP, unscaled, and neither clips them nor steps.
            gradient: reads this rank's part of a parameter's gradient; default: its .grad.
        Raises:
            ValueError: on every rank; says which setting to change, and to what.
        """
        removed, self._recorder.removed = self._recorder.removed, True
        try:
            here = self._setting
            check_factor(router, forward_backward, self._convention, self._queue, lambda: here.micro_batches, gradient)
        finally:
            self._recorder.removed = removed

    def finish(self) -> None:
        """Wait for what is under way, and raise what it says; mode stale would do so in the next backward pass."""
        with self._recorder.faults_end_the_step():
            self._mode.last_step()

    def state_dict(self) -> dict[str, Any]:
        """What the next step needs of this one. Call it between steps; waits for what is under way."""
        state: dict[str, Any] = {"layers": list(self._layers.names), "num_experts": self.num_experts}
        with self._recorder.faults_end_the_step():
            self._steps.end()
            state["mode"] = self._mode.state_dict()
            if self._bias is not None:
                self._recorder.catch_up()
                state["bias"] = self._bias.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what state_dict() gave on this rank; or of all ranks of a job of another size, as Method says.

        Raises:
            ValueError: it is of other layers, or has biases, by which tokens then select, and this has none.
        """
        of_rank = state["all_ranks"][0] if "all_ranks" in state else state
        names = list(of_rank["layers"])
        if self._layers.complete and names and names != self._layers.names:
            raise ValueError(
                f"balance: the checkpoint is of the layers {names[:4]}, this model has {self._layers.names[:4]}; load "
                "the checkpoint of this model"
            )
        if names and not self._layers.complete:
            for name in names:
                self._layers.number(name)
            self._layers.complete = True
        if of_rank["num_experts"] != self.num_experts:
            raise ValueError(
                f"balance: the checkpoint is of {of_rank['num_experts']} experts in each layer, this model has "
                f"{self.num_experts}; load the checkpoint of this model"
            )
        if "bias" in of_rank and self._bias is None:
            raise ValueError("balance.bias: the checkpoint has biases, by which its tokens select experts; set bias")
        self._steps.forget()
        self._mode.load_state_dict(
            self._mode.resized([old["mode"] for old in state["all_ranks"]]) if "all_ranks" in state else of_rank["mode"]
        )
        if self._bias is not None:
            self._bias.steps = self._steps.ended
            if "bias" in of_rank:
                self._bias.load_state_dict(of_rank["bias"])

    def predicted_bytes(self) -> dict[str, int]:
        """Payload bytes that this rank sends per step, by level; before the layers are known, none."""
        levels: dict[str, int] = defaultdict(int)
        if not len(self._layers):
            return {}
        for messages, near in zip(self._messages(), (False, True), strict=True):
            for level, count in (self._bus.sent_bytes(near=near) if messages else {}).items():
                levels[level] += messages * count
        return {level: count for level, count in levels.items() if count}

    def describe(self) -> str:
        """A line for the start of a run: what is counted over whom, what that sends, and how much of it leaks."""
        setting = self._setting
        return describe(
            self.settings,
            layers=len(self._layers),
            num_experts=self.num_experts,
            ranks=len(self._bus.inner) if setting.near else setting.size,
            micro_batches=setting.micro_batches,
            messages=sum(self._messages()),
            sent_bytes=self.predicted_bytes(),
        )

    def metrics(self) -> dict[str, float]:
        """Of the last step that is known without waiting: with mode stale, the one before the last.

        See load_metrics() for the loads of the whole batch; unit_max_violation: of this rank's micro-batches, the mean.
        self_weight: see KnownStep; effective_units: its inverse, how many micro-batches' diversity the loss sees, where
        it is finite. lag: mean over layers of sum_i |f_i that was used - f_i that it turned out to be|. messages: sent
        since the start. bias_range: the largest difference between two experts' biases.
        """
        numbers = {"messages": float(self._bus.messages)}
        if self._bias is not None:
            numbers["bias_range"] = self._bias.range
        known = self._mode.known_step()
        if known is not None:
            numbers |= load_metrics(self._columns.loads(known.rows))
            numbers["self_weight"] = known.self_weight
            if known.self_weight:
                numbers["effective_units"] = 1 / known.self_weight
            if known.used is not None:
                lag = (known.used.to(known.rows.device) - fractions_of(known.rows, self._columns)).abs().sum(-1)
                numbers["lag"] = float(lag.mean())
        units = [load_metrics(self._columns.loads(u.rows))["mean_max_violation"] for u in self._steps.filled]
        if units:
            numbers["unit_max_violation"] = sum(units) / len(units)
        return numbers

    def remove(self) -> None:
        """Leave the logits as they are from now on."""
        self._recorder.removed = True

    def _messages(self) -> tuple[int, int]:
        return messages_per_step(self.settings, self._setting.micro_batches)

    def __deepcopy__(self, memo: dict[int, Any]) -> LoadBalance:
        """Itself: the copy of a model, of averaged weights say, has the same balance, and may only be evaluated."""
        return self

    def __reduce__(self) -> NoReturn:
        """There is no way to send a message from a file."""
        raise TypeError("LoadBalance cannot be pickled with the model that holds it; save model.state_dict() instead")
