"""Which experts each domain's text goes to, and how well it is predicted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinwire.comm.balance.functional import expert_counts
from thinwire.comm.balance.load_metrics import load_metrics
from thinwire.comm.balance.specialisation import frequencies, overlap, specialisation
from thinwire.dist.evaluate import ValidationData
from thinwire.dist.models.moe import MoEGPT
from thinwire.dist.models.router import Router, Routing


@dataclass(frozen=True)
class ExpertUse:
    """Sums over the text that was scored. Those of several ranks may be added.

    domains: their names. counts: (layers, domains, experts) int64, selections. scores: (layers, domains) fp64, sum over
    tokens of the gate's scores of the selected experts, where a token's scores of all experts sum to 1. nats:
    (domains,) fp64, sum of the tokens' cross entropies. tokens: (domains,) int64.
    """

    domains: tuple[str, ...]
    counts: Tensor
    scores: Tensor
    nats: Tensor
    tokens: Tensor

    def __add__(self, other: ExpertUse) -> ExpertUse:
        """Of both."""
        assert self.domains == other.domains
        return ExpertUse(
            self.domains,
            self.counts + other.counts,
            self.scores + other.scores,
            self.nats + other.nats,
            self.tokens + other.tokens,
        )

    def perplexities(self) -> dict[str, float]:
        """exp of the mean nats per token, by domain."""
        means = (self.nats / self.tokens).tolist()
        return {name: math.exp(nats) for name, nats in zip(self.domains, means, strict=True)}

    def layers(self) -> dict[str, list[float]]:
        """One number for each layer; each domain counts as much as the others.

        specialisation: I(expert; domain) / H(domain). max_frequency: the largest share of one expert in a domain's
        selections, the mean over domains. top_k_score: sum of the gate's scores of the selected experts; k / E where it
        does not choose. overlap: Jaccard's index of two domains' own experts, the mean over pairs.
        """
        domains = len(self.domains)
        pairs = overlap(self.counts).double().sum((-2, -1)) - domains
        numbers = {
            "specialisation": specialisation(self.counts),
            "max_frequency": frequencies(self.counts).amax(-1).mean(-1),
            "top_k_score": (self.scores / self.tokens).mean(-1),
            "overlap": pairs / (domains * (domains - 1)),
        }
        return {name: [float(value) for value in values] for name, values in numbers.items()}

    def metrics(self) -> dict[str, float]:
        """val_loss, nats per token; means over layers of layers(); and load_metrics() of all the text."""
        means = {name: sum(values) / len(values) for name, values in self.layers().items()}
        return {"val_loss": float((self.nats / self.tokens).mean()), **means, **load_metrics(self.counts.sum(-2))}


def expert_use(
    model: MoEGPT,
    windows: Mapping[str, ValidationData],
    *,
    count: int,
    batch: int,
    device: torch.device,
    precision: AbstractContextManager[Any],
    part: tuple[int, int] = (0, 1),
) -> ExpertUse:
    """Score `count` windows of each domain, spread evenly over its text, and note which experts they select.

    Args:
        model: its mode is restored.
        windows: by domain; at least two.
        count: of a domain; all it has, if that is less.
        batch: windows at a time.
        precision: context to compute in, such as an autocast.
        part: (rank, size), to score only each size-th batch.
    """
    layers, domains = len(model.moe_layers), len(windows)
    experts = model.moe_layers[0].experts.experts
    counts = torch.zeros(layers, domains, experts, dtype=torch.int64)
    scores, nats = torch.zeros(layers, domains, dtype=torch.float64), torch.zeros(domains, dtype=torch.float64)
    tokens = torch.zeros(domains, dtype=torch.int64)
    was_training = model.training
    model.eval()
    with torch.no_grad(), precision, _watching(model) as seen:
        for domain, text in enumerate(windows.values()):
            wanted = min(count, text.count)
            firsts = range(0, wanted, batch)[part[0] :: part[1]]
            for first in firsts:
                chosen = [i * text.count // wanted for i in range(first, min(first + batch, wanted))]
                given = text.batch(chosen, device)
                targets = given.targets.flatten()
                output = model(given.inputs).float().flatten(0, -2)
                nats[domain] += F.cross_entropy(output, targets, reduction="none").double().sum().cpu()
                tokens[domain] += len(targets)
                for layer, (selected, score) in enumerate(seen):
                    counts[layer, domain] += expert_counts(selected, experts).cpu()
                    scores[layer, domain] += score
                seen.clear()
    model.train(was_training)
    return ExpertUse(tuple(windows), counts, scores, nats, tokens)


@contextmanager
def _watching(model: MoEGPT) -> Iterator[list[tuple[Tensor, float]]]:
    """Of each forward pass of a router: what was selected, and the sum of the gate's scores of that."""
    seen: list[tuple[Tensor, float]] = []

    def note(router: nn.Module, inputs: tuple[Tensor, ...], routing: Routing) -> None:
        assert isinstance(router, Router)
        logits = F.linear(inputs[0].float(), router.weight.float())
        p = logits.softmax(-1) if router.gate == "softmax" else F.normalize(logits.sigmoid(), p=1.0, dim=-1)
        seen.append((routing.selected, float(p.gather(-1, routing.selected).double().sum())))

    handles = [layer.router.register_forward_hook(note) for layer in model.moe_layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
