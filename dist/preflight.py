"""Before the first step: do all ranks have the same configuration, model, data and versions?"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
from torch import nn
from torch.distributed import DistNetworkError, DistStoreError, Store

import thinwire
from thinwire.comm.queue import CommQueue
from thinwire.comm.rank_names import name_ranks

# What is compared, in this order. The exchange has this many digests in every version, so that versions can differ.
CATEGORIES = ("thinwire", "torch", "config", "parameters", "values", "tokenizer", "data", "device")
_DIGEST_BYTES = 16
_SHOWN = 12
_ASK_EVERY_S = 5.0

# Settings that may differ from host to host: a network card has its own name on each.
_OF_THE_HOST = ("world.interface",)

Facts = Mapping[str, Mapping[str, str]]
"""Category -> entry -> what this rank has."""


class PreflightError(ValueError):
    """Ranks differ in something that must be equal; the message names the ranks and the entries."""


def wait_for_all(queue: CommQueue, store: Store, timeout_s: float) -> None:
    """Wait until every rank has come here, for up to timeout_s seconds: reading and encoding text may take one longer
    than the deadline of an exchange. Ends early when a rank no longer answers; the next exchange will tell why.
    """
    store.set(f"ready/{queue.rank}", "")
    keys = [f"ready/{rank}" for rank in range(queue.size)]
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and queue.monitor.verdict is None:
        try:
            store.wait(keys, timedelta(seconds=_ASK_EVERY_S))
            return
        except (DistStoreError, DistNetworkError):  # not yet there, or the rank that serves the store is gone
            if queue.monitor.survey(queue.name, 1.0).silent:
                return


def check_agreement(facts: Facts, *, queue: CommQueue, store: Store) -> None:
    """Compare the facts of all ranks. Collective: every rank raises, or none.

    One exchange of 128 bytes per peer when all is well. Otherwise the categories that differ are compared entry by
    entry through the store. The reference is what most ranks have; among equals, the one with the lowest rank.

    Raises:
        PreflightError: with the entries that differ, by rank.
    """
    assert set(facts) <= set(CATEGORIES)
    digests = b"".join(_digest(facts.get(category, {})) for category in CATEGORIES)
    mine = torch.frombuffer(bytearray(digests), dtype=torch.uint8)
    gathered = queue.submit("control/preflight", lambda channel: channel.all_gather_same(mine)).wait()
    differing = [
        category
        for position, category in enumerate(CATEGORIES)
        if len({bytes(row[_at(position)].tolist()) for row in gathered}) > 1
    ]
    if not differing:
        return
    store.set(f"preflight/{queue.rank}", json.dumps({c: dict(facts.get(c, {})) for c in differing}))
    told = [json.loads(store.get(f"preflight/{rank}")) for rank in range(queue.size)]
    lines = [
        line for category in differing for line in _differences([rank.get(category, {}) for rank in told], category)
    ]
    hidden = len(lines) - _SHOWN
    listed = "\n".join(f"  {line}" for line in lines[:_SHOWN]) + (f"\n  and {hidden} more" if hidden > 0 else "")
    raise PreflightError(
        f"the ranks do not agree on what to train; start all with the same files and versions:\n{listed}"
    )


def describe_config(config: Mapping[str, Any]) -> dict[str, str]:
    """The resolved settings by dotted path, without those that are the host's own."""
    return {path: value for path, value in _flatten(config) if path not in _OF_THE_HOST}


def describe_model(model: nn.Module) -> dict[str, dict[str, str]]:
    """Categories "parameters" (shape and dtype by name) and "values" (a hash by name), buffers included."""
    tensors = {name: tensor.detach() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    return {
        "parameters": {
            f"model.{name}": f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
            for name, tensor in tensors.items()
        },
        "values": {
            f"values of model.{name}": hashlib.blake2b(
                tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data, digest_size=8
            ).hexdigest()
            for name, tensor in tensors.items()
        },
    }


def describe_versions() -> dict[str, dict[str, str]]:
    """Categories "thinwire" and "torch". The build (CPU, CUDA) does not count: machines may differ in it."""
    return {
        "thinwire": {"thinwire version": thinwire.__version__},
        "torch": {"torch version": torch.__version__.partition("+")[0]},
    }


def _differences(told: list[dict[str, str]], category: str) -> Iterator[str]:
    for entry in dict.fromkeys(name for rank in told for name in rank):
        values = [rank.get(entry, "nothing") for rank in told]
        reference, _ = Counter(values).most_common(1)[0]  # among equals the first seen, that is the lowest rank's
        odd = {value: [r for r, v in enumerate(values) if v == value] for value in values if value != reference}
        if odd:
            parts = [
                f"{name_ranks(ranks)} {'has' if len(ranks) == 1 else 'have'} {value}" for value, ranks in odd.items()
            ]
            others = [r for r, v in enumerate(values) if v == reference]
            rest = "the others have" if len(others) > 1 else f"rank {others[0]} has"
            prefix = "config." if category == "config" else ""
            yield f"{prefix}{entry}: {'; '.join(parts)}; {rest} {reference}"


def _digest(entries: Mapping[str, str]) -> bytes:
    return hashlib.blake2b(json.dumps(entries, sort_keys=True).encode(), digest_size=_DIGEST_BYTES).digest()


def _at(position: int) -> slice:
    return slice(position * _DIGEST_BYTES, (position + 1) * _DIGEST_BYTES)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value)
