"""What compress() will send and keep, without a process: the same pipeline, asked for its bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from thinwire.comm.compress.assemble import assemble
from thinwire.comm.compress.auto import Auto
from thinwire.comm.compress.ddp import ddp_groups
from thinwire.comm.compress.feedback import DGC
from thinwire.comm.compress.feedback.ef21_variants import EF21PP
from thinwire.comm.compress.handle import NORM_BYTES
from thinwire.comm.compress.pipeline import Pipeline
from thinwire.comm.compress.settings import CompressSettings
from thinwire.comm.forecast import Exchange, Forecast, Parameter, Seat, When
from thinwire.comm.two_shot import TwoShotMean


def forecast_compress(
    settings: CompressSettings,
    parameters: Sequence[Parameter],
    seat: Seat,
    *,
    buckets: Sequence[Sequence[Parameter]],
    bucket_bytes: int,
    inner: Sequence[Sequence[int]] | None = None,
    clip_norm: float = 0.0,
) -> Forecast:
    """What compress() of a DDP model will send in a step after its first ones, and keep.

    Args:
        parameters: of the model, in its order.
        buckets: DDP's, in the order in which backward fills them: it hands gradients on bucket by bucket.
        bucket_bytes: DDP's bucket_cap_mb, in bytes.
        inner: the groups of settings.exact_within.
        clip_norm: that of compress().
    Raises:
        ValueError: the settings do not fit this number of ranks.
    """
    shapes = {p.name: p.shape for p in parameters if p.trained}
    pipeline = pipeline_of(settings.model_copy(update={"start_step": 0}), shapes, seat, inner)
    groups = pipeline.exchanged_together(ddp_groups(shapes, settings.dense_below, bucket_bytes))
    exchanges = []
    if clip_norm:
        others = [r for r in range(seat.size) if r != seat.rank]
        sent = seat.by_level(dict.fromkeys(others, NORM_BYTES))
        exchanges.append(Exchange("compress/norm", sent, len(others), dict.fromkeys(sent, 1), "backward"))
    together = bool(clip_norm) or pipeline.takes_all_at_once
    order = [(i, ()) for i in range(len(groups))] if together else _as_they_fill(groups, buckets)
    for number, needs in order:
        operation = f"compress/group{number}"
        exchanges += exchanges_of(pipeline, settings, groups[number], seat, operation, when="backward", needs=needs)
    remarks = remarks_on(settings)
    if settings.start_step:
        first = pipeline_of(settings, shapes, seat, inner).sent_bytes(groups, seat.rank, seat.size)
        remarks.insert(
            0, f"the first {settings.start_step:,} steps send all in fp32, {sum(first.values()):,} bytes from this rank"
        )
    return Forecast(tuple(exchanges), memory_of(pipeline, groups, seat), tuple(remarks))


def pipeline_of(
    settings: CompressSettings,
    shapes: dict[str, torch.Size],
    seat: Seat,
    inner: Sequence[Sequence[int]] | None = None,
) -> Pipeline:
    """The pipeline of a rank that need not exist; it will only be asked what it would do."""
    return assemble(settings, shapes, rank=seat.rank, size=seat.size, inner=inner, learning_rate=lambda _: 1.0)


def exchanges_of(
    pipeline: Pipeline,
    settings: CompressSettings,
    group: Sequence[str],
    seat: Seat,
    operation: str,
    *,
    when: When,
    needs: tuple[str, ...] = (),
    per_step: float = 1.0,
) -> list[Exchange]:
    """One group's: an exchange for each call, and for each stage of it that waits for the stage before."""
    fused = settings.feedback.kind == "ef"
    found = []
    for lane in pipeline.lanes(group):
        dense = isinstance(lane.collective, TwoShotMean)
        unsure = (_has_absent_ranks(settings) and not dense) or isinstance(settings.compressor, Auto)
        for stage in lane.stages(seat.rank, seat.size, fused=fused):
            sent = seat.by_level(stage.sent_bytes)
            found.append(
                Exchange(
                    operation,
                    sent,
                    stage.messages,
                    {seat.level_of_peer[r]: stage.shots for r in stage.sent_bytes},
                    when,
                    needs,
                    per_step,
                    stage.coding,
                    exact=stage.exact and not unsure,
                )
            )
    return found


def memory_of(pipeline: Pipeline, groups: Sequence[Sequence[str]], seat: Seat) -> dict[str, int]:
    """Bytes kept between steps, by state; none of those that are empty."""
    numels = {name: shape.numel() for name, shape in pipeline.shapes.items()}
    lanes = [lane for group in groups for lane in pipeline.lanes(group)]
    dense = [(lane.collective, lane.numel) for lane in lanes if isinstance(lane.collective, TwoShotMean)]
    states = {
        "feedback": sum(pipeline.feedback.kept_bytes(numels[name]) for name in pipeline.remembered()),
        "collective": sum(lane.kept_bytes(seat.rank, seat.size) for lane in lanes),
        "buffers": max((mean.scratch_bytes(n, seat.rank, seat.size, cast=False) for mean, n in dense), default=0),
    }
    return {state: count for state, count in states.items() if count}


def remarks_on(settings: CompressSettings) -> list[str]:
    """What is not foretold of the pipeline, or only roughly."""
    remarks = []
    feedback, compressor = settings.feedback, settings.compressor
    if isinstance(compressor, Auto):
        remarks.append(
            f"compressor auto measures {compressor.measure_steps} steps, which send all in fp32 as foretold here; what "
            "it then chooses is not foretold: give the compressor that a run has chosen"
        )
    elif not compressor.fixed_size:
        remarks.append(f"what compressor {compressor.kind} sends depends on the data: its bytes are those to expect")
    if isinstance(feedback, DGC) and feedback.warmup_steps:
        remarks.append(f"the first {feedback.warmup_steps:,} steps send more, while feedback dgc warms up")
    if _has_absent_ranks(settings):
        remarks.append("under feedback ef21_pp a rank sends so much only in the steps that it takes part in")
    return remarks


def _has_absent_ranks(settings: CompressSettings) -> bool:
    feedback = settings.feedback
    if not isinstance(feedback, EF21PP):
        return False
    each = feedback.participation if isinstance(feedback.participation, tuple) else (feedback.participation,)
    return min(each) < 1


def _as_they_fill(
    groups: Sequence[Sequence[str]], buckets: Sequence[Sequence[Parameter]]
) -> list[tuple[int, tuple[str, ...]]]:
    """Numbers of groups in the order in which they leave, and the parameters whose gradients each waits for.

    A group leaves when DDP has handed on the bucket with the last of its gradients, and all of that bucket is there.
    """
    place = {p.name: (i, j) for i, bucket in enumerate(buckets) for j, p in enumerate(bucket)}
    last = [max((place[name] for name in group), default=(0, 0)) for group in groups]
    found = []
    for number in sorted(range(len(groups)), key=last.__getitem__):
        bucket = [p.name for p in buckets[last[number][0]]] if buckets else []
        found.append((number, tuple(dict.fromkeys([*groups[number], *bucket]))))
    return found
