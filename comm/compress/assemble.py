"""From settings to a pipeline: the one place where compressor, feedback and collective are put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from thinwire.comm.compress.auto import Auto, measuring_routes
from thinwire.comm.compress.collective import Collective
from thinwire.comm.compress.collectives import Hierarchical, TwoShot, build_collective
from thinwire.comm.compress.combinations import check_combination
from thinwire.comm.compress.compressor import Compressor
from thinwire.comm.compress.feedback import build_feedback
from thinwire.comm.compress.joined import Joined
from thinwire.comm.compress.pipeline import Pipeline
from thinwire.comm.compress.routes import choose_routes, is_global
from thinwire.comm.compress.settings import CompressSettings


def assemble(
    settings: CompressSettings,
    shapes: Mapping[str, torch.Size],
    *,
    rank: int,
    size: int,
    inner: Sequence[Sequence[int]] | None = None,
    learning_rate: Callable[[str], float] | None = None,
) -> Pipeline:
    """The pipeline of one rank, with no memory yet.

    Args:
        shapes: of all tensors, by name, in an order that all ranks share.
        rank, size: within the group.
        inner: groups of ranks that average exactly before they compress; None = each rank is alone.
        learning_rate: that of a parameter in the present step, by its name.
    Raises:
        ValueError: the feedback does not fit the place, or no tensor has a name.
    """
    if inner is not None and not isinstance(settings.compressor, Auto):
        # The settings know a level's name only; who gives the groups themselves is held to the same rules here.
        check_combination(settings.compressor, settings.feedback, settings.collective, exact_within=True)
    feedback = build_feedback(settings.feedback, rank=rank, size=size, seed=settings.seed, learning_rate=learning_rate)

    def build(compressor: Compressor) -> Collective:
        collective = build_collective(compressor, settings.collective, inner=inner, server_error=feedback.server_error)
        if feedback.sums_means:
            collective = _lossless_in_sum(collective, compressor, settings.feedback.kind)
        if is_global(compressor):
            collective = Joined(collective)
        return collective

    if isinstance(settings.compressor, Auto):
        routes = measuring_routes(shapes, dense_below=settings.dense_below)
    else:
        routes = choose_routes(shapes, settings.compressor, dense_below=settings.dense_below)
    return Pipeline(
        shapes,
        routes,
        feedback,
        build,
        seed=settings.seed,
        start_step=settings.start_step,
        feedback_sees_dense=settings.feedback.kind not in ("none", "ef"),
    )


def _lossless_in_sum(collective: Collective, compressor: Compressor, feedback: str) -> Collective:
    """For a feedback that adds up the means: what the owners cannot send of a mean must come with a later one."""
    if isinstance(collective, TwoShot):
        return TwoShot(compressor, server_error=True)
    if isinstance(collective, Hierarchical) and isinstance(collective.outer, TwoShot):
        raise ValueError(
            f"feedback: {feedback} adds up the means, and two_shot between groups of ranks loses a part of each for "
            "good; give feedback: ef, a sparse compressor (topk, threshold), or exact_within: null"
        )
    return collective
