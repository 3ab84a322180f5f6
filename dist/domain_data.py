"""Windows of text whose domain is known, and which of them each rank sees when."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from thinwire.dist.data import Batch, DataSettings, Windows, digest, tokens_of
from thinwire.dist.domains import installed_domains
from thinwire.dist.order import window_of_sample
from thinwire.dist.tokenizer import Tokenizer, load_tokenizer


class DomainData:
    """As Data, of several domains, each as often as the others.

    Sample number i is of the domain that is drawn for block i // samples_per_domain, by the seed and that number alone;
    so batches do not depend on how many ranks share them, and resuming needs only the step.

    Args:
        settings: corpus: domains.
        context: tokens per window.
        seed: of the order.
    Raises:
        ValueError: this machine has text of too few domains, or too little of one.

    Attributes: domains, their names; validation, windows of all of them in turn; validation_by_domain.
    """

    def __init__(self, settings: DataSettings, *, context: int, seed: int) -> None:
        self.tokenizer: Tokenizer = load_tokenizer(settings.tokenizer)
        self.identity = self.tokenizer.identity
        self.tokens_per_sample = context
        cache = Path(settings.cache).expanduser()
        self._block = settings.samples_per_domain
        self._seed = seed
        self.fingerprint: dict[str, str] = {}
        self._training: list[Windows] = []
        self.validation_by_domain: dict[str, Windows] = {}
        for domain in installed_domains(settings.validation_fraction):
            sides = []
            for what, side in (("training", domain.training), ("validation", domain.validation)):
                sides.append(Windows(tokens_of(side, self.tokenizer, cache), context, f"{what} {domain.name}"))
                self.fingerprint[f"{what} {domain.name}"] = (
                    f"{len(side)} documents, {sum(map(len, side))} bytes, SHA-256 {digest(side)}"
                )
            self._training.append(sides[0])
            self.validation_by_domain[domain.name] = sides[1]
        self.domains = tuple(self.validation_by_domain)
        self.validation = InTurn(self.validation_by_domain)

    def describe(self) -> str:
        """How much there is."""
        sides = self._training, self.validation_by_domain.values()
        training, validation = (sum(len(windows.tokens) for windows in side) for side in sides)
        return (
            f"{training:,} training and {validation:,} validation tokens of {len(self.domains)} domains: "
            f"{', '.join(self.domains)}"
        )

    def domain_of(self, sample: int) -> int:
        """The number of the domain that this sample is of."""
        key = f"{self._seed},{sample // self._block}".encode()
        drawn = hashlib.blake2b(key, digest_size=8, person=b"thinwire-domain").digest()
        return int.from_bytes(drawn, "big") % len(self.domains)

    def training_batch(self, samples: Sequence[int], device: torch.device) -> Batch:
        """The training windows of these sample numbers. Each domain has an order of its own, as Data has."""
        chosen = []
        for sample in samples:
            domain = self.domain_of(sample)
            windows = self._training[domain]
            chosen.append((windows, window_of_sample(sample, windows.count, self._seed + domain)))
        return _batch(chosen, device)


class InTurn:
    """Windows of all domains, one of each after another: as many of each as the smallest has.

    Attributes: count, of windows.
    """

    labelled = False

    def __init__(self, windows: Mapping[str, Windows]) -> None:
        self._windows = list(windows.values())
        self.count = len(self._windows) * min(side.count for side in self._windows)

    def batch(self, chosen: Sequence[int], device: torch.device) -> Batch:
        """The windows with these numbers, in this order."""
        domains = len(self._windows)
        return _batch([(self._windows[number % domains], number // domains) for number in chosen], device)


def _batch(chosen: Sequence[tuple[Windows, int]], device: torch.device) -> Batch:
    parts = [windows.batch([number], device) for windows, number in chosen]
    inputs, targets = torch.cat([part.inputs for part in parts]), torch.cat([part.targets for part in parts])
    return Batch(inputs, targets, sum(part.text_bytes or 0 for part in parts))
