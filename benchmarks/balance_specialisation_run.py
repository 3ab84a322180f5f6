"""One run of balance_specialisation.py: a small mixture of experts on text of several domains, balanced in one way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from thinwire.comm.balance.balance import LoadBalance
from thinwire.comm.balance.bias import SignBiasSettings
from thinwire.comm.balance.functional import balance_loss, expert_counts
from thinwire.comm.balance.load_metrics import load_metrics
from thinwire.dist.data import DataSettings
from thinwire.dist.domain_data import DomainData
from thinwire.dist.expert_use import expert_use
from thinwire.dist.models.moe import MoEGPT, MoESettings
from thinwire.dist.models.router import Router, Routing

WAYS = ("micro", "node", "global", "stale", "ema", "shuffle", "bias")
CPU = torch.device("cpu")
UNITS, SEQUENCES, CONTEXT = 16, 2, 128
NODE_UNITS = 4
LR, COEF, CLIP = 2e-3, 0.01, 1.0
BIAS_RATE = 1e-3
TRACE_POINTS = 8
MODEL = MoESettings(
    layers=2, heads=4, width=96, context=CONTEXT, mlp="gelu", experts=16, top_k=2, expert_width=64, renormalise=True
)


class UnitsTogether:
    """The loss with f counted over sets of units that LoadBalance has no name for in one process.

    It is the functional form: loss() is what is added to the trainer's loss when all units have been through the model.

    Args:
        others: for each unit, and the selections (tokens, top_k) of all units, those of which f is counted for it.
    """

    def __init__(self, model: MoEGPT, others: Callable[[int, Sequence[Tensor]], Tensor]) -> None:
        self._others = others
        self._seen: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
        for layer in model.moe_layers:
            layer.router.register_forward_hook(self._note)

    def _note(self, router: nn.Module, inputs: tuple[Tensor, ...], routing: Routing) -> None:
        if router.training:
            assert isinstance(router, Router)
            self._seen.setdefault(router, []).append((F.linear(inputs[0], router.weight), routing.selected))

    def loss(self) -> Tensor:
        total = torch.zeros(())
        for units in self._seen.values():
            tokens = sum(len(logits) for logits, _ in units)
            selections = [selected for _, selected in units]
            for place, (logits, _) in enumerate(units):
                counts = expert_counts(self._others(place, selections), MODEL.experts)
                total = total + COEF * balance_loss(logits, counts / counts.sum(), tokens=tokens)
        self._seen = {}
        return total


def node(place: int, selections: Sequence[Tensor]) -> Tensor:
    """The units of the same node."""
    first = place - place % NODE_UNITS
    return torch.cat(list(selections[first : first + NODE_UNITS]))


class Shuffled:
    """As many tokens as a unit has, drawn from the whole batch for each unit anew."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, place: int, selections: Sequence[Tensor]) -> Tensor:
        whole = torch.cat(list(selections))
        return whole[torch.randperm(len(whole), generator=self._generator)[: len(selections[place])]]


def build(way: str, seed: int, model: MoEGPT) -> UnitsTogether | None:
    """Balance the model in this way; returns what has a loss to add, if it is not a LoadBalance."""
    match way:
        case "micro":
            model.balance_with(_balance(scope="micro"))
        case "global":
            model.balance_with(_balance(mode="late"))
        case "stale":
            model.balance_with(_balance(mode="stale"))
        case "ema":
            model.balance_with(_balance(mode="ema", decay=0.9))
        case "bias":
            model.balance_with(_balance(coef=0.0, bias=SignBiasSettings(rate=BIAS_RATE)))
        case "node":
            return UnitsTogether(model, node)
        case "shuffle":
            return UnitsTogether(model, Shuffled(seed))
        case other:
            raise ValueError(f"way: {other!r}; allowed: {', '.join(WAYS)}")
    return None


def run(way: str, seed: int, steps: int) -> dict[str, Any]:
    """Train, and return the scores and the experts' use. One process, one thread.

    One step is UNITS micro-batches of SEQUENCES windows of one domain, all forward passes first.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.manual_seed(seed)
    settings = DataSettings(corpus="domains", samples_per_domain=SEQUENCES, validation_fraction=0.1)
    data = DomainData(settings, context=CONTEXT, seed=seed)
    model = MoEGPT(MODEL, data.tokenizer.vocab)
    model.initialise(seed)
    together = build(way, seed, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    losses, loads, trace = [], [], []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LR * 0.5 * (1 + math.cos(math.pi * step / steps))
        total = torch.zeros(())
        with watched(model) if step >= 0.75 * steps else nullcontext([]) as seen:
            for unit in range(UNITS):
                first = (step * UNITS + unit) * SEQUENCES
                batch = data.training_batch(range(first, first + SEQUENCES), CPU)
                total = total + F.cross_entropy(model(batch.inputs).flatten(0, 1), batch.targets.flatten()) / UNITS
            if seen:
                loads.append(torch.stack(seen).view(UNITS, len(model.moe_layers), -1))
        losses.append(float(total.detach()))
        if together is not None:
            total = total + together.loss()
        total.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % max(1, steps // TRACE_POINTS) == 0:
            now = expert_use(model, data.validation_by_domain, count=16, batch=16, device=CPU, precision=nullcontext())
            trace.append((step + 1, *(round(value, 4) for value in now.layers()["specialisation"])))
    use = expert_use(model, data.validation_by_domain, count=64, batch=16, device=CPU, precision=nullcontext())
    dist.destroy_process_group()
    return {
        "way": way,
        "seed": seed,
        "steps": steps,
        "train_loss": sum(losses[-50:]) / len(losses[-50:]),
        **use.metrics(),
        **violations(torch.stack(loads)),
        "by_layer": use.layers(),
        "trace": trace,
        "perplexity": use.perplexities(),
        "counts": use.counts.tolist(),
    }


@contextmanager
def watched(model: MoEGPT) -> Iterator[list[Tensor]]:
    """The counts of each forward pass of a router."""
    seen: list[Tensor] = []

    def note(router: nn.Module, inputs: object, routing: Routing) -> None:
        seen.append(expert_counts(routing.selected, MODEL.experts))

    handles = [layer.router.register_forward_hook(note) for layer in model.moe_layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def violations(loads: Tensor) -> dict[str, float]:
    """MaxVio of the last quarter's training batches, and of their units: means over steps, units and layers.

    Args:
        loads: (steps, units, layers, experts).
    """
    return {
        "batch_max_violation": load_metrics(loads.sum(1).flatten(0, 1))["mean_max_violation"],
        "unit_max_violation": load_metrics(loads.flatten(0, 2))["mean_max_violation"],
    }


def _balance(coef: float = COEF, **settings: Any) -> LoadBalance:
    return LoadBalance(
        num_experts=MODEL.experts, top_k=MODEL.top_k, coef=coef, micro_batches=UNITS, ranks="sum", **settings
    )
