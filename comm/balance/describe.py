"""What a LoadBalance will do, in words for the start of a run."""

from __future__ import annotations

from collections.abc import Mapping

from thinwire.comm.balance.settings import BalanceSettings


def own_weight(settings: BalanceSettings, ranks: int, micro_batches: int) -> float:
    """The weight that a micro-batch's own counts have in its f, the mean over micro-batches.

    By as much the loss still presses each micro-batch to be balanced in itself: its expected gradient is that of the
    population's loss, plus this weight times the bias of the loss over a micro-batch. Where all are alike:

        micro 1; sync, hier H_M / (n M), H_M = 1 + 1/2 + ... + 1/M; carry, and late if all forward passes come first,
        1 / (n M); stale, ema, gossip 0.

    Args:
        ranks: n, over which f is counted.
        micro_batches: M.
    """
    if settings.scope == "micro":
        return 1.0
    match settings.timing:
        case "sync" | "hier":
            return sum(1 / m for m in range(1, micro_batches + 1)) / (ranks * micro_batches)
        case "carry" | "late":
            return 1 / (ranks * micro_batches)
        case _:  # those of the last step
            return 0.0


def describe(
    settings: BalanceSettings,
    *,
    layers: int,
    num_experts: int,
    ranks: int,
    micro_batches: int,
    messages: int,
    sent_bytes: Mapping[str, int],
) -> str:
    """One line.

    Args:
        layers: 0 = not yet known.
        ranks: over which f is counted.
        messages: that each rank takes part in per step. sent_bytes: by it, per step and level.
    """
    what = "this micro-batch" if settings.scope == "micro" else f"{_count(ranks, 'rank')} x {micro_batches} in a step"
    mode = "" if settings.scope == "micro" else f", mode {settings.timing}"
    where = f"{_count(layers, 'layer')} of " if layers else ""
    sends = ", ".join(f"{count:,} bytes over {level}" for level, count in sent_bytes.items())
    sends = f" with {sends}" if sends else ""
    said = f"{_count(messages, 'message')} per step{sends}" if messages else "sends nothing"
    weight = own_weight(settings, ranks, micro_batches)
    if not settings.coef:
        leaks = ""
    elif weight:
        leaks = f"; f has the diversity of {1 / weight:.3g} micro-batch{'' if weight == 1 else 'es'}"
    else:
        leaks = "; no micro-batch is balanced against itself"
    bias = f", bias {settings.bias.kind}" if settings.bias else ""
    return (
        f"scope {settings.scope}{mode} ({what}), coef {settings.coef:g}{bias} in {where}{num_experts} experts; "
        f"{said}{leaks}"
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
